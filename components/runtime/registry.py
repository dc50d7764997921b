"""The registered model: versions that point to checkpoints, and the aliases that say which one counts.

`candidate` is the checkpoint that a run made last, `champion` is what serves, `previous` is what served before.
MLflow holds the pointer and the sha256 of the manifest, never the weights.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from components.runtime.contracts import Pointer
from components.runtime.errors import InputError, without_password
from components.runtime.settings import NO_USAGE_REPORTING, Settings

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
SCHEME = "models:/"


def mlflow_client(tracking_uri: str) -> MlflowClient:
    """An MLflow client for `tracking_uri`. Raises InputError when the server or the database cannot be reached."""
    os.environ.update({name: value for name, value in NO_USAGE_REPORTING.items() if name not in os.environ})
    # MLflow tells of every table that it creates; only what matters is to be seen.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # It would write the traceback of an error of the database that it then raises, and that we tell of.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    def connected(uri: str) -> MlflowClient:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        return client

    try:
        if tracking_uri.startswith("sqlite:///"):
            path = Path(tracking_uri.removeprefix("sqlite:///"))
            if not path.exists():
                with _made_beside(path) as half:
                    connected(f"sqlite:///{half}")
        else:
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        client = connected(tracking_uri)
    except (MlflowException, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0]
        told = f"MLflow at {tracking_uri} cannot be used: {reason}; check MLFLOW_TRACKING_URI and that the server runs"
        raise InputError(without_password(told)) from error
    return client


@contextmanager
def _made_beside(path: Path) -> Iterator[Path]:
    """Where MLflow is to make its tables: beside `path`, then moved there.

    MLflow makes them in many steps and cannot go on with a part of them, so a kill in between must leave nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".incomplete-{path.name}-{os.getpid()}")
    half.unlink(missing_ok=True)
    try:
        yield half
        os.link(half, path)
    except FileExistsError:
        pass  # another process was faster
    finally:
        half.unlink(missing_ok=True)


@dataclass(frozen=True)
class ModelVersion:
    """A version of the registered model and the checkpoint behind it."""

    name: str
    version: str
    pointer: Pointer


class Registry:
    """Versions and aliases of one registered model.

    `Registry(settings)` connects to MLflow; every method raises InputError when a version or alias does not exist.
    """

    def __init__(self, settings: Settings, client: MlflowClient | None = None) -> None:
        self.name = settings.model
        self.client = client or mlflow_client(settings.tracking_uri)

    def alias(self, alias: str) -> ModelVersion | None:
        """The version that `alias` names, or None when there is no such alias (or no such model) yet."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version_by_alias(self.name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return self._version(found)

    def _version(self, found: object) -> ModelVersion:
        tags, version = found.tags, str(found.version)  # type: ignore[attr-defined]
        if "uri" not in tags or "sha256" not in tags:
            raise InputError(
                f"version {version} of the model {self.name!r} has no pointer; register it with sparseline"
            )
        pointer = Pointer(kind="checkpoint", uri=tags["uri"], sha256=tags["sha256"])
        return ModelVersion(found.name, version, pointer)  # type: ignore[attr-defined]

    def versions(self) -> list[ModelVersion]:
        """All versions of all models of this registry that point to a checkpoint."""
        return [
            self._version(found)
            for found in self.client.search_model_versions()
            if {"uri", "sha256"} <= found.tags.keys()
        ]

    def register(self, pointer: Pointer, *, run_id: str | None = None, model_id: str | None = None) -> ModelVersion:
        """The version of this checkpoint; made when there is none yet."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            try:
                self.client.create_registered_model(self.name)
            except MlflowException as second:  # another process was faster
                if second.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        for found in self.client.search_model_versions(f"name='{self.name}'"):
            if found.tags.get("sha256") == pointer.sha256:
                return self._version(found)
        tags = {"uri": pointer.uri, "sha256": pointer.sha256}
        made = self.client.create_model_version(
            self.name, source=pointer.uri, run_id=run_id, tags=tags, model_id=model_id
        )
        return ModelVersion(self.name, str(made.version), pointer)

    def set_alias(self, alias: str, version: str) -> None:
        self.client.set_registered_model_alias(self.name, alias, version)

    def promote(self, pointer: Pointer) -> ModelVersion:
        """Make this checkpoint the champion; the old champion becomes `previous`. Harmless when it is it already."""
        version = self.register(pointer)
        champion = self.alias(CHAMPION)
        if champion and champion.version == version.version:
            return version
        if champion:
            self.set_alias(PREVIOUS, champion.version)
        self.set_alias(CHAMPION, version.version)
        return version

    def uri(self, model: str) -> str:
        """models:/... of an alias or a version number of this model; another text is given back as it is."""
        if model in (CANDIDATE, CHAMPION, PREVIOUS):
            return f"{SCHEME}{self.name}@{model}"
        return f"{SCHEME}{self.name}/{model}" if model.isdigit() else model

    def resolve(self, uri: str) -> ModelVersion:
        """The version behind `models:/NAME@ALIAS` or `models:/NAME/VERSION` (`models:/@champion`: our own name).

        Raises InputError when the URI names nothing.
        """
        from mlflow.exceptions import MlflowException

        rest = uri.removeprefix(SCHEME).strip("/")
        name, _, alias = rest.partition("@")
        number = ""
        if not alias:
            name, _, number = rest.rpartition("/")
        if urlparse(uri).scheme != "models" or not (alias or number.isdigit()):
            raise InputError(
                f"{uri!r} names no model; write models:/{self.name}@champion or models:/{self.name}/VERSION"
            )
        wanted = self if name in ("", self.name) else _named(self, name)
        if alias:
            found = wanted.alias(alias)
            if found is None:
                raise InputError(f"the model {wanted.name!r} has no alias {alias!r} yet; run `sparseline run` first")
            return found
        try:
            return wanted._version(self.client.get_model_version(wanted.name, number))
        except MlflowException as error:
            raise InputError(f"the model {wanted.name!r} has no version {number!r}") from error


def _named(registry: Registry, name: str) -> Registry:
    other = object.__new__(Registry)
    other.name, other.client = name, registry.client
    return other
