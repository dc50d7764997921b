"""The agent loop with a scripted policy against the real environment, and the engine's policy against its tokens."""

import pytest
from tokenizers import Tokenizer

from components.environments.chat_format import END, SPECIAL_WORDS, UNKNOWN, conversation_words
from components.environments.protocol import environment
from components.rollouts import EnginePolicy, EpisodeRequest, run_episodes
from components.rollouts.loop import episode_trace
from components.rollouts.policies import PolicyTurn
from components.runtime.contracts import Message
from model import ModelConfig, Transformer
from model.checkpoint import word_tokenizer
from model.engine import Engine, SamplingParameters


@pytest.fixture(scope="module")
def family():
    return environment("kg_query")


@pytest.fixture(scope="module")
def tasks(family):
    return [family.generate(template, 7, "train") for template in family.templates()[::60]]


class Scripted:
    """Plays given messages, one episode after another, the last episode first: order must not matter."""

    def __init__(self, scripts):
        self.scripts, self.waiting, self.finished = scripts, [], []

    def begin(self, episode, messages, tools, limits, seed):
        self.waiting.append(episode)

    def poll(self):
        episode = self.waiting.pop()
        script = self.scripts[episode]
        if not script:
            return [PolicyTurn(episode, None, "nothing left")]
        return [PolicyTurn(episode, script.pop(0))]

    def reply(self, episode, messages):
        self.waiting.append(episode)
        return True

    def finish(self, episode):
        self.finished.append(episode)


def turns(calls):
    return [Message(role="assistant", tool_calls=[call]) for call in calls]


def test_the_reference_solution_passes_and_half_of_it_does_not(family, tasks):
    scripts = [turns(task.solution) for task in tasks] + [turns(task.solution[:-1]) for task in tasks]
    policy = Scripted(scripts)
    results = run_episodes(policy, [EpisodeRequest(family, task, 0) for task in tasks + tasks])
    assert [result.verdict.passed for result in results] == [True] * len(tasks) + [False] * len(tasks)
    assert [result.task.id for result in results] == [task.id for task in tasks + tasks]
    assert {result.ended for result in results[: len(tasks)]} == {"submitted"}
    assert all(result.ended.startswith("malformed") for result in results[len(tasks) :])
    assert sorted(policy.finished) == list(range(2 * len(tasks)))


def test_plain_words_and_too_many_turns_end_an_episode(family, tasks):
    task = tasks[0]
    look = [Message(role="assistant", tool_calls=[task.solution[0]]) for _ in range(task.limits.turns + 5)]
    results = run_episodes(
        Scripted([[Message(role="assistant", content="hello")], look]),
        [EpisodeRequest(family, task, 0)] * 2,
    )
    assert [result.ended for result in results] == ["no_call", "turns"]
    assert results[1].turns == task.limits.turns


def test_the_trajectory_is_the_conversation(family, tasks):
    """What the engine recorded equals the rendered messages, and exactly the assistant's words are marked sampled."""
    tokenizer: Tokenizer = word_tokenizer(SPECIAL_WORDS, family.vocabulary(), UNKNOWN)
    config = ModelConfig.preset("micro", vocab_size=tokenizer.get_vocab_size(), initializer_range=0.3)
    engine = Engine(
        Transformer(config).initialise(0).eval(),
        stop_token_id=tokenizer.token_to_id(END),
        max_sequences=8,
        max_sequence_tokens=160,
    )

    class Forced:
        """Makes the random network write the reference solution, token by token."""

        def __init__(self, ids):
            self.ids = ids

        def allowed(self, token_ids):
            import torch

            mask = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.bool)
            mask[self.ids[len(token_ids)]] = True
            return mask

    for task in tasks[:3]:
        messages, episode = list(task.messages), family.reset(task)
        for call in task.solution:
            messages.append(Message(role="assistant", tool_calls=[call]))
            messages.append(Message(role="tool", content=episode.step(call).content))
        words, written = conversation_words(messages[:-1], task.tools)
        ids = [tokenizer.token_to_id(word) for word in words]
        sampling = SamplingParameters(logit_mask=Forced(ids), max_new_tokens=60)
        (result,) = run_episodes(EnginePolicy(engine, tokenizer, sampling), [EpisodeRequest(family, task, 3)])
        assert result.verdict.passed
        assert result.trajectory.token_ids.tolist() == ids
        assert result.trajectory.sampled.tolist() == written
        assert result.messages[:-1] == messages[:-1]
    assert engine.live == 0


def test_a_trace_tells_every_turn_every_call_and_when(family, tasks):
    task = max(tasks, key=lambda task: len(task.solution))
    (result,) = run_episodes(Scripted([turns(task.solution)]), [EpisodeRequest(family, task, 5)])
    trace = episode_trace(result)
    spans = trace["spans"]
    calls = [call.name for call in task.solution]
    expected = ["reset", *(name for n, call in enumerate(calls, 1) for name in (f"turn {n}", call)), "verdict"]
    assert [span["name"] for span in spans] == expected
    times = [time for span in spans for time in (span["start"], span["end"])]
    assert times == sorted(times)
    told = [span for span in spans if span["kind"] == "tool"]
    assert [span["inputs"] for span in told] == [call.arguments for call in task.solution]
    replies = [message.content for message in result.messages if message.role == "tool"]
    assert [span["outputs"] for span in told][: len(replies)] == replies
    assert trace["outputs"] == {"reward": 1.0, "reason": result.verdict.reason, "ended": "submitted"}
    assert trace["tags"] == {"task": task.id, "template": task.template, "seed": "5"}
