"""The benchmark's own counting: steps against a count by hand, and tasks that are really made."""

import time

from components.environments.kg_query import KnowledgeGraphQuery
from components.synthesis import benchmark


def test_steps_are_resets_calls_and_verdicts(monkeypatch):
    counted = {"steps": 0}
    family = KnowledgeGraphQuery()

    class Counted(KnowledgeGraphQuery):
        def reset(self, task):
            counted["steps"] += 1
            episode = family.reset(task)

            class Episode:
                def step(self, call):
                    counted["steps"] += 1
                    return episode.step(call)

                def verdict(self):
                    counted["steps"] += 1
                    return episode.verdict()

            return Episode()

        def play(self, task, kind, rng):
            return family.play(task, kind, rng)

    seconds = iter([10.0, 12.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    rate = benchmark.steps_per_second(Counted(), number=20, rounds=1)
    assert rate == counted["steps"] / 2.0
    assert counted["steps"] > 20 * 4


def test_all_tasks_are_made_and_validated():
    assert benchmark._make("kg_query", 7, 0) == 7
