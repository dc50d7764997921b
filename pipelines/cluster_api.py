"""Reading from a Kubernetes API server for the checks: what we may not see counts as missing, and is remembered."""

from __future__ import annotations

from typing import Any

from components.runtime.errors import InputError
from components.runtime.kubernetes_api import KubernetesApi


class Cluster:
    """The read calls that the checks make. Raises InputError where the API server does not answer."""

    def __init__(self, context: str = "") -> None:
        self.api = KubernetesApi(context)
        self.host = self.api.host
        self.forbidden: list[str] = []

    def get(self, path: str) -> dict[str, Any] | None:
        """The object or list at an API path; None where it does not exist or we may not see it."""
        return self._call("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        return self._call("POST", path, body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any] | None:
        answer = self.api.request(method, path, body)
        if answer.status == 401:
            raise InputError(f"the API server {self.host} does not know us; log in again, then `kubectl auth whoami`")
        if answer.status == 403:
            self.forbidden.append(path)
        return answer.body if answer.ok else None

    def items(self, path: str) -> list[dict[str, Any]]:
        return list((self.get(path) or {}).get("items") or [])
