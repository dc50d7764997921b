"""The whole stage with a model that knows its tasks by heart, one that knows half of them, and one that knows none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.environments.chat_format import SPECIAL_WORDS, UNKNOWN
from components.environments.kg_query import KnowledgeGraphQuery
from components.evaluation import champion, gate
from components.evaluation import run as evaluation
from components.evaluation.compare import Bootstrap
from components.evaluation.config import ChampionConfig, EvaluationConfig
from components.evaluation.play import Item, Player, episode_seed, logprob_gap, play, read_items
from components.evaluation.report import EvaluationReport
from components.runtime.contracts import Pointer, TaskRecord
from components.runtime.errors import InputError
from components.runtime.object_store import open_store
from components.runtime.progress import Progress
from components.runtime.stage import StageContext
from components.runtime.task_set import write_task_set
from components.runtime.tracking import Tracker
from model.checkpoint import word_tokenizer
from model.config import ModelConfig
from model.transformer import Transformer
from tests.components.serving.served import WORDS, learn_by_heart, save_checkpoint

FAMILY = KnowledgeGraphQuery()
TEMPLATES = ["works_in/name", "led_by/name", "seated_in/name", "made_by/name", "lives_in/name", "part_of/name"]
TASKS = [FAMILY.generate(template, seed, "test") for seed in range(2) for template in TEMPLATES]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    config = ModelConfig.preset("micro", vocab_size=len(WORDS))
    return {
        "none": save_checkpoint(Transformer(config).initialise(5), folder / "none"),
        "half": save_checkpoint(learn_by_heart(TASKS[:3], steps=60), folder / "half"),
        "all": save_checkpoint(learn_by_heart(TASKS, steps=120), folder / "all"),
    }


class Stage:
    """A context with a task set and the three checkpoints published."""

    def __init__(self, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
        work = tmp_path / "work"
        work.mkdir()
        store = open_store(str(tmp_path / "store"))
        self.context = StageContext("evaluation", "test", 4, work, store, Tracker(), Progress())
        documents = [FAMILY.document(seed, split, 200) for split in ("validation", "test") for seed in range(3)]  # type: ignore[arg-type]
        validation = [FAMILY.generate(t, 9, "validation") for t in ("owned_by/name", "based_in/name")]
        write_task_set(
            work / "tasks",
            tasks=[*TASKS, *validation],
            long_tasks=[],
            demonstrations=[],
            documents=documents,
            vocabulary=["a"],
            battery={},
        )
        self.tasks = self.context.publish("task-set", work / "tasks")
        self.pointers = {name: self.context.publish("checkpoint", path) for name, path in checkpoints.items()}

    def evaluate(self, before: str, after: str, processes: int = 1) -> tuple[Pointer, dict[str, Any]]:
        config = EvaluationConfig(
            pairs=len(TASKS), validation_tasks=2, temperatures=[0.5, 1.0], documents=3, validation_documents=3,
            resamples=300, logprob_trajectories=6, curve_tasks=3, curve_samples=4,
            processes=processes, threads=1,
        )  # fmt: skip
        inputs = {"tasks": self.tasks, "before": self.pointers[before], "after": self.pointers[after]}
        result = evaluation.run(config, self.context, inputs)
        return result.outputs["evaluation"], result.summary


@pytest.fixture
def stage(tmp_path: Path, checkpoints: dict[str, Path]) -> Stage:
    return Stage(tmp_path, checkpoints)


@pytest.mark.slow
def test_stage_reports_what_its_records_say_and_the_gate_follows(stage: Stage) -> None:
    pointer, summary = stage.evaluate("none", "all")
    directory = stage.context.fetch(pointer)
    report = EvaluationReport.read(directory)
    items = read_items(directory / "items.parquet")

    def rewards(player: str, measure: str, temperature: float) -> list[float]:
        keys = (player, measure, temperature)
        return [i.reward for i in items if (i.player, i.measure, i.temperature) == keys]

    sampled = rewards("before", "sampled", 1.0), rewards("after", "sampled", 1.0)
    assert len(sampled[0]) == len(sampled[1]) == report.pass_at_1.difference.n == len(TASKS)
    assert summary["pass_at_1"]["after"]["macro"] == pytest.approx(np.mean(sampled[1]))
    assert summary["pass_at_1"]["difference"]["mean"] == pytest.approx(np.mean(sampled[1]) - np.mean(sampled[0]))
    assert summary["greedy"]["after"] == pytest.approx(np.mean(rewards("after", "greedy", 0.0)))
    assert summary["pass_at_1"]["families"]["kg_query"]["after"]["mean"] == pytest.approx(np.mean(sampled[1]))
    assert summary["greedy"]["after"] > 0.6  # it knows its tasks (almost) by heart
    assert summary["pass_at_1"]["before"]["macro"] == 0.0
    assert report.templates == len(TEMPLATES)
    assert 0 <= report.logprob_gap <= 1e-4
    assert len(rewards("before", "validation", 0.5)) == 2
    assert {"dense", "sparse", "window", "random", "gap", "answers"} <= set(summary["ce"])
    assert 0 <= summary["indexer_recall"] <= 1

    # no champion: the baseline is the model before RL; nothing is played again
    handed = champion.run(ChampionConfig(), stage.context, {"tasks": stage.tasks, "evaluation": pointer})
    assert handed.outputs["evaluation"] == pointer
    verdict = gate.run(gate.GateConfig(), stage.context, {"evaluation": pointer}).summary
    assert verdict["verdict"] == "promoted"


@pytest.mark.slow
def test_processes_change_nothing(stage: Stage) -> None:
    (one, _), (two, _) = (stage.evaluate("half", "all", processes=number) for number in (1, 2))
    for file in ("evaluation.json", "items.parquet"):
        assert (stage.context.fetch(one) / file).read_bytes() == (stage.context.fetch(two) / file).read_bytes(), file


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_that_cannot_be_read_is_bad_input(stage: Stage, tmp_path: Path, processes: int) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "weights.txt").write_text("none")
    stage.pointers["bad"] = stage.context.publish("checkpoint", tmp_path / "bad")
    with pytest.raises(InputError, match=r"the checkpoint before in .* cannot be read"):
        stage.evaluate("bad", "none", processes)


@pytest.mark.slow
def test_a_candidate_must_beat_the_champion(stage: Stage) -> None:
    pointer, _ = stage.evaluate("none", "half")
    assert gate.run(gate.GateConfig(), stage.context, {"evaluation": pointer}).summary["verdict"] != "unchanged"

    inputs = {"tasks": stage.tasks, "evaluation": pointer, "champion": stage.pointers["all"]}
    compared = champion.run(ChampionConfig(), stage.context, inputs)
    assert compared.summary["compared"] is True
    assert compared.summary["difference"]["mean"] < -0.2
    judged = inputs | {"evaluation": compared.outputs["evaluation"]}
    assert gate.run(gate.GateConfig(), stage.context, judged).summary["verdict"] == "rejected"

    # the champion's own numbers, played with the candidate's tasks and seeds, are those of its own evaluation
    own, summary = stage.evaluate("none", "all")
    assert compared.summary["champion"]["macro"] == summary["pass_at_1"]["after"]["macro"]
    same = {"tasks": stage.tasks, "evaluation": own, "champion": stage.pointers["all"]}
    assert champion.run(ChampionConfig(), stage.context, same).outputs["evaluation"] == own
    assert gate.run(gate.GateConfig(), stage.context, same).summary["verdict"] == "unchanged"

    with pytest.raises(InputError, match="another task set"):
        champion.run(ChampionConfig(), stage.context, inputs | {"tasks": stage.pointers["none"]})


def test_logprob_gap_is_small_for_the_engines_own_model_and_large_for_another() -> None:
    def network() -> Transformer:
        return Transformer(ModelConfig.preset("micro", vocab_size=len(WORDS))).initialise(5)

    tokenizer = word_tokenizer(SPECIAL_WORDS, FAMILY.vocabulary(), UNKNOWN)
    player = Player("before", network(), tokenizer)
    _, trajectories = play(player, TASKS, measure="sampled", temperature=1.0, seed=0, max_sequences=5)
    assert sum(int(trajectory.sampled.sum()) for trajectory in trajectories) > 200
    assert max(len(trajectory) for trajectory in trajectories) > 64  # the selection matters: top-k is 16
    assert logprob_gap(player.model, trajectories, batch=5) < 1e-4
    other = network()
    with torch.no_grad():
        other.lm_head.weight.add_(0.01 * torch.randn(other.lm_head.weight.shape, generator=torch.manual_seed(0)))
    assert logprob_gap(other, trajectories) > 1e-2
    other = network()
    other.attention_mode = "window"  # the same weights, another selection
    assert logprob_gap(other, trajectories) > 1e-2


def test_seeds_pair_models_and_differ_between_tasks_and_runs() -> None:
    seeds = [episode_seed(0, task) for task in TASKS]
    assert len(set(seeds)) == len(TASKS)
    assert seeds == [episode_seed(0, task) for task in TASKS]
    assert not set(seeds) & {episode_seed(1, task) for task in TASKS}
    assert all(0 <= seed < 2**63 for seed in seeds)


def item(task: TaskRecord, reward: float, **more: Any) -> Item:
    made = Item("after", "sampled", 1.0, task.id, "kg_query", task.template, 1, reward, "submitted", "", 2, 0, 40, "")
    return replace(made, **more)


def test_only_real_pairs_are_compared() -> None:
    bootstrap = Bootstrap(resamples=200, confidence=0.95, seed=0)
    before, after = [item(task, 0.0) for task in TASKS], [item(task, 1.0) for task in TASKS]
    assert bootstrap.difference(before, after).mean == 1.0
    for wrong in ([*after[1:], after[0]], [*after[:-1], replace(after[-1], seed=2)]):
        with pytest.raises(ValueError, match="not a pair"):
            bootstrap.difference(before, wrong)


def test_families_share_the_pairs_alike() -> None:
    more = [task.model_copy(update={"environment": "other"}) for task in TASKS]
    chosen = evaluation.first_of_each_family([*TASKS, *more], 5)
    assert [task.environment for task in chosen] == ["kg_query"] * 5 + ["other"] * 5
