"""Calls to a Kubernetes API server, with the rights of whoever asks: plain paths and plain JSON.

`request` makes one call. `patient` makes it again while the server is away, throttles or is overloaded. Nothing here
watches: what is polled by name or listed anew has no history that the server could compact away under it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from components.runtime.errors import InputError

SECONDS = 10  # to wait for an answer
JSON, MERGE_PATCH = "application/json", "application/merge-patch+json"
BUSY = (429, 500, 502, 503, 504)  # statuses after which the call is made again
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds between two tries
REFUSED_SECONDS = 10.0
GONE = 410  # a page of a list that is asked for too late


class Unreachable(InputError):
    """The API server gave no answer at all."""


@dataclass(frozen=True)
class Answer:
    """`body` is empty where the server sent no JSON object. `retry_after`: seconds that it asks to wait."""

    status: int
    body: dict[str, Any]
    retry_after: float = 0.0

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def reason(self) -> str:
        return str(self.body.get("reason", "")) if not self.ok else ""

    @property
    def missing(self) -> bool:
        """The object is not there. A server that has not served its custom resources yet says 404 without this."""
        return self.status == 404 and self.reason == "NotFound" and bool((self.body.get("details") or {}).get("name"))

    def told(self) -> str:
        """What the server said, for a message."""
        return f"{self.status} {self.body.get('message') or self.reason or ''}".strip()


class KubernetesApi:
    """A connection by the kubeconfig (KUBECONFIG, a context), or by the service account of the pod that we are in.

    Raises InputError where there is neither, and for a 401 that does not pass.
    """

    def __init__(self, context: str = "") -> None:
        import urllib3
        from kubernetes import client, config

        try:
            config.load_kube_config(context=context or None)
        except (config.ConfigException, OSError) as error:
            try:
                config.load_incluster_config()
            except config.ConfigException:
                raise InputError(
                    f"no kubeconfig can be used ({error}); set KUBECONFIG, or choose a context of "
                    "`kubectl config get-contexts` by --context"
                ) from error
        settings = client.Configuration.get_default_copy()
        settings.retries = urllib3.Retry(0)
        self.host = settings.host
        self.api = client.ApiClient(settings)

    def request(self, method: str, path: str, body: dict[str, Any] | None = None, content: str = JSON) -> Answer:
        """One call. Raises Unreachable when there is no answer."""
        import urllib3
        from kubernetes.client.exceptions import ApiException

        try:
            found = self.api.call_api(
                path,
                method,
                header_params={"Accept": JSON, "Content-Type": content},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=SECONDS,
            )[0]
            return Answer(int(found.status), _read(found.data))
        except ApiException as error:
            if not error.status:
                raise Unreachable(self._unreachable(error)) from error
            return Answer(int(error.status), _read(error.body), _seconds((error.headers or {}).get("Retry-After")))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unreachable(self._unreachable(error)) from error

    def patient(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        content: str = JSON,
        *,
        seconds: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Answer:
        """The first answer that trying again does not better, within `seconds`.

        A PATCH that met another writer (409) is made again, too: ours name no resource version, so the server applies
        them to what is there then. A refusal counts once it has stood for REFUSED_SECONDS: right after its start a
        server may refuse what it will allow. Raises InputError with the last answer when the time is over.
        """
        began = time.monotonic()
        end, pause = began + seconds, FIRST_PAUSE
        while True:
            try:
                answer = self.request(method, path, body, content)
            except Unreachable as error:
                told, wait = str(error), pause
            else:
                again = answer.status in BUSY or (answer.status == 409 and method == "PATCH")
                if answer.status in (401, 403):
                    again = time.monotonic() - began < min(REFUSED_SECONDS, seconds / 2)
                if not again:
                    return answer
                told, wait = f"the API server {self.host} answers {answer.told()}", max(pause, answer.retry_after)
            if time.monotonic() + wait > end:
                raise InputError(f"{method} {path} did not get through in {seconds:.0f} s: {told}")
            sleep(wait)
            pause = min(pause * 2, LONGEST_PAUSE)

    def listed(self, path: str, selector: str = "", *, page: int = 500) -> Answer:
        """A whole list, page by page, as one answer; begun anew when a page comes too late (410).

        Raises Unreachable. An answer that is not ok is returned as it is.
        """
        while True:
            items: list[dict[str, Any]] = []
            more = ""
            while True:
                query = f"?limit={page}" + (f"&labelSelector={_quoted(selector)}" if selector else "")
                answer = self.request("GET", f"{path}{query}" + (f"&continue={_quoted(more)}" if more else ""))
                if answer.status == GONE and more:
                    break
                if not answer.ok:
                    return answer
                items += answer.body.get("items") or []
                more = (answer.body.get("metadata") or {}).get("continue") or ""
                if not more:
                    return Answer(answer.status, {"items": items})

    def _unreachable(self, error: Exception) -> str:
        return f"the API server {self.host} cannot be reached ({type(error).__name__}); try `kubectl cluster-info`"


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def _read(data: Any) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _seconds(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:  # a date: our own pause will do
        return 0.0
