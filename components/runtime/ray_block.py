"""What a distributed stage asks of the cluster: the block that its task carries as the variable SPARSELINE_RAY_JOB."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

VARIABLE = "SPARSELINE_RAY_JOB"
# Where the task's own pod says who it is.
POD_NAME, POD_UID, POD_NAMESPACE = "SPARSELINE_POD_NAME", "SPARSELINE_POD_UID", "SPARSELINE_POD_NAMESPACE"


class Toleration(BaseModel):
    """A toleration, as in a pod."""

    model_config = ConfigDict(extra="forbid")

    key: str
    operator: str = Field(default="Exists", pattern="^(Exists|Equal)$")
    value: str | None = None
    effect: str | None = Field(default=None, pattern="^(NoSchedule|PreferNoSchedule|NoExecute)$")


class PodResources(BaseModel):
    """What one pod gets, and where it may run."""

    model_config = ConfigDict(extra="forbid")

    cpu: str = Field(default="2", pattern=r"^[0-9]+(\.[0-9]+)?m?$", description="CPUs, requested and at most")
    memory: str = Field(default="4Gi", pattern=r"^[0-9]+(Mi|Gi|Ti)$", description="memory, requested and at most")
    gpus: int = Field(default=0, ge=0, description="GPUs")
    gpu_resource: str = Field(default="nvidia.com/gpu", description="the name under which nodes offer GPUs")
    scratch: str = Field(default="10Gi", pattern=r"^[0-9]+(Mi|Gi|Ti)$", description="room in /tmp")
    node_selector: dict[str, str] = Field(default_factory=dict, description="labels that the node must have")
    tolerations: list[Toleration] = Field(default_factory=list)


class RayWorkers(PodResources):
    """The pods of a Ray cluster beside the one in which the stage itself runs."""

    workers: int = Field(ge=0, description="pods; 0: the stage's own pod is the whole Ray cluster")


class RayBlock(BaseModel):
    """A RayJob: the pod of the stage itself (Ray's head), and the workers."""

    model_config = ConfigDict(extra="forbid")

    head: PodResources
    workers: RayWorkers
    queue: str = Field(default="", description="Kueue LocalQueue; empty: none")
    timeout: int = Field(ge=60, description="seconds after which the RayJob is ended")
