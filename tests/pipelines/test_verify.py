"""`sparseline verify` on a whole bundle, and on bundles that somebody edited: each edit is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from components.evaluation import gate
from components.evaluation.compare import Bootstrap
from components.evaluation.measures import measure
from components.evaluation.play import Item, read_items, write_items
from components.evaluation.report import EvaluationReport
from components.runtime.contracts import Manifest, Pointer
from components.runtime.errors import InputError
from components.runtime.registry import CHAMPION, Registry
from components.runtime.settings import Settings
from model.config import ModelConfig
from model.transformer import Transformer
from pipelines.verify import checks_of, gate_config, verify
from tests.components.evaluation.test_evaluation_stage import TASKS, Stage
from tests.components.serving.served import WORDS, learn_by_heart, save_checkpoint

pytestmark = pytest.mark.slow


class Evidence:
    """A store with an evaluation and the gate's decision on it, and a way to put it back as it was."""

    def __init__(self, folder: Path) -> None:
        config = ModelConfig.preset("micro", vocab_size=len(WORDS))
        checkpoints = {
            "none": save_checkpoint(Transformer(config).initialise(5), folder / "none"),
            "half": save_checkpoint(learn_by_heart(TASKS[:3], steps=60), folder / "half"),
        }
        self.stage = Stage(folder, checkpoints)
        self.store, self.root, self.copy = self.stage.context.store, folder / "store", folder / "copy"
        self.evaluation, _ = self.stage.evaluate("none", "half")
        gate.run(gate.GateConfig(family_margin=0.1), self.stage.context, {"evaluation": self.evaluation})
        self.candidate = self.stage.pointers["half"]
        shutil.copytree(self.root, self.copy)

    def restore(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.copy, self.root)

    def file(self, pointer: Pointer, name: str) -> Path:
        return self.root / pointer.uri.removeprefix(self.store.uri).strip("/") / name

    def forge(self, edit: Callable[[EvaluationReport, list[Item]], tuple[EvaluationReport, list[Item]]]) -> None:
        """Publish an edited evaluation with right hashes, and a decision of the gate on it."""
        context = replace(self.stage.context, run_id="test-forged")
        directory = self.stage.context.work_dir / "forged"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self.stage.context.fetch(self.evaluation), directory)
        report, items = edit(EvaluationReport.read(directory), read_items(directory / "items.parquet"))
        report.write(directory)
        write_items(items, directory / "items.parquet")
        forged = context.publish("evaluation", directory)
        gate.run(gate.GateConfig(), context, {"evaluation": forged})

    def failures(self, sample: int = 6) -> dict[str, str]:
        found = list(checks_of(self.store, self.candidate, sample=sample, seed=1))
        return {one.name: one.detail for one in found if not one.holds}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return Evidence(tmp_path_factory.mktemp("evidence"))


@pytest.fixture
def evidence(whole: Evidence) -> Iterator[Evidence]:
    yield whole
    whole.restore()


def computed(report: EvaluationReport, items: list[Item]) -> EvaluationReport:
    """The report as an attentive forger would make it: all its statistics follow from the items."""
    bootstrap = Bootstrap(report.resamples, report.confidence, report.seed)
    return report.model_copy(update=dict(measure(items, bootstrap, report.separate)))


def change(items: list[Item], where: Callable[[Item], bool], **fields: object) -> tuple[list[Item], Item]:
    position = next(n for n, item in enumerate(items) if where(item))
    edited = replace(items[position], **fields)  # type: ignore[arg-type]
    return [*items[:position], edited, *items[position + 1 :]], edited


def is_main(item: Item) -> bool:
    return (item.player, item.measure, item.temperature) == ("after", "sampled", 1.0)


def test_a_whole_bundle_verifies(evidence: Evidence) -> None:
    found = list(checks_of(evidence.store, evidence.candidate, sample=20, seed=1))
    assert [one.name for one in found if not one.holds] == []
    details = {one.name: one.detail for one in found}
    count = len(read_items(evidence.stage.context.fetch(evidence.evaluation) / "items.parquet"))
    assert details["verdicts of the episodes"].startswith(f"{count} episodes judged again")
    assert details["tokens of a sample"].startswith("20 episodes generated again")


def test_an_edited_file_is_named(evidence: Evidence) -> None:
    path = evidence.file(evidence.evaluation, "items.parquet")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = evidence.failures()
    assert list(found) == ["hashes: evaluation"]
    assert "items.parquet is damaged" in found["hashes: evaluation"]


def test_a_swapped_checkpoint_is_named(evidence: Evidence) -> None:
    other = evidence.file(evidence.stage.pointers["none"], "model.safetensors")
    shutil.copy(other, evidence.file(evidence.candidate, "model.safetensors"))
    found = evidence.failures()
    assert list(found) == ["hashes: checkpoint after"]
    assert "model.safetensors is damaged" in found["hashes: checkpoint after"]


def test_records_of_another_checkpoint_are_found_and_its_tokens_too(evidence: Evidence) -> None:
    # the model before RL is said to be the trained one, in the report and in every record
    half = evidence.candidate

    def edit(report: EvaluationReport, items: list[Item]) -> tuple[EvaluationReport, list[Item]]:
        return report.model_copy(update={"before": half}), items

    evidence.forge(edit)
    assert "other weights" in evidence.failures()["digests in the records"]

    def deeper(report: EvaluationReport, items: list[Item]) -> tuple[EvaluationReport, list[Item]]:
        renamed = [replace(i, weights=half.sha256) if i.player == "before" else i for i in items]
        return report.model_copy(update={"before": half}), renamed

    evidence.restore()
    evidence.forge(deeper)
    found = evidence.failures()
    assert list(found) == ["tokens of a sample"]
    assert "the checkpoint writes another token" in found["tokens of a sample"]


def test_a_flipped_verdict_is_found_whether_or_not_the_statistics_follow(evidence: Evidence) -> None:
    edited: list[Item] = []

    def flip(report: EvaluationReport, items: list[Item]) -> tuple[EvaluationReport, list[Item]]:
        items, item = change(items, lambda i: is_main(i) and i.reward == 0.0, reward=1.0)
        edited.append(item)
        return report, items

    evidence.forge(flip)
    found = evidence.failures()
    # the gate's recorded numbers are those of the unedited report
    assert list(found) == ["statistics", "verdict of the gate", "verdicts of the episodes"]
    assert edited[0].task[:12] in found["verdicts of the episodes"]
    assert "recorded verdict 1, the environment's is 0" in found["verdicts of the episodes"]

    def carefully(report: EvaluationReport, items: list[Item]) -> tuple[EvaluationReport, list[Item]]:
        report, items = flip(report, items)
        return computed(report, items), items

    evidence.restore()
    evidence.forge(carefully)
    assert list(evidence.failures()) == ["verdicts of the episodes"]


def test_an_edited_number_is_named(evidence: Evidence) -> None:
    def edit(report: EvaluationReport, items: list[Item]) -> tuple[EvaluationReport, list[Item]]:
        greedy = report.greedy.model_copy(update={"after": report.greedy.after.model_copy(update={"macro": 0.987})})
        return report.model_copy(update={"greedy": greedy}), items

    evidence.forge(edit)
    found = evidence.failures()
    assert list(found) == ["statistics"]
    assert "greedy.after.macro is 0.987 in the report" in found["statistics"]


def test_an_edited_verdict_of_the_gate_is_named(evidence: Evidence) -> None:
    context = replace(evidence.stage.context, run_id="test-forged")
    decided = gate.run(gate.GateConfig(), context, {"evaluation": evidence.evaluation}).outputs["verdict"]
    directory = context.work_dir / "verdict"
    shutil.copytree(context.fetch(decided), directory, dirs_exist_ok=True)
    path = directory / gate.VERDICT_FILE
    other = {"promoted": "rejected", "rejected": "promoted"}
    word = next(name for name in other if f'"{name}"' in path.read_text())
    path.write_text(path.read_text().replace(f'"{word}"', f'"{other[word]}"'))
    context = replace(context, run_id="test-forged-later")
    context.publish("gate", directory, parents=[evidence.evaluation], facts={"config": {}})
    found = evidence.failures()
    assert list(found) == ["verdict of the gate"]
    assert f"verdict is {other[word]}, the gate finds {word}" in found["verdict of the gate"]


def test_an_edited_token_is_named(evidence: Evidence) -> None:
    edited: list[Item] = []

    def edit(report: EvaluationReport, items: list[Item]) -> tuple[EvaluationReport, list[Item]]:
        item = next(i for i in items if is_main(i))
        ids = list(item.token_ids)
        ids[item.prompt_tokens] = (ids[item.prompt_tokens] + 1) % len(WORDS)
        items, item = change(items, lambda i: i is item, token_ids=tuple(ids))
        edited.append(item)
        return report, items

    evidence.forge(edit)
    assert edited[0].task[:12] in evidence.failures()["verdicts of the episodes"]


def test_an_edited_seed_is_named(evidence: Evidence) -> None:
    def edit(report: EvaluationReport, items: list[Item]) -> tuple[EvaluationReport, list[Item]]:
        return report, change(items, lambda i: i.measure == "validation", seed=7)[0]

    evidence.forge(edit)
    assert "seed 7" in evidence.failures()["seeds of the episodes"]


def test_a_decision_with_settings_of_another_version_is_told() -> None:
    manifest = Manifest(kind="gate", stage="gate", files=[], facts={"config": {"gain": 0.0, "margin_of_later": 1}})
    with pytest.raises(InputError, match=r"does not know \(margin_of_later\); verify with the version that decided"):
        gate_config(manifest)


def test_the_command_says_0_or_3_and_refuses_what_is_not_there(evidence: Evidence, tmp_path: Path) -> None:
    settings = Settings.read({"SPARSELINE_RUNS": str(tmp_path), "SPARSELINE_STORE": str(evidence.root)})
    console = Console(record=True, width=140)
    with pytest.raises(InputError, match="no registry"):
        verify(settings, CHAMPION, sample=2, seed=0, console=console)
    registry = Registry(settings)
    version = registry.promote(evidence.candidate)
    assert verify(settings, CHAMPION, sample=2, seed=0, console=console) == 0
    assert verify(settings, version.version, sample=2, seed=0, console=console) == 0
    assert "everything verifies" in console.export_text()
    sha256 = evidence.candidate.sha256
    assert verify(settings, CHAMPION, sample=2, seed=0, console=console, digest=sha256) == 0
    assert verify(settings, CHAMPION, sample=2, seed=0, console=console, digest="0" * 64) == 3
    assert "does not verify: digest" in console.export_text()
    with pytest.raises(InputError, match="no alias 'previous'"):
        verify(settings, "previous", sample=2, seed=0, console=console)
    registry.promote(evidence.stage.pointers["none"])
    with pytest.raises(InputError, match="no decision of the gate"):
        verify(settings, CHAMPION, sample=2, seed=0, console=console)
    shutil.copy(
        evidence.file(evidence.stage.pointers["none"], "model.safetensors"),
        evidence.file(evidence.candidate, "model.safetensors"),
    )
    assert verify(settings, version.version, sample=2, seed=0, console=console) == 3
    assert "does not verify: hashes: checkpoint after" in console.export_text()
