"""What a task needs on a cluster, and the pipelines as files for one.

    sparseline compile --all --output manifests/pipelines

For every pipeline and profile: `PIPELINE/PROFILE/pipeline.yaml`, to upload in the KFP UI, and `resources.yaml` beside
it, the same as Pipeline and PipelineVersion for a KFP that keeps pipelines as custom resources. Versions cannot be
changed there, so a version is named by the hash of its content.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, kubernetes
from kfp.compiler.compiler_utils import KubernetesManifestOptions
from pydantic import Field, ValidationError

from components.runtime import ray_block
from components.runtime.errors import InputError
from components.runtime.image import IMAGE
from components.runtime.ray_block import PodResources, RayBlock, RayWorkers
from pipelines import catalogue, profiles
from pipelines.catalogue import Pipeline
from pipelines.stages import STAGES

USER = 10001  # the numeric user of the images
SETTINGS, STORE_SECRET = "sparseline-settings", "sparseline-store"  # in the namespace in which a pipeline runs
SETTING_NAMES = (
    "SPARSELINE_STORE", "SPARSELINE_S3_ENDPOINT", "AWS_REGION", "MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY",
    "DO_NOT_TRACK", "RAY_USAGE_STATS_ENABLED",
)  # fmt: skip
WATCHER_CPU, WATCHER_MEMORY, WATCHER_SCRATCH = "500m", "1Gi", "1Gi"  # of the pod that watches a RayJob
METRICS_PORT = "9464"  # where a running stage shows its curves to Prometheus
PROXY_NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


class TaskResources(PodResources):
    """What one task asks of the cluster."""

    queue: str = Field(default="", description="Kueue LocalQueue of the pod, or of the RayJob; empty: none")
    retries: int = Field(default=0, ge=0, description="how often a failed task is tried again")
    timeout: int = Field(default=86400, ge=60, description="seconds after which the task is ended")
    ray: RayWorkers | None = Field(
        default=None,
        description="runs the stage as a RayJob: its process with the resources above, these workers beside it; the "
        "task's pod then only watches",
    )

    @property
    def all_gpus(self) -> int:
        """GPUs of the task, workers included."""
        return self.gpus + (self.ray.workers * self.ray.gpus if self.ray else 0)


def task_resources(cluster: dict[str, dict[str, Any]]) -> dict[str, TaskResources]:
    """The resources of every stage: `default`, and over it what stands under the stage's name.

    Raises InputError that names every wrong key or value.
    """
    unknown = set(cluster) - {"default", *STAGES}
    if unknown:
        raise InputError(f"cluster: unknown stage {', '.join(sorted(unknown))}; there are default, {', '.join(STAGES)}")
    found = {}
    for name in STAGES:
        try:
            found[name] = TaskResources.model_validate({**cluster.get("default", {}), **cluster.get(name, {})})
        except ValidationError as error:
            problems = "\n".join(f"  {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise InputError(f"the cluster settings of {name} are wrong:\n{problems}") from error
    return found


def prepare(resources: dict[str, TaskResources], model: str) -> Callable[[str, Any], None]:
    """A function that gives a task of the pipeline its resources, its surroundings and its security context."""

    def give(stage: str, task: Any) -> None:
        wanted = resources[stage]
        pod = _watcher(wanted) if wanted.ray else wanted
        task.set_cpu_request(pod.cpu).set_cpu_limit(pod.cpu)
        task.set_memory_request(pod.memory).set_memory_limit(pod.memory)
        if pod.gpus:
            task.set_accelerator_type(pod.gpu_resource).set_accelerator_limit(pod.gpus)
        if wanted.retries:
            task.set_retry(num_retries=wanted.retries, backoff_duration="30s", backoff_factor=2.0)
        if not re.search(r"@sha256:[0-9a-f]{64}$", IMAGE):
            task.set_caching_options(False)  # a tag does not tell which code made a cached result
        own = {
            "HOME": "/tmp",
            "SPARSELINE_RUNS": "/tmp/runs",
            "SPARSELINE_MODEL": model,
            "SPARSELINE_METRICS_PORT": METRICS_PORT,
            "SPARSELINE_LOG": "json",
        }
        if wanted.ray:
            own[ray_block.VARIABLE] = _ray_block(wanted, wanted.ray).model_dump_json(exclude_defaults=True)
        for name, value in own.items():
            task.set_env_variable(name, value)
        kubernetes.add_pod_annotation(task, "prometheus.io/scrape", "true")
        kubernetes.add_pod_annotation(task, "prometheus.io/port", METRICS_PORT)
        kubernetes.use_config_map_as_env(task, SETTINGS, {name: name for name in SETTING_NAMES})
        kubernetes.use_config_map_as_env(task, SETTINGS, {name: name for name in PROXY_NAMES}, optional=True)
        keys = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
        kubernetes.use_secret_as_env(task, STORE_SECRET, keys)
        # KFP labels every pod of a run with the run's id: all stages of a run share one.
        kubernetes.use_field_path_as_env(task, "SPARSELINE_RUN_ID", "metadata.labels['pipeline/runid']")
        if wanted.ray:
            # The RayJob belongs to this pod, and ends with it.
            kubernetes.use_field_path_as_env(task, ray_block.POD_NAME, "metadata.name")
            kubernetes.use_field_path_as_env(task, ray_block.POD_UID, "metadata.uid")
            kubernetes.use_field_path_as_env(task, ray_block.POD_NAMESPACE, "metadata.namespace")
        kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
        kubernetes.empty_dir_mount(task, "tmp", "/tmp", size_limit=pod.scratch)
        kubernetes.set_timeout(task, wanted.timeout)
        for key, value in pod.node_selector.items():
            kubernetes.add_node_selector(task, key, value)
        for one in pod.tolerations:
            kubernetes.add_toleration(task, one.key, one.operator, one.value, one.effect)
        if wanted.queue and not wanted.ray:  # the RayJob waits in the queue, and not who watches it
            kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", wanted.queue)

    return give


def _watcher(wanted: TaskResources) -> PodResources:
    """A pod that only watches needs little, and no node of the GPUs' kind; it may run where the stage may."""
    return PodResources(cpu=WATCHER_CPU, memory=WATCHER_MEMORY, scratch=WATCHER_SCRATCH, tolerations=wanted.tolerations)


def _ray_block(wanted: TaskResources, workers: RayWorkers) -> RayBlock:
    head = PodResources(**{name: getattr(wanted, name) for name in PodResources.model_fields})
    return RayBlock(head=head, workers=workers, queue=wanted.queue, timeout=wanted.timeout)


def without_versions(text: str) -> str:
    """The compiled text without the version of the compiler, which says nothing of the pipeline."""
    return re.sub(r"(?m)^(\s*)sdkVersion: .*\n", "", text)


def pipeline_name(pipeline: Pipeline, profile: str, *, rehearsal: bool = False) -> str:
    """The name of a pipeline in KFP."""
    return f"{catalogue.PREFIX}{pipeline.name}-{profile}" + ("-rehearsal" if rehearsal else "")


def version_name(name: str, compiled: Path) -> str:
    """The name of the version: the pipeline's, and the hash of what is in the file."""
    return f"{name}-{hashlib.sha256(without_versions(compiled.read_text()).encode()).hexdigest()[:12]}"


def display_name(name: str) -> str:
    """What a person reads: `Sparseline training, nano`."""
    _, pipeline, profile = name.split("-", 2)
    return f"Sparseline {pipeline}, {profile}"


def compile_profile(pipeline: Pipeline, profile: str, directory: Path, *, rehearsal: bool = False) -> None:
    """Write one pipeline with one profile, or with its rehearsal, into `directory`."""
    loaded = profiles.load(profile)
    if rehearsal:
        loaded = profiles.rehearsal(loaded)
    configurations = profiles.resolve(loaded)
    # On a cluster the image is the code.
    baked = {name: {"config": json.dumps(configurations[name], sort_keys=True), "code": IMAGE} for name in STAGES}
    function = pipeline.function(configurations, baked, prepare(task_resources(loaded.cluster), loaded.model))
    name = pipeline_name(pipeline, profile, rehearsal=rehearsal)
    directory.mkdir(parents=True, exist_ok=True)
    compiled = directory / "pipeline.yaml"
    compiler.Compiler().compile(function, str(compiled), pipeline_name=name)
    version = version_name(name, compiled)
    resources = directory / "resources.yaml"
    options = KubernetesManifestOptions(
        pipeline_name=name,
        pipeline_display_name=display_name(name),
        pipeline_version_name=version,
        pipeline_version_display_name=version,
        include_pipeline_manifest=True,
    )
    compiler.Compiler().compile(
        function,
        str(resources),
        pipeline_name=name,
        kubernetes_manifest_format=True,
        kubernetes_manifest_options=options,
    )


def compile_all(output: Path) -> list[Path]:
    """Write the pipelines of all profiles and a kustomization.yaml into `output`; what was there is replaced."""
    places = {
        f"{pipeline.name}/{profile}": (pipeline, profile)
        for pipeline in catalogue.PIPELINES.values()
        for profile in profiles.names()
    }
    for name in catalogue.PIPELINES:
        shutil.rmtree(output / name, ignore_errors=True)
    for place, (pipeline, profile) in places.items():
        compile_profile(pipeline, profile, output / place)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{place}/resources.yaml" for place in places],
    }
    (output / "kustomization.yaml").write_text(yaml.safe_dump(kustomization, sort_keys=False))
    return [output / place for place in places]
