"""The life of one RayJob: made or taken over, followed until it ends, removed.

It is looked at every few seconds by its name. What a look meets (no API server, throttling, a refusal right after the
server's start, another writer) is met again by the next look; only what stands for long ends the watching. The log and
the result come from the store, so that none of it is lost meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

from components.runtime import ray_files
from components.runtime.errors import InputError, RemoteFault
from components.runtime.kubernetes_api import MERGE_PATCH, Answer, KubernetesApi, Unreachable
from components.runtime.object_store import ObjectStore, key_of
from components.runtime.progress import Progress
from components.runtime.ray_block import RayBlock
from components.runtime.ray_files import LogReader, Request, Result
from components.runtime.ray_manifest import API, DIGEST, LEASES, REQUEST, Watcher, job_name, lease, ray_job

LOOK_SECONDS = 3.0  # between two looks at the RayJob and at its log
HEARTBEAT_SECONDS = 15.0  # between two signs that its watcher lives
AWAY_SECONDS = 1800.0  # without a usable answer of the API server, after which the watcher gives up
REFUSED_SECONDS = 120.0  # of refusals (401, 403): right after its start an API server may refuse what it will allow
MAKE_SECONDS = 600.0  # to make it, also where one of a try before has to go away first
AGREE_SECONDS = 60.0  # that KubeRay has to see the end that the store tells of
WAITS_SECONDS = 600.0  # after which a RayJob that does not start is told about, once
ENDED = ("Complete", "Failed", "ValidationFailed")


class _Lost(RemoteFault):
    """The RayJob is no longer this watcher's: somebody deleted it, or another watcher took it over."""


def refused(answer: Answer, what: str, namespace: str) -> str:
    """What to do about a call that the API server did not allow."""
    if answer.status == 403:
        return (
            f"the service account of this pod may not {what} in {namespace} ({answer.told()}); set "
            "distributed.enabled: true in the chart's values, and the team's pipelineServiceAccount"
        )
    return f"cannot {what} in {namespace}: {answer.told()}"


class Watch:
    """The RayJob of one stage of one run."""

    def __init__(
        self,
        api: KubernetesApi,
        watcher: Watcher,
        store: ObjectStore,
        progress: Progress,
        request: Request,
        block: RayBlock,
    ) -> None:
        self.api, self.watcher, self.store, self.progress = api, watcher, store, progress
        self.request, self.block = request, block
        self.name = job_name(request.run_id, request.stage)
        self.list_path = f"{API}/namespaces/{watcher.namespace}/rayjobs"
        self.path = f"{self.list_path}/{self.name}"
        self.uri = ""  # of the request that the RayJob works on
        self._told, self._ran = "", False
        self._beat_at = self._began = float("-inf")

    # Making it, or taking over what is there.

    def make(self) -> None:
        """Raises InputError where we may not or the cluster knows no RayJob, RemoteFault where an old one stays."""
        end = time.monotonic() + MAKE_SECONDS
        own = ""
        while time.monotonic() < end:
            answer = self.api.patient("GET", self.path, seconds=MAKE_SECONDS)
            if answer.ok:
                if self._take_over(answer.body):
                    return
                time.sleep(1)  # it is on its way out
                continue
            if not answer.missing:
                raise InputError(self._no_kuberay(answer, "get rayjobs"))
            if not own:
                ray_files.remove(self.store, ray_files.folder(self.request.run_id, self.request.stage))
                own = ray_files.write_request(self.store, self.request)
            wanted = ray_job(
                self.watcher,
                self.block,
                self.request.run_id,
                self.request.stage,
                own,
                self.request.digest(),
                os.environ,
            )
            answer = self.api.patient("POST", self.list_path, wanted, seconds=MAKE_SECONDS)
            if answer.ok:
                self.uri = own
                queue = f", in the queue {self.block.queue}" if self.block.queue else ""
                self.progress.note(f"RayJob {self.name} made{queue}")
                return
            if answer.status != 409:  # then there is one, perhaps by our own call whose answer was lost: look again
                raise InputError(self._no_kuberay(answer, "create rayjobs"))
        raise RemoteFault(
            f"the RayJob {self.name} of a try before this one does not go away; is KubeRay's operator running? "
            f"kubectl -n {self.watcher.namespace} describe rayjob {self.name}"
        )

    def _no_kuberay(self, answer: Answer, what: str) -> str:
        if answer.status == 404:
            return (
                "the cluster knows no RayJob; an administrator: helm install kuberay-operator "
                "kuberay/kuberay-operator --version 1.5.0 -n kuberay-operator --create-namespace"
            )
        return refused(answer, what, self.watcher.namespace)

    def _take_over(self, found: Mapping[str, Any]) -> bool:
        """Whether what is there is ours to watch from now on. What is not is deleted, if nobody did yet."""
        metadata = found["metadata"]
        notes = metadata.get("annotations") or {}
        uri = notes.get(REQUEST, "")
        if "deletionTimestamp" in metadata:
            return False
        same = notes.get(DIGEST) == self.request.digest()
        if same and (not _ended(found) or self._succeeded(uri)):
            change = {"metadata": {"ownerReferences": [self.watcher.reference()]}}
            answer = self.api.patient("PATCH", self.path, change, MERGE_PATCH, seconds=MAKE_SECONDS)
            if answer.ok and answer.body["metadata"]["uid"] == metadata["uid"]:
                self.uri = uri
                self.progress.note(f"RayJob {self.name} is there already: goes on watching it")
                return True
            if not answer.ok and not answer.missing:
                raise InputError(refused(answer, "patch rayjobs", self.watcher.namespace))
            return False
        self._delete(metadata["uid"], MAKE_SECONDS)
        return False

    def _succeeded(self, uri: str) -> bool:
        result = ray_files.read_result(self.store, uri)
        return result is not None and result.record is not None

    # Following it.

    def follow(self) -> Result:
        """The result of the stage, however long that takes; its log is printed meanwhile.

        Raises RemoteFault when the RayJob ended without one, is not ours any more, or cannot be seen for very long.
        """
        log = LogReader(self.store, self.uri, lambda line: print(line, flush=True))
        self._began = answered = time.monotonic()
        seen: float | None = None  # since when there is a result
        while True:
            answer = self._look()
            if answer is not None and answer.missing:
                return self._after_deletion(log)
            job = answer.body if answer is not None and answer.ok else None
            if job is not None:
                answered = time.monotonic()
                self._tell(job)
            self._give_up(answer, time.monotonic() - answered)
            asked, result = self._read(log)
            if job is not None and _taken_down(job):
                # What fails while its pods are taken away says nothing of the stage: the next attempt does.
                result = result if result is not None and result.record is not None else None
            seen = None if result is None else seen or time.monotonic()
            late = seen is not None and time.monotonic() - seen > AGREE_SECONDS
            if result is not None and (_ended(job) or (late and (job is not None or result.record is not None))):
                return result
            if result is None and asked and _ended(job):
                assert job is not None
                raise RemoteFault(self._without_result(job["status"]))
            time.sleep(LOOK_SECONDS)

    def _look(self) -> Answer | None:
        """The RayJob, and now and then the sign that we watch it. None without an answer."""
        try:
            answer = self.api.request("GET", self.path)
            if answer.ok and time.monotonic() - self._beat_at >= HEARTBEAT_SECONDS and self._is_ours(answer.body):
                self._beat(answer.body)
            return answer
        except Unreachable:
            return None

    def _beat(self, job: Mapping[str, Any]) -> None:
        """Renew the lease, or make it. Whatever else the server answers: the next look tries again."""
        leases = f"{LEASES}/namespaces/{self.watcher.namespace}/leases"
        sign = lease(self.watcher, job)
        answer = self.api.request("PATCH", f"{leases}/{self.name}", sign, MERGE_PATCH)
        if answer.missing:
            answer = self.api.request("POST", leases, sign)
        if answer.ok:
            self._beat_at = time.monotonic()

    def _is_ours(self, job: Mapping[str, Any]) -> bool:
        owners = [one.get("uid") for one in job["metadata"].get("ownerReferences") or []]
        return self.watcher.uid in owners

    def _give_up(self, answer: Answer | None, seconds: float) -> None:
        if answer is not None and answer.ok:
            return
        refused = answer is not None and answer.status in (401, 403)
        if seconds > (REFUSED_SECONDS if refused else AWAY_SECONDS):
            told = answer.told() if answer is not None else "nothing"
            raise RemoteFault(f"the API server has answered {told} for {seconds:.0f} s: {self.name} cannot be watched")
        if self._told != "away" and answer is None:
            self._told = "away"
            self.progress.note("the API server does not answer; the RayJob goes on, and is looked at again")
        if answer is not None and answer.retry_after:
            time.sleep(min(answer.retry_after, AGREE_SECONDS))

    def _tell(self, job: Mapping[str, Any]) -> None:
        """One line whenever the RayJob is in another state. Raises _Lost when it is another watcher's."""
        if not self._is_ours(job):
            raise _Lost(f"another pod watches the RayJob {self.name} now: this one leaves it alone")
        state = job.get("status", {}).get("jobDeploymentStatus")
        self._ran = self._ran or state == "Running"
        told = _state(job, self.block.queue, self._ran)
        if told != self._told:
            self._told = told
            self.progress.note(f"RayJob {self.name}: {told}")
        if state == "Initializing" and time.monotonic() - self._began > WAITS_SECONDS:
            self._began = float("inf")
            look = f"kubectl -n {self.watcher.namespace} describe pods -l {ray_pods(job)}"
            self.progress.note(f"its pods are not all ready after {WAITS_SECONDS / 60:.0f} minutes; {look}")

    def _read(self, log: LogReader) -> tuple[bool, Result | None]:
        """Hands on the log. Whether the store answered, and the result if there is one."""
        try:
            log.pump()
            result = ray_files.read_result(self.store, self.uri)
            if result is not None:
                log.pump()  # what was written between the two
        except InputError:  # the store is away: it is asked again at the next look
            return False, None
        return True, result

    def _after_deletion(self, log: LogReader) -> Result:
        _, result = self._read(log)
        if result is not None and result.record is not None:
            return result
        raise _Lost(f"the RayJob {self.name} was deleted by somebody else before its stage had ended")

    def _without_result(self, status: Mapping[str, Any]) -> str:
        reason = f"{status.get('reason', '')}: {status.get('message', '')}".strip(": ")
        return f"the RayJob {self.name} ended as {status.get('jobDeploymentStatus')} without a result ({reason})"

    # Removing it.

    def remove(self, seconds: float) -> None:
        """Delete the RayJob with all that belongs to it, and what lies in the store for it.

        Not where another watcher has taken it over. Nothing is raised: the reaper does what cannot be done here.
        """
        end = time.monotonic() + seconds
        with _undisturbed():
            try:
                answer = self.api.patient("GET", self.path, seconds=seconds)
                if answer.ok and not self._is_ours(answer.body):
                    return
                if answer.ok:
                    self._delete(answer.body["metadata"]["uid"], end - time.monotonic())
                while answer.ok:
                    if time.monotonic() > end:
                        raise InputError("its removal has not ended yet")
                    time.sleep(0.5)
                    answer = self.api.patient("GET", self.path, seconds=max(1.0, end - time.monotonic()))
            except InputError as error:
                self.progress.note(f"RayJob {self.name}: {error}; the reaper sees to it")
            if self.uri:
                with contextlib.suppress(InputError):
                    ray_files.remove(self.store, key_of(self.store, self.uri))

    def _delete(self, uid: str, seconds: float) -> None:
        """Foreground: the RayJob is gone when its cluster and pods are. Only this one, not a later one of its name."""
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        answer = self.api.patient("DELETE", self.path, options, seconds=max(1.0, seconds))
        if not (answer.ok or answer.missing or answer.status == 409):
            raise InputError(refused(answer, "delete rayjobs", self.watcher.namespace))


def ray_pods(job: Mapping[str, Any]) -> str:
    """The label selector of a RayJob's pods."""
    return shlex.quote(f"ray.io/cluster={job.get('status', {}).get('rayClusterName', '')}")


def _ended(job: Mapping[str, Any] | None) -> bool:
    return job is not None and job.get("status", {}).get("jobDeploymentStatus") in ENDED


def _taken_down(job: Mapping[str, Any]) -> bool:
    """Whether its pods are being taken away, or are not there again yet."""
    state = job.get("status", {}).get("jobDeploymentStatus", "")
    return bool(job["spec"].get("suspend")) or state in ("", "Suspending", "Suspended", "Initializing")


def _state(job: Mapping[str, Any], queue: str, ran: bool) -> str:
    status = job.get("status", {})
    state, message = status.get("jobDeploymentStatus", ""), status.get("message", "")
    if job["spec"].get("suspend"):
        waits = f"waits in the queue {queue}" if queue else "is suspended"
        return f"{waits}; once admitted again, the stage goes on from its last state" if ran else waits
    if state in ("Failed", "ValidationFailed"):
        return f"{state} ({status.get('reason', '')}) {message[-500:]}".strip()
    return {"": "made", "Initializing": "its pods start"}.get(state, state)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second SIGTERM does not end what cleans up after the first."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
