"""What an environment does wrong is a fault of its own episode, by name; the episode beside it is played as ever."""

import contextlib
import math
import signal
import threading
import time

import pytest

from components.environments.protocol import Observation, Verdict, environment
from components.evaluation.play import item_of
from components.rollouts import EpisodeRequest, run_episodes
from components.rollouts.guard import GuardedEpisode
from components.rollouts.policies import PolicyTurn
from components.runtime.contracts import Message

FAMILY = environment("kg_query")
TASK = FAMILY.generate(FAMILY.templates()[20], 1, "train")


class Solver:
    """Plays the solution in every episode, turn about."""

    def __init__(self):
        self.left, self.waiting = {}, []

    def begin(self, episode, *_):
        self.left[episode] = list(TASK.solution)
        self.waiting.append(episode)

    def poll(self):
        episode = self.waiting.pop(0)
        return [PolicyTurn(episode, Message(role="assistant", tool_calls=[self.left[episode].pop(0)]))]

    def reply(self, episode, messages):
        self.waiting.append(episode)
        return True

    def finish(self, episode):
        return None


class Faulty:
    """kg_query, in which one call is replaced."""

    def __init__(self, **replaced):
        self.replaced = replaced

    def reset(self, task):
        if "reset" in self.replaced:
            return self.replaced["reset"]()
        episode, replaced = FAMILY.reset(task), self.replaced

        class Replaced:
            def step(self, call):
                return replaced["step"]() if "step" in replaced else episode.step(call)

            def verdict(self):
                return replaced["verdict"]() if "verdict" in replaced else episode.verdict()

        return Replaced()


def raises():
    raise KeyError("lost")


def spins():
    while True:
        pass


def swallows():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(600)


def flips():
    verdicts = [0.0, 1.0]
    return lambda: Verdict(verdicts.pop(), "by lot")


CASES = {
    "reset raises": ({"reset": raises}, "environment_raised: reset: KeyError: 'lost'"),
    "step raises": ({"step": raises}, "environment_raised: the call of neighbors: KeyError: 'lost'"),
    "verifier raises": ({"verdict": raises}, "environment_raised: the verifier: KeyError: 'lost'"),
    "reset spins": ({"reset": spins}, "environment_hangs: reset took more than 0.3 s"),
    "step sleeps": ({"step": swallows}, "environment_hangs: the call of neighbors took more than 0.3 s"),
    "verifier spins": ({"verdict": spins}, "environment_hangs: the verifier took more than 0.3 s"),
    "no text": (
        {"step": lambda: Observation({"a": 1})},
        "bad_observation: the call of neighbors gave dict and no text",
    ),
    "nothing": ({"step": lambda: None}, "bad_observation: the call of neighbors gave NoneType and no text"),
    "no verdict": ({"verdict": lambda: 1.0}, "bad_reward: the verifier gave float and no verdict"),
    "text as reward": ({"verdict": lambda: Verdict("1", "")}, "bad_reward: '1' is no number"),
    "not a number": ({"verdict": lambda: Verdict(math.nan, "")}, "bad_reward: nan lies outside [0, 1]"),
    "out of range": ({"verdict": lambda: Verdict(2.0, "")}, "bad_reward: 2.0 lies outside [0, 1]"),
    "disagrees": ({"verdict": flips()}, "verifier_disagrees: it gave 1.0 (by lot), and asked again 0.0 (by lot)"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_named_and_spoils_nothing_else(name):
    replaced, fault = CASES[name]
    requests = [EpisodeRequest(Faulty(**replaced), TASK, 0), EpisodeRequest(FAMILY, TASK, 0)]
    faulty, sound = run_episodes(Solver(), requests, call_seconds=0.3)
    assert (faulty.fault, faulty.ended, faulty.verdict) == (fault, "fault", Verdict(0.0, fault))
    assert (sound.fault, sound.ended, sound.verdict.reward) == ("", "submitted", 1.0)
    item = item_of(faulty, player="after", measure="sampled", temperature=1.0)
    assert (item.fault, item.reward) == (fault, 0.0)


def test_a_timer_that_ran_before_goes_on():
    fired = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: fired.set())
    outer = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        (result,) = run_episodes(Solver(), [EpisodeRequest(FAMILY, TASK, 0)], call_seconds=5)
        assert result.verdict.reward == 1.0
        assert fired.wait(2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, before)


def test_outside_the_main_thread_there_is_no_deadline_but_the_other_faults_are_found():
    found = []
    thread = threading.Thread(target=lambda: found.append(GuardedEpisode(Faulty(reset=raises), TASK, 1.0).fault))
    thread.start()
    thread.join()
    assert found == ["environment_raised: reset: KeyError: 'lost'"]
