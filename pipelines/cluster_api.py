"""Reading from a Kubernetes API server, with the rights of whoever asks: plain paths and plain JSON."""

from __future__ import annotations

import json
from typing import Any

from components.runtime.errors import InputError

SECONDS = 10  # to wait for an answer


class Cluster:
    """The read calls that the checks make. Raises InputError where the API server does not answer."""

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
        self.forbidden: list[str] = []

    def get(self, path: str) -> dict[str, Any] | None:
        """The object or list at an API path; None where it does not exist or we may not see it."""
        return self._call("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        return self._call("POST", path, body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any] | None:
        import urllib3
        from kubernetes.client.exceptions import ApiException

        try:
            answer = self.api.call_api(
                path,
                method,
                header_params={"Accept": "application/json", "Content-Type": "application/json"},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=SECONDS,
            )[0]
            return dict(json.loads(answer.data))
        except ApiException as error:
            if error.status == 404:
                return None
            if error.status == 403:
                self.forbidden.append(path)
                return None
            if error.status == 401:
                raise InputError(
                    f"the API server {self.host} does not know us; log in again, then `kubectl auth whoami`"
                ) from error
            return None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise InputError(
                f"the API server {self.host} cannot be reached ({type(error).__name__}); try `kubectl cluster-info`"
            ) from error

    def items(self, path: str) -> list[dict[str, Any]]:
        return list((self.get(path) or {}).get("items") or [])
