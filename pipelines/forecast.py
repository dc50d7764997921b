"""What a run on a cluster will cost, from the runs of the same pipeline that succeeded there before."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pipelines.catalogue import Pipeline
from pipelines.display import duration
from pipelines.kfp_server import Server, pages, requests_of, stage_tasks
from pipelines.profiles import Profile

if TYPE_CHECKING:
    from pipelines.cluster import TaskResources

LOOKED_AT = 5  # the newest runs that succeeded
CANDIDATES = 200  # runs that are looked through for them


def succeeded(server: Server, pipeline_id: str) -> list[Any]:
    """The newest runs of the pipeline that succeeded, with their tasks; none for a pipeline that never did."""
    with requests_of("list its runs"):
        listed = pages(server.client.list_runs, "runs", sort_by="created_at desc", namespace=server.namespace or None)
        found = [
            run.run_id
            for run in islice(listed, CANDIDATES)
            if run.state == "SUCCEEDED"
            and run.pipeline_version_reference
            and run.pipeline_version_reference.pipeline_id == pipeline_id
        ]
        return [server.client.get_run(run_id) for run_id in found[:LOOKED_AT]]


def stage_seconds(run: Any) -> dict[str, float]:
    """How long each stage of a run took, by the server's clock."""
    return {
        name: max(0.0, (task.end_time - task.start_time).total_seconds())
        for name, task in stage_tasks(run)
        if task.start_time and task.end_time
    }


def forecast(pipeline: Pipeline, profile: Profile, before: list[Any], console: Console) -> None:
    """Print hours and GPU hours by stage: the longest of the last runs, and what the time limits allow at most.

    `before`: those runs (`succeeded`). The longest, because a stage whose result came from KFP's cache took no time.
    """
    from pipelines.cluster import task_resources  # with kfp-kubernetes, which an image does not have

    resources = task_resources(profile.cluster)
    past = [stage_seconds(run) for run in before]
    made = Table(show_edge=False)
    for column in ("stage", "GPUs", "CPUs", "expected", "GPU hours", "at most", "GPU hours at most"):
        made.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for name in pipeline.stages:
        made.add_row(*_row(name, resources[name], [run[name] for run in past if name in run]))
    console.print(made)
    gpus = {name: resources[name].all_gpus for name in pipeline.stages}
    expected = sum(max((run[name] for run in past if name in run), default=0.0) * gpus[name] for name in gpus) / 3600
    most = sum(resources[name].timeout * gpus[name] for name in gpus) / 3600
    basis = f"from {len(past)} runs that succeeded" if past else "no run of this pipeline has succeeded here yet"
    told = f"forecast {expected:.1f} GPU hours ({basis}), at most {most:.1f}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)


def _row(name: str, wanted: TaskResources, seconds: list[float]) -> tuple[str, ...]:
    expected = max(seconds, default=None)
    return (
        name,
        str(wanted.all_gpus),
        wanted.cpu,
        duration(expected) if expected is not None else "unknown",
        f"{expected * wanted.all_gpus / 3600:.1f}" if expected is not None else "unknown",
        duration(wanted.timeout),
        f"{wanted.timeout * wanted.all_gpus / 3600:.1f}",
    )
