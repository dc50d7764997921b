"""A Prometheus endpoint of a running stage: how far it is, and the newest point of each of its curves.

It listens where SPARSELINE_METRICS_PORT says, and nowhere without it. A scrape reads what the stage noted anyway, so
that the endpoint costs training nothing between scrapes.

    curl http://localhost:9464/metrics
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from components.runtime.errors import InputError
from components.runtime.progress import Progress
from components.runtime.tracking import Tracker

if TYPE_CHECKING:
    from prometheus_client import Metric


class StageCollector:
    """What one stage shows, labelled with its run and its name."""

    def __init__(self, run_id: str, stage: str, progress: Progress, tracker: Tracker) -> None:
        self.labels = {"run": run_id, "stage": stage}
        self.progress, self.tracker = progress, tracker

    def collect(self) -> Iterable[Metric]:
        """Called at each scrape, by a thread of the endpoint."""
        from prometheus_client.core import GaugeMetricFamily

        names = list(self.labels)
        own = list(self.labels.values())
        phase, step, total = self.progress.place()
        done = GaugeMetricFamily("sparseline_stage_step", "steps done in this phase", labels=[*names, "phase"])
        done.add_metric([*own, phase], step)
        yield done
        whole = GaugeMetricFamily("sparseline_stage_steps", "steps of this phase in all", labels=[*names, "phase"])
        whole.add_metric([*own, phase], total)
        yield whole
        curves = GaugeMetricFamily("sparseline_curve", "newest point of a curve", labels=[*names, "name"])
        for name, value in sorted(self.tracker.newest().items()):
            curves.add_metric([*own, name], value)
        yield curves


@contextmanager
def exported(port: int, run_id: str, stage: str, progress: Progress, tracker: Tracker) -> Iterator[None]:
    """Serve the stage's numbers at this port of every address; nothing for port 0.

    Raises InputError when the port is taken.
    """
    if not port:
        yield
        return
    from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    registry.register(StageCollector(run_id, stage, progress, tracker))
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        raise InputError(f"port {port} (SPARSELINE_METRICS_PORT) cannot be used: {error.strerror}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
