"""Schedules against a pool that gives groups back in any order: back-pressure, staleness, nothing lost."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.environments.kg_query import KnowledgeGraphQuery
from components.environments.protocol import Verdict
from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptSampler, balanced
from components.post_training.flow import Flow
from components.post_training.ledger import Ledger, check_ledger
from components.post_training.schedule import SCHEDULES
from components.post_training.worker import PlayedGroup
from components.rollouts import EpisodeResult
from model.engine import Trajectory

FAMILY = KnowledgeGraphQuery()
TASKS = [FAMILY.generate(template, 0, "train") for template in FAMILY.templates()[:12]]


class ShuffledPool:
    """Each group keeps the version at which it began; some finish at each call, in random order."""

    def __init__(self, rng: random.Random, useful: float) -> None:
        self.rng, self.useful, self.version, self.out, self.most = rng, useful, 0, [], 0

    def submit(self, groups):
        self.out += [(group, self.version) for group in groups]
        self.most = max(self.most, len(self.out))

    def collect(self):
        count = self.rng.randint(1, len(self.out)) if self.out else 0
        self.rng.shuffle(self.out)
        done, self.out = self.out[:count], self.out[count:]
        return [self.play(group, version) for group, version in done]

    def play(self, group, version):
        teaches = self.rng.random() < self.useful
        tokens = torch.tensor([1, 2])
        trajectory = Trajectory(
            tokens, tokens == 2, torch.zeros(2), torch.tensor([-1, version]), torch.empty(0, 1, 1), None, 1.0, "stop"
        )
        return PlayedGroup(
            group.id,
            group.task,
            [
                EpisodeResult(
                    group.task, seed, [], Verdict(float(teaches and index == 0), ""), trajectory, 1, 0, "no_call"
                )
                for index, seed in enumerate(group.seeds)
            ],
            version,
        )

    def publish(self, version):
        self.version = version


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["synchronous", "one_step_off", "asynchronous"]),
    st.integers(0, 3),
    st.integers(0, 2),
    st.floats(0.2, 1.0),
)
def test_nothing_is_lost_and_nothing_is_too_old(seed, schedule, staleness, refills, useful):
    config = PostTrainingConfig(
        steps=7, prompts=3, group_size=2, schedule=schedule, staleness=staleness, refills=refills, rollout_workers=1
    )
    rng = random.Random(seed)
    pool, ledger = ShuffledPool(rng, useful), Ledger()
    flow = Flow(config, PromptSampler(TASKS, 2, str(seed)), ledger)
    bound = {"synchronous": 0, "one_step_off": 1, "asynchronous": staleness}[schedule]
    steps = 0
    for step, batch in enumerate(SCHEDULES[schedule](config, pool, flow, lambda: pool.version)):
        assert len(batch.groups) <= 3
        assert all(0 <= age <= bound for age in batch.staleness)
        under_way = len(pool.out) + len(flow.useful) + len(batch.groups)
        assert under_way <= 3 * ((staleness if schedule == "asynchronous" else 1) + 1) + 3
        if len(batch.groups) < 3 and refills == 0:
            assert len(batch.played) >= 3
        flow.trained(batch, step)
        if batch.groups:
            pool.publish(pool.version + 1)
        steps += 1
    assert steps == 7
    if schedule == "asynchronous":
        assert pool.most <= 3 * (staleness + 1)
    ledger.close("not needed")
    counts = check_ledger(ledger.records)
    assert counts["issued"] == counts["trained"] + counts["dropped"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["one_step_off", "asynchronous"]), st.integers(1, 5), st.integers(1, 5))
def test_what_was_under_way_at_kills_is_played_again_with_its_own_seeds(seed, schedule, first, second):
    """Killed after `first` and after `second` more steps: every group is trained or dropped once, none is lost."""
    config = PostTrainingConfig(steps=7, prompts=3, group_size=2, schedule=schedule, rollout_workers=1)
    rng, done = random.Random(seed), 0

    def versions():
        return done

    records, stream = [], PromptSampler(TASKS, 2, str(seed)).state()
    seeds_of = {group.id: group.seeds for group in PromptSampler(TASKS, 2, str(seed)).take(200)}
    for steps in (first, second, 7):
        pool, ledger, sampler = ShuffledPool(rng, 0.8), Ledger(), PromptSampler(TASKS, 2, str(seed))
        pool.version = done
        sampler.load_state(stream)
        lost = ledger.go_on(records)
        sampler.again(lost)
        flow = Flow(config, sampler, ledger)
        for batch in SCHEDULES[schedule](config, pool, flow, versions, done):
            assert all(
                tuple(episode.seed for episode in group.episodes) == seeds_of[group.id] for group in batch.groups
            )
            flow.trained(batch, done)
            done, steps = done + 1, steps - 1
            pool.publish(done)
            if steps == 0:
                break
        again = {record["group"] for record in ledger.records[len(records) :] if record["event"] == "again"}
        assert again == set(lost) if schedule == "one_step_off" else again <= set(lost)
        records, stream = list(ledger.records), sampler.state()  # what a training state keeps
    assert done == 7
    ledger.close("not needed")
    counts = check_ledger(ledger.records)
    reasons = {record["reason"] for record in ledger.records if record["event"] == "dropped"}
    assert reasons <= {"zero variance", "too old", "not needed"}
    issued = [record["group"] for record in ledger.records if record["event"] == "issued"]
    assert issued == list(range(counts["issued"]))
    assert counts["issued"] == counts["trained"] + counts["dropped"]


def test_too_old_groups_are_dropped_with_the_reason():
    config = PostTrainingConfig(
        steps=4, prompts=2, group_size=2, schedule="asynchronous", staleness=1, rollout_workers=1
    )
    pool, ledger = ShuffledPool(random.Random(0), 1.0), Ledger()
    flow = Flow(config, PromptSampler(TASKS, 2, "x"), ledger)
    flow.accept([pool.play(group, 0) for group in flow.issue(2, 0)])
    flow.drop_older(0)
    assert len(flow.useful) == 2
    flow.drop_older(1)
    assert flow.useful == []
    assert [record["reason"] for record in ledger.records if record["event"] == "dropped"] == ["too old"] * 2


@pytest.mark.parametrize("families", [1, 3])
def test_prompts_are_balanced_and_each_task_comes_once_a_round(families):
    tasks = [
        task.model_copy(update={"environment": f"family{index % families}", "id": f"{task.id}{index}"})
        for index, task in enumerate(TASKS[: 4 * families])
    ]
    groups = PromptSampler(tasks, 5, "seed").take(8 * families)
    assert [group.id for group in groups] == list(range(8 * families))
    for start in range(0, len(groups), families):
        assert len({group.task.environment for group in groups[start : start + families]}) == families
    for half in (groups[: 4 * families], groups[4 * families :]):
        assert len({group.task.id for group in half}) == 4 * families
    assert len({seed for group in groups for seed in group.seeds}) == 5 * len(groups)
    again = PromptSampler(tasks, 5, "seed")
    assert [again.take(1)[0] for _ in groups] == groups


def test_validation_is_balanced():
    tasks = [task.model_copy(update={"environment": "ab"[index > 2]}) for index, task in enumerate(TASKS)]
    chosen = balanced(tasks, 4)
    assert [task.environment for task in chosen] == ["a"] * 3 + ["b"] * 4
