"""The serving check, whole: registry, store, server process, official client, environment, verdict.

The model is trained on the spot to know a few tasks by heart, so that episodes pass for a real reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from components.environments.kg_query import KnowledgeGraphQuery
from components.evaluation.play import Player, play
from components.rollouts import EpisodeRequest, OpenAIPolicy, run_episodes
from components.rollouts.loop import transcript
from components.runtime import processes
from components.runtime.contracts import TaskRecord
from components.runtime.object_store import open_store
from components.runtime.progress import Progress
from components.runtime.registry import Registry
from components.runtime.settings import Settings
from components.runtime.stage import StageContext
from components.runtime.task_set import write_task_set
from components.runtime.tracking import Tracker
from components.serving import check
from components.serving.config import ServingConfig
from tests.components.serving.served import learn_by_heart, save_checkpoint, start_server

FAMILY = KnowledgeGraphQuery()


@pytest.fixture(scope="module")
def tasks() -> list[TaskRecord]:
    templates = ["works_in/name", "led_by/name", "works_in/led_by/name", "suppliers/count"]
    return [FAMILY.generate(template, seed, "test") for seed, template in enumerate(templates)]


@pytest.fixture(scope="module")
def expert(tasks: list[TaskRecord], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(learn_by_heart(tasks), tmp_path_factory.mktemp("expert") / "expert")


@pytest.mark.slow
def test_check_serves_the_champion_and_refuses_another(
    tasks: list[TaskRecord], expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSELINE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SPARSELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = tmp_path / "work"
    work.mkdir()
    context = StageContext("serving", "test", 0, work, open_store(str(tmp_path / "store")), Tracker(), Progress())
    write_task_set(
        work / "tasks", tasks=tasks, long_tasks=[], demonstrations=[], documents=[], vocabulary=["a"], battery={}
    )
    inputs = {
        "tasks": context.publish("task-set", work / "tasks"),
        "checkpoint": context.publish("checkpoint", expert),
    }
    with pytest.raises(ValueError, match="the champion is none"):
        check.run(ServingConfig(), context, inputs)

    Registry(Settings.read()).promote(inputs["checkpoint"])
    summary = check.run(ServingConfig(episodes=2), context, inputs).summary
    assert summary["episode_ok"] is True
    assert summary["episodes"] == summary["passed"] == 4
    assert summary["complete"] == {"plain": 2, "streaming": 2}
    assert summary["model"] == "models:/sparseline@champion"
    assert summary["tokens"] >= 4 * 8
    assert summary["tokens_per_second"] > 0

    other = inputs | {"checkpoint": inputs["checkpoint"].model_copy(update={"sha256": "0" * 64})}
    with pytest.raises(ValueError, match="but the checkpoint to check is 000000000000"):
        check.run(ServingConfig(), context, other)


@pytest.mark.slow
def test_an_episode_over_http_is_the_engines_episode(tasks: list[TaskRecord], expert: Path) -> None:
    """Rendering, parsing and sampling over the API change nothing: same seeds, same episodes, sampled and streamed."""
    hot = 1.5  # hot enough that episodes differ by seed
    player = Player.load("after", expert)
    items, trajectories = play(player, tasks, measure="sampled", temperature=hot, seed=3, max_sequences=4)
    assert len({len(trajectory) for trajectory in trajectories}) > 1
    process, url = start_server(str(expert), environment={"OMP_NUM_THREADS": "1"})
    try:
        for stream in (False, True):
            policy = OpenAIPolicy(url, "expert", stream=stream, temperature=hot)
            requests = [EpisodeRequest(FAMILY, task, item.seed) for task, item in zip(tasks, items, strict=True)]
            for result, item in zip(run_episodes(policy, requests), items, strict=True):
                if item.ended in ("submitted", "no_call", "turns"):
                    assert transcript(result) == item.transcript
                    assert result.ended == item.ended
    finally:
        processes.stop(process)
    assert any(item.ended == "submitted" and item.turns >= 2 for item in items)


def test_tasks_are_short_multi_turn_and_of_many_templates(tasks: list[TaskRecord]) -> None:
    twins = [FAMILY.generate("works_in/name", seed, "test") for seed in range(10, 14)]
    chosen = check.choose_tasks([*twins, *tasks], 4)
    assert len({task.template for task in chosen}) == 4
    assert [len(task.solution) for task in chosen] == sorted(len(task.solution) for task in chosen)
    assert len(check.choose_tasks([*twins, *tasks], 7)) == 7
