"""Pre-training and post-training as stages: what they publish, that a seed decides everything, what they refuse."""

import random
from pathlib import Path

import pytest
import torch

from components.environments.kg_query import KnowledgeGraphQuery
from components.environments.protocol import Verdict
from components.post_training import run as post_training
from components.post_training.config import PostTrainingConfig
from components.pretraining import run as pretraining
from components.pretraining.config import PhaseConfig, PretrainingConfig
from components.runtime.errors import InputError
from components.runtime.object_store import open_store
from components.runtime.progress import Progress
from components.runtime.stage import StageContext
from components.runtime.tracking import Tracker, read_metrics
from model.checkpoint import load_model
from tests.components.knowledge_tasks import publish_knowledge_tasks

PHASE = PhaseConfig(
    steps=3,
    learning_rate=2e-3,
    indexer_learning_rate=1e-3,
    warmup_steps=1,
    demonstration_tokens=300,
    document_tokens=150,
)
PRETRAINING = PretrainingConfig(model="micro", dense=PHASE, warmup=PHASE, sparse=PHASE, validation_every=2, threads=1)
POST_TRAINING = PostTrainingConfig(
    steps=2, prompts=3, group_size=3, mini_batches=2, validation_tasks=3, validation_every=1, turn_tokens=8, threads=1
)


def context(folder: Path, stage: str, seed: int = 0) -> StageContext:
    for name in ("work", "records"):
        (folder / stage / name).mkdir(parents=True, exist_ok=True)
    tracker = Tracker(folder / stage / "records")
    return StageContext(
        stage, "test", seed, folder / stage / "work", open_store(str(folder / "store")), tracker, Progress()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def tasks(folder):
    return publish_knowledge_tasks(context(folder, "synthesis"))


@pytest.fixture(scope="module")
def base(folder, tasks):
    return pretraining.run(PRETRAINING, context(folder, "base"), {"tasks": tasks}).outputs["checkpoint"]


def weights(folder: Path, name: str, pointer) -> dict[str, torch.Tensor]:
    return load_model(context(folder, name).fetch(pointer)).state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bitwise. (The pointers differ: a manifest names the stage that wrote it.)"""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_pretraining_is_decided_by_its_seed(folder, tasks, base):
    again = pretraining.run(PRETRAINING, context(folder, "again"), {"tasks": tasks}).outputs["checkpoint"]
    other = pretraining.run(PRETRAINING, context(folder, "other", seed=1), {"tasks": tasks}).outputs["checkpoint"]
    assert same(weights(folder, "a", again), weights(folder, "b", base))
    assert not same(weights(folder, "c", other), weights(folder, "b", base))


def test_an_episode_is_shown_at_every_validation(folder, tasks, monkeypatch):
    shown = []
    made = context(folder, "shown")
    monkeypatch.setattr(made.progress, "episode", shown.append)
    pretraining.run(PRETRAINING, made, {"tasks": tasks})
    assert len(shown) == 2 * 3  # three phases of three steps, validated after the second and the last
    assert all("user" in text for text in shown)


def test_an_unknown_preset_is_bad_input(folder, tasks):
    config = PRETRAINING.model_copy(update={"model": "giant"})
    with pytest.raises(InputError, match="unknown model preset 'giant'; known: micro, nano"):
        pretraining.run(config, context(folder, "giant"), {"tasks": tasks})


def test_with_a_base_there_is_no_dense_phase_and_the_warm_up_moves_the_indexer_alone(folder, tasks, base):
    warm_up = PRETRAINING.model_copy(update={"sparse": PHASE.model_copy(update={"steps": 0})})
    made = context(folder, "from_base")
    result = pretraining.run(warm_up, made, {"tasks": tasks, "base": base})
    made.tracker.close()
    curves = read_metrics(folder / "from_base" / "records")
    assert any(name.startswith("warmup/") for name in curves)
    assert not any(name.startswith("dense/") for name in curves)
    before, after = weights(folder, "before", base), weights(folder, "after", result.outputs["checkpoint"])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".indexer." in name for name in moved)


def test_post_training_moves_all_but_the_indexer_and_engine_and_learner_agree(folder, tasks, base):
    inputs = {"tasks": tasks, "checkpoint": base}

    # a model this young passes no task; a reward that some rollouts get makes it learn
    class Lenient(KnowledgeGraphQuery):
        def reset(self, task):
            episode = super().reset(task)
            verdict = Verdict(float(random.random() < 0.5), "by lot")

            class Judged:
                step, state_hash = episode.step, episode.state_hash

                def verdict(self):
                    return verdict

            return Judged()

    def run(name):
        random.seed(1)
        trainer = context(folder, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(post_training, "environment", lambda family: Lenient())
            return post_training.run(POST_TRAINING, trainer, inputs), trainer

    (first, made), (second, _) = run("rl"), run("rl_again")
    after = weights(folder, "rl_a", first.outputs["checkpoint"])
    assert same(after, weights(folder, "rl_again", second.outputs["checkpoint"]))
    assert first.summary["rollouts"] == 2 * 3 * 3
    assert first.summary["logprob_gap"] < 1e-4
    made.tracker.close()
    curves = read_metrics(folder / "rl" / "records")
    assert len(curves["rl/reward"]) == 2
    if first.summary["best_step"]:
        before = weights(folder, "rl_b", base)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert not any(".indexer." in name for name in moved)


def test_a_reward_that_is_none_is_bad_input_by_name(folder, tasks, base, monkeypatch):
    class Broken(KnowledgeGraphQuery):
        def reset(self, task):
            episode = super().reset(task)
            found = episode.verdict

            class Judged:
                step, state_hash = episode.step, episode.state_hash

                def verdict(self):
                    return type(found())(float("nan"), "broken")

            return Judged()

    monkeypatch.setattr(post_training, "environment", lambda family: Broken())
    with pytest.raises(InputError, match=r"no validation task of kg_query .*bad_reward: nan lies outside"):
        post_training.run(POST_TRAINING, context(folder, "nan"), {"tasks": tasks, "checkpoint": base})


def test_a_tokenizer_of_other_words_is_refused(folder, tasks, base):
    made = context(folder, "foreign")
    directory = made.fetch(base)
    text = (directory / "tokenizer.json").read_text()
    copy = made.work_dir / "copy"
    copy.mkdir()
    for file in directory.iterdir():
        if file.name != "manifest.json":
            (copy / file.name).write_bytes(file.read_bytes())
    (copy / "tokenizer.json").write_text(text.replace('"neighbors"', '"neighbours"'))
    foreign = made.publish("checkpoint", copy)
    with pytest.raises(InputError, match="does not know the word 'neighbors'"):
        pretraining.run(PRETRAINING, made, {"tasks": tasks, "base": foreign})
