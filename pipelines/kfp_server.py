"""Kubeflow Pipelines as `submit` and `schedule` see it: the connection, and the pinned version of a pipeline.

Settings of the surroundings: KFP_ENDPOINT (address of the API), KFP_UI (of the web page, where it is another),
KFP_TOKEN (bearer token), KFP_NAMESPACE (of a multi-user installation), KFP_CA (file of certificates to trust).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.runtime.errors import InputError
from pipelines import profiles
from pipelines.catalogue import Pipeline
from pipelines.stages import STAGES

if TYPE_CHECKING:
    from kfp import Client

SECONDS = 10  # to wait for a first answer
PAGE = 100
FORWARD = "kubectl -n kubeflow port-forward svc/ml-pipeline 8888 & export KFP_ENDPOINT=http://127.0.0.1:8888"


@dataclass(frozen=True)
class Version:
    """A version of a pipeline, as the server knows it."""

    pipeline_id: str
    version_id: str
    name: str
    uploaded: bool = False


@dataclass(frozen=True)
class Server:
    """A connection. `ui`: address of the web page; `namespace`: empty in a single-user installation."""

    client: Client
    endpoint: str
    ui: str
    namespace: str

    def run_link(self, run_id: str) -> str:
        return f"{self.ui}/#/runs/details/{run_id}"


def connect(endpoint: str = "", namespace: str = "") -> Server:
    """Connect to the API at `endpoint`, or at KFP_ENDPOINT. Raises InputError when there is none that answers."""
    endpoint = (endpoint or os.environ.get("KFP_ENDPOINT", "")).rstrip("/")
    namespace = namespace or os.environ.get("KFP_NAMESPACE", "")
    if not endpoint:
        raise InputError(
            f"no address of Kubeflow Pipelines: give --endpoint or set KFP_ENDPOINT; with kubectl at hand:\n  {FORWARD}"
        )
    if not endpoint.startswith(("http://", "https://")):
        raise InputError(f"the address {endpoint!r} of Kubeflow Pipelines must start with http:// or https://")
    token, authority = os.environ.get("KFP_TOKEN"), os.environ.get("KFP_CA")
    multi_user = _healthy(endpoint, token, authority)
    if multi_user and not namespace:
        raise InputError(
            f"Kubeflow Pipelines at {endpoint} serves many users: give --namespace (or set KFP_NAMESPACE), one of "
            "`kubectl get profiles`"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the SDK, about servers of before 2022
        from kfp import Client

        client = Client(host=endpoint, namespace=namespace or "kubeflow", existing_token=token, ssl_ca_cert=authority)
    return Server(client, endpoint, os.environ.get("KFP_UI", endpoint).rstrip("/"), namespace)


def _healthy(endpoint: str, token: str | None, authority: str | None) -> bool:
    """Whether the server serves many users. Raises InputError when it does not answer as Kubeflow Pipelines does."""
    import requests

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = requests.get(
            f"{endpoint}/apis/v2beta1/healthz", headers=headers, timeout=SECONDS, verify=authority or True
        )
    except (requests.RequestException, OSError) as error:
        raise InputError(
            f"Kubeflow Pipelines at {endpoint} cannot be reached ({type(error).__name__}); forward it:\n  {FORWARD}"
        ) from error
    if answer.status_code in (401, 403):
        raise InputError(
            f"Kubeflow Pipelines at {endpoint} refuses us ({answer.status_code}); set KFP_TOKEN, e.g.\n"
            '  export KFP_TOKEN="$(kubectl -n NAMESPACE create token default-editor --audience=pipelines.kubeflow.org)"'
        )
    try:
        return bool(answer.json().get("multi_user"))
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{endpoint} answers ({answer.status_code}), but not as Kubeflow Pipelines 2 does; KFP_ENDPOINT is the "
            f"address of the service ml-pipeline, port 8888:\n  {FORWARD}"
        ) from error


@contextlib.contextmanager
def requests_of(what: str) -> Iterator[None]:
    """Turn a refusal of the server into an InputError, and keep what the SDK prints to itself."""
    from kfp_server_api.exceptions import ApiException

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ApiException as error:
        raise InputError(f"Kubeflow Pipelines refused to {what}: {reason(error)}") from error


def reason(error: Any) -> str:
    """The message in an ApiException: the server's own words where it sent some."""
    try:
        told = json.loads(error.body)
        # Uploads have another form of error than the rest of the API.
        return f"{told.get('error') or told.get('message') or told.get('error_message')} ({error.status})"
    except (TypeError, ValueError, AttributeError):
        return f"{error.reason or error} ({error.status})"


def pages(read: Callable[..., Any], field: str, **arguments: Any) -> Iterator[Any]:
    """Everything that a listing call of the SDK gives, page by page."""
    token = ""
    while True:
        answer = read(page_token=token, page_size=PAGE, **arguments)
        yield from getattr(answer, field) or []
        token = answer.next_page_token or ""
        if not token:
            return


def stage_tasks(run: Any) -> Iterator[tuple[str, Any]]:
    """The tasks of a run that are stages, with the stage's name."""
    for task in (run.run_details.task_details or []) if run.run_details else []:
        name = (task.display_name or "").replace("-", "_")
        if name in STAGES:
            yield name, task


def _called(one: Any, name: str) -> bool:
    return name in (getattr(one, "name", None), one.display_name)


def compiled_version(
    pipeline: Pipeline, profile: str, folder: Path, *, rehearsal: bool = False
) -> tuple[str, str, Path]:
    """The pipeline compiled from the sources: its name, its version's name, the file. Raises as `profiles.load`."""
    from pipelines import cluster

    if profile not in profiles.names():
        raise InputError(
            f"unknown profile {profile!r}; there are {', '.join(profiles.names())}. What a cluster runs stands in "
            "pipelines/profiles: put the file there (`sparseline profiles` lists them)"
        )
    cluster.compile_profile(pipeline, profile, folder, rehearsal=rehearsal)
    name = cluster.pipeline_name(pipeline, profile, rehearsal=rehearsal)
    return name, cluster.version_name(name, folder / "pipeline.yaml"), folder / "pipeline.yaml"


def find_version(
    server: Server,
    pipeline: Pipeline,
    profile: str,
    *,
    wanted: str = "",
    upload: bool = True,
    rehearsal: bool = False,
) -> Version:
    """The version on the server that is the pipeline as it is compiled from the sources; uploaded when it lacks.

    `wanted`: the name of another version. Raises InputError when the server has no such version and it is not to be
    uploaded.
    """
    with tempfile.TemporaryDirectory(prefix="sparseline-pipeline-") as folder:
        name, version, path = compiled_version(pipeline, profile, Path(folder), rehearsal=rehearsal)
        with requests_of("list its pipelines"):
            known = list(pages(server.client.list_pipelines, "pipelines", namespace=server.namespace or None))
        found = [one for one in known if _called(one, name)]
        if len(found) > 1:
            raise InputError(
                f"Kubeflow Pipelines has {len(found)} pipelines named {name}; delete all but one in its UI"
            )
        versions: list[Any] = []
        if found:
            with requests_of(f"list the versions of {name}"):
                read = server.client.list_pipeline_versions
                versions = list(pages(read, "pipeline_versions", pipeline_id=found[0].pipeline_id))
        for one in versions:
            if _called(one, wanted or version):
                return Version(one.pipeline_id, one.pipeline_version_id, wanted or version)
        if wanted or not upload:
            there = ", ".join(sorted(one.display_name for one in versions)) or "none"
            raise InputError(
                f"Kubeflow Pipelines has no version {wanted or version} of {name} (it has: {there});\n"
                + (
                    "  leave --version away to use the one of these sources"
                    if wanted
                    else "  register it: kubectl -n kubeflow apply -k manifests/pipelines, or leave --no-upload away"
                )
            )
        return _upload(server, found[0].pipeline_id if found else "", name, version, path)


def _upload(server: Server, pipeline_id: str, name: str, version: str, path: Path) -> Version:
    import kfp_server_api as api

    from pipelines.cluster import display_name

    with requests_of(f"take the version {version}"):
        if not pipeline_id:
            body = api.V2beta1Pipeline(name=name, display_name=display_name(name), namespace=server.namespace or None)
            pipeline_id = server.client.pipelines.pipeline_service_create_pipeline(pipeline=body).pipeline_id
        made = server.client.upload_pipeline_version(str(path), version, pipeline_id=pipeline_id)
    return Version(pipeline_id, made.pipeline_version_id, version, uploaded=True)
