"""What roles grant, and what the audit log says was used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.cluster.control_plane import ControlPlane


class Right(NamedTuple):
    """A verb on a resource; the resource with its subresource, `pods/log`."""

    group: str
    resource: str
    verb: str


def granted(cluster: ControlPlane, namespace: str, *roles: str) -> set[Right]:
    """All that these roles of a namespace grant."""
    found = set()
    for role in roles:
        rules = json.loads(cluster.kubectl("get", "role", role, f"--namespace={namespace}", "--output=json"))["rules"]
        for rule in rules:
            found |= {
                Right(group, resource, verb)
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
            }
    return found


def events(cluster: ControlPlane, user: str) -> Iterator[dict[str, Any]]:
    """What the API server has audited of a user, or of whoever acted in the user's name."""
    with cluster.audit_log.open() as lines:
        for line in lines:
            event = json.loads(line)
            if event.get("impersonatedUser", event["user"]).get("username") == user and "objectRef" in event:
                yield event


def used(cluster: ControlPlane, user: str, *, decision: str = "allow") -> set[Right]:
    """The rights that a user made use of; with `decision="forbid"` those that the user lacked.

    What Kubernetes itself grants to everybody (to ask about oneself, to discover the API) is left out.
    """
    found = set()
    for event in events(cluster, user):
        about = event["objectRef"]
        if about.get("apiGroup") == "authorization.k8s.io":
            continue
        resource = "/".join(part for part in (about.get("resource", ""), about.get("subresource", "")) if part)
        if event.get("annotations", {}).get("authorization.k8s.io/decision") == decision:
            found.add(Right(about.get("apiGroup", ""), resource, event["verb"]))
    return found
