"""Promotion and rollback aliases in a real MLflow registry on SQLite."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.evaluation import promotion
from components.evaluation.gate import VERDICT_FILE
from components.runtime.contracts import GateVerdict, Pointer
from components.runtime.errors import InputError
from components.runtime.object_store import open_store
from components.runtime.progress import Progress
from components.runtime.registry import Registry
from components.runtime.settings import Settings
from components.runtime.stage import StageContext
from components.runtime.tracking import Tracker


def checkpoint(letter: str) -> Pointer:
    return Pointer(kind="checkpoint", uri=f"file:///{letter}", sha256=letter * 64)


def verdict_pointer(context: StageContext, verdict: str, candidate: Pointer, baseline: Pointer) -> Pointer:
    directory = context.work_dir / f"verdict-{verdict}-{candidate.sha256[0]}"
    directory.mkdir()
    record = GateVerdict.model_validate({"verdict": verdict, "candidate": candidate, "baseline": baseline, "rules": []})
    (directory / VERDICT_FILE).write_text(record.model_dump_json())
    return context.publish("gate", directory)


def test_aliases_move_once_and_the_old_champion_stays_reachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSELINE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    work = tmp_path / "work"
    work.mkdir()
    context = StageContext("promotion", "test", 0, work, open_store(str(tmp_path / "store")), Tracker(), Progress())
    registry = Registry(Settings.read())
    a, b = checkpoint("a"), checkpoint("b")

    def promote(verdict: str, candidate: Pointer, baseline: Pointer) -> dict:
        inputs = {"verdict": verdict_pointer(context, verdict, candidate, baseline)}
        result = promotion.run(promotion.PromotionConfig(), context, inputs)
        assert result.outputs == {"champion": candidate}
        return result.summary

    assert registry.alias("champion") is None
    assert promote("promoted", a, checkpoint("0"))["moved"] is True
    assert registry.alias("previous") is None
    promote("promoted", b, a)
    champion, previous = registry.alias("champion"), registry.alias("previous")
    assert champion is not None
    assert previous is not None
    assert (champion.pointer, previous.pointer) == (b, a)

    assert promote("unchanged", b, b)["moved"] is False
    assert (registry.alias("champion"), registry.alias("previous")) == (champion, previous)

    with pytest.raises(InputError, match=r"version 2 .* compared the candidate with file:///a .*champion_version"):
        promote("promoted", checkpoint("c"), a)  # b was faster, or the gate was never told of b
    assert (registry.alias("champion"), registry.alias("previous")) == (champion, previous)

    rejected = verdict_pointer(context, "rejected", checkpoint("c"), b)
    with pytest.raises(ValueError, match="never promoted"):
        promotion.run(promotion.PromotionConfig(), context, {"verdict": rejected})
    assert registry.alias("champion") == champion
