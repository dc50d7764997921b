"""Deletes RayJobs that nobody watches any more: the chart runs one of these, for the namespaces of all teams.

    python -m components.runtime.ray_reaper --namespace TEAM [--namespace TEAM ...]
    python -m components.runtime.ray_reaper --alive      # for a liveness probe: exit 0 while the loop turns

A RayJob is deleted when the pod that it belongs to is gone or has ended for `--grace` seconds (a pod that Kubeflow
starts in its place may take it over until then), or when its watcher's lease was not renewed for `--silence` seconds
though the pod is said to run: its node is lost, or its process hangs.

Time is counted in looks that the API server answered, never by comparing clocks: no outage of the server, of this
process or of a clock makes a RayJob older.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.runtime import errors
from components.runtime.errors import InputError
from components.runtime.kubernetes_api import Answer, KubernetesApi, Unreachable
from components.runtime.ray_manifest import API, LEASES, SELECTOR

MARK = Path("/tmp/ray-reaper")  # touched at every turn of the loop
STUCK_SECONDS = 120.0  # of the mark, after which the loop does not turn any more
ENDED = ("Succeeded", "Failed")


@dataclass
class Seen:
    """What is remembered of a RayJob between two looks. `renewed`: its watcher's last sign; `orphan`, `still`: for how
    many looks it has had no watcher, and no new sign."""

    owner: str
    renewed: str
    orphan: int = 0
    still: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m components.runtime.ray_reaper", description=__doc__)
    parser.add_argument("--namespace", action="append", default=[], help="a team's namespace; once or more")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds without a watcher")
    parser.add_argument("--silence", type=float, default=180.0, help="seconds without a sign of the watcher")
    parser.add_argument("--alive", action="store_true", help="tell whether the loop turns, and exit")
    options = parser.parse_args()
    if options.alive:
        sys.exit(0 if MARK.exists() and time.time() - MARK.stat().st_mtime < STUCK_SECONDS else 1)
    if not options.namespace:
        parser.error("--namespace is missing")
    try:
        reap(KubernetesApi(), options.namespace, options.interval, options.grace, options.silence)
    except InputError as error:
        print(f"ray_reaper: {error}", file=sys.stderr)
        sys.exit(errors.EXIT_INPUT)
    except KeyboardInterrupt:
        sys.exit(errors.EXIT_INTERRUPTED)


def reap(api: KubernetesApi, namespaces: list[str], interval: float, grace: float, silence: float) -> None:
    """Look at every namespace, over and over, until somebody ends this process."""
    seen: dict[str, Seen] = {}
    told: dict[str, str] = {}
    while True:
        pause = interval
        known: dict[str, Seen] = {}
        for namespace in namespaces:
            try:
                answer = look(api, namespace, seen, known, max(1, round(grace / interval)), round(silence / interval))
                problem = "" if answer.ok else f"cannot list rayjobs in {namespace}: {answer.told()}"
                pause = max(pause, min(answer.retry_after, 60.0))
            except Unreachable as error:
                problem = str(error)
            if problem:  # what was counted of this namespace stays as it is
                known |= {key: value for key, value in seen.items() if key.startswith(f"{namespace}/")}
            if problem != told.get(namespace, ""):
                print(problem or f"{namespace} can be seen again", flush=True)
            told[namespace] = problem
        seen = known
        MARK.touch()
        time.sleep(pause)


def look(
    api: KubernetesApi, namespace: str, before: dict[str, Seen], known: dict[str, Seen], grace: int, silence: int
) -> Answer:
    """One look at the RayJobs of a namespace; `known` gets what is to be remembered. Deletes what nobody watches.

    `grace`, `silence`: in looks. Raises Unreachable.
    """
    answer = api.listed(f"{API}/namespaces/{namespace}/rayjobs", SELECTOR)
    for job in answer.body.get("items", []) if answer.ok else []:
        metadata = job["metadata"]
        if "deletionTimestamp" in metadata:
            continue
        key = f"{namespace}/{metadata['uid']}"
        found = _seen(metadata, _renewed(api, namespace, metadata["name"]), before.get(key))
        if _watched(api, namespace, metadata):
            found.orphan = 0
        else:
            found.orphan += 1
        known[key] = found
        if found.orphan >= grace:
            _delete(api, namespace, metadata, "its watcher is gone")
        elif found.still >= silence:
            _delete(api, namespace, metadata, f"its watcher has given no sign since {found.renewed or 'it was made'}")
    return answer


def _renewed(api: KubernetesApi, namespace: str, name: str) -> str | None:
    """When the watcher's lease was renewed, as the watcher wrote it; None where that cannot be known now."""
    answer = api.request("GET", f"{LEASES}/namespaces/{namespace}/leases/{name}")
    if answer.ok:
        return str((answer.body.get("spec") or {}).get("renewTime", ""))
    return "" if answer.missing else None


def _seen(metadata: dict[str, Any], renewed: str | None, before: Seen | None) -> Seen:
    owner = _owner(metadata).get("uid", "")
    if before is None or before.owner != owner:  # a new watcher has all its time before it
        return Seen(owner, renewed or "")
    if renewed is None:
        return Seen(owner, before.renewed, before.orphan, before.still)
    return Seen(owner, renewed, before.orphan, before.still + 1 if before.renewed == renewed else 0)


def _owner(metadata: dict[str, Any]) -> dict[str, Any]:
    return next((one for one in metadata.get("ownerReferences") or [] if one["kind"] == "Pod"), {})


def _watched(api: KubernetesApi, namespace: str, metadata: dict[str, Any]) -> bool:
    """Whether the pod of its watcher is there and has not ended. What cannot be known counts as watched."""
    owner = _owner(metadata)
    if not owner:
        return False
    answer = api.request("GET", f"/api/v1/namespaces/{namespace}/pods/{owner['name']}")
    if answer.missing:
        return False
    if not answer.ok:
        return True
    pod = answer.body
    return pod["metadata"]["uid"] == owner["uid"] and (pod.get("status") or {}).get("phase") not in ENDED


def _delete(api: KubernetesApi, namespace: str, metadata: dict[str, Any], why: str) -> None:
    """Delete exactly what was looked at: whoever takes it over meanwhile changes it, and then the next look decides."""
    preconditions = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
    options = {"propagationPolicy": "Foreground", "preconditions": preconditions}
    answer = api.request("DELETE", f"{API}/namespaces/{namespace}/rayjobs/{metadata['name']}", options)
    if answer.ok:
        print(f"deleted RayJob {namespace}/{metadata['name']}: {why}", flush=True)
    elif not answer.missing and answer.status != 409:
        print(f"cannot delete RayJob {namespace}/{metadata['name']}: {answer.told()}", flush=True)


if __name__ == "__main__":
    main()
