"""The stage in this process: what is trained on, what is dropped and why, what stops it, what it refuses."""

import math
import re

import pytest
import torch

from components.environments.chat_format import SPECIAL_WORDS
from components.post_training import run as post_training
from components.post_training.config import AlarmConfig, PostTrainingConfig
from components.post_training.ledger import check_ledger, read_ledger
from components.post_training.run import check_words
from components.post_training.trainer import Learner
from components.runtime.errors import InputError
from components.runtime.tracking import read_metrics
from model.checkpoint import load_model, word_tokenizer


def ledger_of(folder):
    return read_ledger(folder / "records" / "artifacts" / "ledger.jsonl")


def weights(folder):
    return load_model(folder / "work" / "checkpoint").state_dict()


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first.values(), second.values(), strict=True))


def test_a_run_is_decided_by_its_seed_and_its_ledger_adds_up(train):
    (first, a), (second, b), (_, c) = train("a"), train("b"), train("c", seed=1)
    assert first.summary == second.summary
    assert same(weights(a), weights(b))
    assert ledger_of(a) == ledger_of(b)
    assert [r.get("task") for r in ledger_of(a)] != [r.get("task") for r in ledger_of(c)]
    counts = check_ledger(ledger_of(a))
    assert counts["issued"] == counts["trained"] == 9
    assert first.summary["ledger"] == {**counts, "hash": ledger_of(a)[-1]["hash"]}
    assert first.summary["logprob_gap"] < 1e-4
    assert first.summary["stopped_by"] == ""
    assert all(record["staleness"] == 0 for record in ledger_of(a) if record["event"] == "trained")


def test_groups_that_teach_nothing_are_dropped_and_refilled(train, lot):
    # plays 0..3 are the validation; then every other group of 4 fails whole
    def reward(play):
        return float(play % 2 and play // 4 % 2)

    values = {"steps": 2, "validation_tasks": 4, "validation_every": 9}
    _, folder = train("without", lot(reward=reward), **values)
    assert check_ledger(ledger_of(folder)) == {
        **{"issued": 6, "finished": 6, "trained": 3, "dropped": 3, "dropped_zero_variance": 3}
    }
    refilled, folder = train("refilled", lot(reward=reward), refills=2, **values)
    records = ledger_of(folder)
    counts = check_ledger(records)
    assert counts["trained"] > 3
    # a batch of 3 misses 1 or 2, whose refills may miss once more
    assert counts["issued"] == 6 + counts["dropped_zero_variance"] - (6 - counts["trained"])
    assert refilled.summary["trained_rollouts"] == 4 * counts["trained"]
    tasks = [record["task"] for record in records if record["event"] == "issued"]
    assert len(set(tasks)) == len(tasks)  # refills are new prompts


def test_a_spoiled_group_is_left_out_and_the_others_are_trained(train, lot):
    result, folder = train(environment=lot(reward=lambda play: math.nan if play == 6 else float(play % 2)))
    counts = check_ledger(ledger_of(folder))
    assert (counts["dropped_faulty"], counts["trained"]) == (1, 8)
    (reason,) = [record["reason"] for record in ledger_of(folder) if record["event"] == "dropped"]
    assert reason == "faulty: bad_reward: nan lies outside [0, 1]"
    assert result.summary["trained_rollouts"] == 32


def test_an_environment_that_raises_spoils_its_group_alone(train, lot):
    def reward(play):
        if play == 9:
            raise KeyError("lost")
        return float(play % 2)

    _, folder = train(environment=lot(reward=reward))
    (reason,) = [record["reason"] for record in ledger_of(folder) if record["event"] == "dropped"]
    assert reason == "faulty: environment_raised: the verifier: KeyError: 'lost'"


def test_a_prompt_that_is_too_long_spoils_its_group_alone(train, monkeypatch):
    choose = post_training.chosen_tasks

    def shortened(directory, config):
        tasks, validation = choose(directory, config)
        limits = tasks[0].limits.model_copy(update={"tokens": 5})
        return [tasks[0].model_copy(update={"limits": limits}), *tasks[1:6]], validation

    monkeypatch.setattr(post_training, "chosen_tasks", shortened)
    _, folder = train(steps=2)  # every task once
    reasons = [record["reason"] for record in ledger_of(folder) if record["event"] == "dropped"]
    assert len(reasons) == 1
    assert re.fullmatch(r"faulty: prompt_too_long: \d+ tokens leave no room in a sequence of 5", reasons[0])


def test_the_token_budget_multiplies_limits(inputs):
    config = PostTrainingConfig(token_budget=2.0)
    (more, _), (own, _) = (
        post_training.chosen_tasks(inputs.folder / "tasks", one) for one in (config, PostTrainingConfig())
    )
    assert [task.limits.tokens for task in more] == [2 * task.limits.tokens for task in own]
    assert [task.limits.turns for task in more] == [2 * task.limits.turns for task in own]


def test_an_environment_that_fails_always_is_bad_input_and_the_ledger_is_whole(train, lot, tmp_path):
    with pytest.raises(InputError, match=r"none of the 3 prompt groups .* kg_query.*bad_reward: 7.0 lies outside"):
        train("broken", lot(reward=lambda play: 7.0 if play > 1 else 1.0))
    counts = check_ledger(read_ledger(tmp_path / "broken" / "work" / "ledger.jsonl"))
    assert counts["dropped_faulty"] == counts["issued"] == 3
    assert not (tmp_path / "broken" / "work" / "checkpoint").exists()


def test_nothing_to_learn_from_is_bad_input(train, lot):
    with pytest.raises(InputError, match="nothing to learn from: in 2 batches in a row, each with 1 refills"):
        train(environment=lot(reward=lambda play: 1.0), steps=9, refills=1, empty_batches=2)


def test_an_alarm_stops_the_run_and_keeps_the_best_weights(train, lot, inputs):
    # the validation passes at first only, and the reward of training collapses after six steps
    def reward(play):
        return float(play % 2) if play < 2 + 3 * 12 else float(play % 12 == 0)

    result, folder = train(
        environment=lot(reward=reward),
        steps=30,
        validation_every=100,
        alarms=AlarmConfig(patience=2, reward_drop=0.3).model_dump(),
    )
    assert result.summary["stopped_by"] == "reward"
    assert result.summary["best_step"] == 0
    steps = len(read_metrics(folder / "records")["rl/reward"])
    assert steps == 5  # three good steps, two bad ones
    check_ledger(ledger_of(folder))
    start = load_model(folder / "work" / "inputs" / next(iter_checkpoint(folder))).state_dict()
    assert same(weights(folder), start)


def iter_checkpoint(folder):
    return (path.name for path in sorted((folder / "work" / "inputs").iterdir()) if (path / "config.json").exists())


def test_a_gradient_that_is_not_finite_stops_the_run_by_name(train, monkeypatch):
    accumulate = Learner.accumulate

    def broken(self, samples, total):
        values = accumulate(self, samples, total)
        if self.version == 1:
            self.trained[0].grad[0] = math.nan
        return values

    monkeypatch.setattr(Learner, "accumulate", broken)
    result, folder = train()
    assert result.summary["stopped_by"] == "gradient_not_finite"
    counts = check_ledger(ledger_of(folder))
    assert (counts["trained"], counts["dropped_stopped"]) == (3, 3)


@pytest.mark.parametrize(
    "values",
    [
        {"objective": "rft"},
        {"kl_weights": {"kg_query": 0.1}, "kl_estimator": "biased", "sequence_mask_threshold": None},
        {"importance_cap": 2.0, "length_penalty": 0.2, "keep_selection": True, "top_p": 0.9},
        {"rollout_dtype": "bfloat16", "keep_routing": False, "keep_sampling_masks": False, "top_p": 0.9},
    ],
)
def test_every_option_changes_what_is_learned(train, values):
    (_, plain), (changed, folder) = train("plain"), train("changed", validation_every=1, **values)
    assert changed.summary["trained_rollouts"] > 0
    curves, base = read_metrics(folder / "records"), read_metrics(plain / "records")
    assert curves["rl/gradient_norm"] != base["rl/gradient_norm"]


def test_a_tokenizer_of_other_words_is_bad_input():
    tokenizer = word_tokenizer(SPECIAL_WORDS, ["neighbours"], SPECIAL_WORDS[2])
    check_words(["neighbours"], tokenizer, "file:///x")
    with pytest.raises(InputError, match="file:///x does not know the word 'neighbors'"):
        check_words(["neighbours", "neighbors"], tokenizer, "file:///x")


def test_a_family_that_the_task_set_lacks_is_bad_input(train):
    with pytest.raises(InputError, match="no task of trip_planning in the split train"):
        train(families=["trip_planning"])


def test_an_environment_that_is_not_installed_is_bad_input():
    with pytest.raises(InputError, match="unknown environment 'nowhere'"):
        post_training.installed({"nowhere"})


@pytest.mark.parametrize(
    "values,message",
    [
        ({"group_size": 1}, "greater than or equal to 2"),
        ({"schedule": "asynchronous"}, "needs rollout_workers"),
        ({"environment_workers": 1}, "needs rollout_workers"),
        ({"groups_in_flight": 2, "prompts": 3}, "at least prompts"),
        ({"kl_weights": {"kg_query": -1.0}}, "at least 0"),
        ({"kl_weights": {"a": 0.1}, "families": ["b"]}, "kl_weights names a"),
    ],
)
def test_a_wrong_configuration_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PostTrainingConfig(**values)
