"""Each check of the battery removes the task that it exists for, and only the check named does so."""

import itertools
import random

import pytest

from components.environments.kg_query import KnowledgeGraphQuery
from components.environments.kg_query.environment import GraphEpisode
from components.environments.protocol import Observation, Verdict
from components.runtime.contracts import Limits, TaskRecord, ToolCall
from components.synthesis.battery import CHECKS, Battery, constant_submissions, content_identity, mutants, replay

FAMILY = KnowledgeGraphQuery()
TEMPLATE = "works_in/advisers/count"


def battery(family, constant=None):
    return Battery(family, constant or {}, mutants=12, random_plays=3)


def first_removal(family, task, constant=None):
    judge = battery(family, constant)
    assert not judge.keeps(task)
    (check,) = [check for check, number in judge.removed.items() if number]
    assert judge.report()["kept"] == 0
    return check


def remade(task, **changes):
    fields = {name: getattr(task, name) for name in TaskRecord.model_fields if name not in ("id", "stats")}
    return TaskRecord.make(**{**fields, **changes})


class Lenient(KnowledgeGraphQuery):
    """Judges by `rule(episode)` instead of the real verifier."""

    rule = staticmethod(lambda episode: True)

    def reset(self, task):
        rule = self.rule

        class Episode(GraphEpisode):
            def verdict(self):
                return Verdict(1.0, "lenient") if rule(self) else super().verdict()

        return Episode(task)


def test_sound_tasks_are_kept_whatever_the_kind():
    judge = battery(FAMILY)
    rng = random.Random(0)
    for template in rng.sample(FAMILY.templates(), 40):
        assert judge.keeps(FAMILY.generate(template, 3, "train"))
    report = judge.report()
    assert report["checked"] == report["kept"] == 40
    assert set(report["removed"]) == set(CHECKS)
    assert report["mutants_failed_share"] == 1.0


def test_tampered_record():
    task = FAMILY.generate(TEMPLATE, 0, "train")
    assert first_removal(FAMILY, task.model_copy(update={"seed": 1})) == "record"
    call = ToolCall(name="submit", arguments={"answer": 3})
    assert first_removal(FAMILY, remade(task, solution=[*task.solution[:-1], call])) == "record"
    call = ToolCall(name="peek", arguments={})
    assert first_removal(FAMILY, remade(task, solution=[call, *task.solution])) == "record"


def test_reference_that_does_not_solve():
    task = FAMILY.generate(TEMPLATE, 0, "train")
    assert first_removal(FAMILY, remade(task, solution=task.solution[1:])) == "reference"


def test_limits_that_the_reference_exceeds():
    task = FAMILY.generate(TEMPLATE, 0, "train")
    assert first_removal(FAMILY, remade(task, limits=Limits(turns=14, tokens=40))) == "limits"
    assert first_removal(FAMILY, remade(task, limits=Limits(turns=2, tokens=160))) == "limits"


def test_verifier_that_passes_an_empty_answer():
    class Family(Lenient):
        rule = staticmethod(lambda episode: episode.submission == [])

    assert first_removal(Family(), FAMILY.generate(TEMPLATE, 0, "train")) == "empty"


def test_verifier_that_passes_nothing_done():
    class Family(Lenient):
        rule = staticmethod(lambda episode: not episode.calls)

    assert first_removal(Family(), FAMILY.generate(TEMPLATE, 0, "train")) == "empty"


def test_verifier_that_passes_whoever_looked_something_up():
    class Family(Lenient):
        rule = staticmethod(lambda episode: bool(episode.submission) and len(episode.read) == 2)

    task = next(
        task for seed in range(50) if (task := FAMILY.generate(TEMPLATE, seed, "train")).difficulty["pages"] == 3
    )
    judged = [battery(Family()) for _ in range(10)]
    for seed, judge in enumerate(judged):  # the random player submits at a random moment: not on every task
        judge.keeps(remade(task, seed=seed))
    assert sum(judge.removed["random"] for judge in judged) >= 2


def test_verifier_that_passes_the_value_without_look_ups():
    """Without the look-ups in the verdict, the most common count would pass wherever it is the answer."""

    class Family(Lenient):
        rule = staticmethod(lambda episode: episode.submission == episode.verifier["answer"] and not episode.read)

    task = FAMILY.generate(TEMPLATE, 0, "train")
    constant = {"count": task.solution[-1]}
    assert first_removal(Family(), task, constant) == "constant"
    assert battery(FAMILY, constant).keeps(task)


def test_verifier_that_only_compares_the_value():
    """It lets through every mutant that drops a look-up."""

    class Family(Lenient):
        rule = staticmethod(lambda episode: episode.submission == episode.verifier["answer"])

    task = FAMILY.generate("works_in/part_of/offices/list", 0, "train")
    assert first_removal(Family(), task) == "mutants"


def test_verifier_that_lets_some_mutants_through():
    """It forgives one page of four, which about a quarter of the mutants are about."""

    class Family(Lenient):
        rule = staticmethod(
            lambda episode: (
                episode.submission == episode.verifier["answer"]
                and {tuple(lookup) for lookup in episode.verifier["lookups"]} - episode.read
                <= {tuple(episode.verifier["lookups"][0])}
            )
        )

    judge = battery(Family())
    assert not any(judge.keeps(FAMILY.generate("works_in/led_by/lives_in/name", seed, "train")) for seed in range(5))
    assert judge.removed["mutants"] == 5
    assert 0.5 < judge.report()["mutants_failed_share"] < 0.9


def test_verifier_or_state_that_disagrees_with_itself():
    ticks = itertools.count()

    class Moody(GraphEpisode):
        def state_hash(self):
            return f"{super().state_hash()}{next(ticks)}"

    class Chatty(GraphEpisode):
        def step(self, call):
            reply = super().step(call)
            return Observation(f"{reply.content} {next(ticks)}", reply.done, reply.is_error)

    for episode in (Moody, Chatty):

        class Family(KnowledgeGraphQuery):
            reset = staticmethod(episode)
            play = FAMILY.play

        assert first_removal(Family(), FAMILY.generate(TEMPLATE, 0, "train")) == "deterministic"


def test_duplicates_are_the_same_to_a_player_whatever_the_seed():
    task = FAMILY.generate(TEMPLATE, 0, "train")
    again = remade(task, seed=99, split="train")
    assert again.id != task.id
    assert content_identity(again) == content_identity(task)
    judge = battery(FAMILY)
    assert judge.keeps(task)
    assert not judge.keeps(again)
    assert judge.removed["duplicate"] == 1
    assert judge.keeps(FAMILY.generate(TEMPLATE, 1, "train"))


@pytest.mark.parametrize("template", ["works_in/name", TEMPLATE, "works_in/part_of/offices/list"])
def test_mutants_differ_from_the_solution_and_from_each_other(template):
    for seed in range(20):
        task = FAMILY.generate(template, seed, "train")
        made = mutants(task, FAMILY.vocabulary(), 12, random.Random(seed))
        assert len(made) == 12
        assert [task.solution[-1]] in made
        dumped = [str(calls) for calls in made]
        assert len(set(dumped)) == 12
        for calls in made:
            assert calls != task.solution
            assert not replay(FAMILY, task, calls).passed


def test_constant_player_says_what_is_most_often_right():
    tasks = [
        FAMILY.generate(template, seed, "train") for template in ("offices/count", "offices/list") for seed in range(80)
    ]
    constant = constant_submissions(tasks)
    counts = [task.verifier["answer"][0] for task in tasks[:80]]
    most = max(counts.count(value) for value in set(counts))
    assert counts.count(constant["count"].arguments["answer"][0]) == most
    assert set(constant) == {"count", "list"}


def test_constant_player_is_right_by_value_and_fails_all_the_same():
    """The report says how often the constant answer is the right one, a set in any order; the tasks are kept."""
    task = FAMILY.generate("works_in/part_of/offices/list", 2, "train")
    answer = task.solution[-1].arguments["answer"]
    assert len(answer) > 1
    judge = battery(FAMILY, {"list": ToolCall(name="submit", arguments={"answer": answer[::-1]})})
    assert judge.keeps(task)
    assert judge.keeps(FAMILY.generate("works_in/part_of/offices/list", 3, "train"))
    assert judge.report()["constant_value_right_share"] == {"list": 0.5}
