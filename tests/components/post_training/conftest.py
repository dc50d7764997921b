"""A small task set, an untrained micro checkpoint, and an environment whose reward is decided by lot."""

from collections.abc import Callable
from pathlib import Path

import pytest

from components.environments.chat_format import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_WORDS, UNKNOWN
from components.environments.kg_query import KnowledgeGraphQuery
from components.environments.protocol import Verdict
from components.post_training import ray_cluster
from components.post_training import run as post_training
from components.post_training.config import PostTrainingConfig
from components.runtime.object_store import open_store
from components.runtime.progress import Progress
from components.runtime.stage import StageContext, StageResult
from components.runtime.task_set import write_task_set
from components.runtime.tracking import Tracker
from model import ModelConfig, Transformer
from model.checkpoint import save_model, save_tokenizer, word_tokenizer

SMALL = {
    **{"steps": 3, "prompts": 3, "group_size": 4, "mini_batches": 2, "validation_tasks": 2, "validation_every": 2},
    **{"turn_tokens": 6, "threads": 1, "learning_rate": 1e-3},
}


def context(folder: Path, seed: int = 0) -> StageContext:
    for name in ("work", "records"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    store = open_store(str(folder / "store"))
    return StageContext("post_training", "test", seed, folder / "work", store, Tracker(folder / "records"), Progress())


def drawn(name: str = "kg_query", reward: Callable[[int], float] = lambda play: float(play % 2)):
    """An environment in which the reward of its n-th play is `reward(n)`. A local class: Ray takes it along."""

    class Lot(KnowledgeGraphQuery):
        plays = 0

        def reset(self, task):
            episode, play = super().reset(task), self.plays
            self.plays += 1

            class Drawn:
                step, state_hash = episode.step, episode.state_hash

                def verdict(self):
                    return Verdict(reward(play), "by lot")

            return Drawn()

    Lot.name = name
    return Lot()


@pytest.fixture
def lot() -> Callable:
    return drawn


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Callable[[StageContext], dict]:
    """Publishes the task set and the checkpoint into a stage's store."""
    folder = tmp_path_factory.mktemp("post_training")
    family = KnowledgeGraphQuery()
    templates = family.templates()[::40]
    write_task_set(
        folder / "tasks",
        tasks=[family.generate(t, s, split) for split in ("train", "validation") for s, t in enumerate(templates)],
        long_tasks=[],
        demonstrations=[],
        documents=[],
        vocabulary=family.vocabulary(),
        battery={},
    )
    tokenizer = word_tokenizer(SPECIAL_WORDS, family.vocabulary(), UNKNOWN)
    config = ModelConfig.preset("micro", vocab_size=tokenizer.get_vocab_size())
    save_model(Transformer(config).initialise(0), folder / "checkpoint")
    save_tokenizer(
        tokenizer, folder / "checkpoint", chat_template=CHAT_TEMPLATE, bos=BOS, eos=END, pad=PAD, unknown=UNKNOWN
    )

    def publish(stage: StageContext) -> dict:
        return {
            "tasks": stage.publish("task-set", folder / "tasks"),
            "checkpoint": stage.publish("checkpoint", folder / "checkpoint"),
        }

    publish.folder = folder  # type: ignore[attr-defined]
    return publish


@pytest.fixture
def train(tmp_path, inputs, monkeypatch) -> Callable[..., tuple[StageResult, Path]]:
    """Runs the stage with an environment of our choice; its result and its folder."""

    def run(name: str = "run", environment=None, seed: int = 0, **values) -> tuple[StageResult, Path]:
        folder = tmp_path / name
        stage = context(folder, seed)
        monkeypatch.setattr(post_training, "environment", lambda family: environment or drawn(family))
        try:
            config = PostTrainingConfig(**{**SMALL, **values})
            return post_training.run(config, stage, inputs(stage)), folder
        finally:
            stage.tracker.close()

    return run


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A cluster of this module, which the tests reach by RAY_ADDRESS, with more CPUs than this machine has."""
    ray_cluster._authenticate()
    process, address = ray_cluster._start(tmp_path_factory.mktemp("ray"), 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", address)
        yield address
    ray_cluster._stop(process)
