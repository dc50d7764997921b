"""The report's curves of compute: their points, and that a run without them draws none."""

from __future__ import annotations

from pathlib import Path

from components.runtime.stage import write_json
from pipelines.report import compute_figures, validation_by_rollouts
from pipelines.watch import RunWatch


def test_validation_stands_at_the_rollouts_trained_until_then() -> None:
    curves = {
        "rl/trained_rollouts": [(1, 24.0), (2, 0.0), (3, 12.0), (4, 24.0)],
        "rl/validation_pass_at_1": [(0, 0.25), (2, 0.5), (4, 0.75)],
    }
    assert validation_by_rollouts(curves) == [(0, 0.25), (24.0, 0.5), (60.0, 0.75)]
    assert validation_by_rollouts({"rl/validation_pass_at_1": [(0, 0.25)]}) == []


def test_curves_are_drawn_from_the_evaluation(tmp_path: Path) -> None:
    write_json(tmp_path / "configurations.json", {})
    watch = RunWatch(tmp_path)
    assert compute_figures(watch, {}) == []
    rate = {"mean": 0.375, "low": 0.25, "high": 0.5, "n": 8}
    curve = {"before": [{"x": 1, "rate": rate}, {"x": 8, "rate": rate | {"mean": 0.875}}]}
    figures = compute_figures(watch, {"compute": {"budget": curve, "pass_at_k": curve}})
    assert len(figures) == 2
    assert all("<svg" in figure and "from 0.375 at 1 to 0.875 at 8" in figure for figure in figures)
