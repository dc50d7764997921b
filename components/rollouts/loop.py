"""The agent loop: the policy writes a turn, the environment answers its tool calls, until the episode ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from components.environments.protocol import Environment, Verdict
from components.rollouts.guard import GuardedEpisode
from components.rollouts.policies import Policy
from components.runtime.contracts import Message, TaskRecord
from model.engine import Trajectory

CALL_SECONDS = 60.0  # longer than any sandboxed program may run


@dataclass(frozen=True)
class EpisodeRequest:
    environment: Environment
    task: TaskRecord
    seed: int


@dataclass(frozen=True)
class Span:
    """A part of an episode: `kind` is generation (a turn), tool (a call), or environment (`name` reset or verdict).

    Times are nanoseconds since the epoch. A turn is generated beside those of other episodes.
    """

    kind: Literal["generation", "tool", "environment"]
    name: str
    start: int
    end: int


@dataclass
class EpisodeResult:
    """One finished episode. `ended` says how: submitted, no_call, malformed, turns, tokens, fault.

    fault: what the environment did wrong (see components.rollouts.guard), or ""; the reward is 0 then.
    spans: its parts in order, one for each assistant message and each call that was answered among them.
    """

    task: TaskRecord
    seed: int
    messages: list[Message]
    verdict: Verdict
    trajectory: Trajectory | None
    turns: int
    tool_errors: int
    ended: str
    fault: str = ""
    spans: list[Span] = field(default_factory=list)


@dataclass
class _Play:
    request: EpisodeRequest
    episode: GuardedEpisode
    messages: list[Message] = field(default_factory=list)
    turns: int = 0
    tool_errors: int = 0
    waits_since: int = 0  # for its turn
    spans: list[Span] = field(default_factory=list)

    def took(self, kind: Literal["generation", "tool", "environment"], name: str, start: int) -> None:
        self.waits_since = time.time_ns()
        self.spans.append(Span(kind, name, start, self.waits_since))


def run_episodes(
    policy: Policy,
    requests: Iterable[EpisodeRequest],
    *,
    on_episode: Callable[[EpisodeResult], None] | None = None,
    call_seconds: float = CALL_SECONDS,
) -> list[EpisodeResult]:
    """Play all requests (the policy batches what it can); results in the order of the requests.

    A call of an environment may take `call_seconds`; what it does wrong ends its own episode with a `fault`.
    """
    plays: dict[int, _Play] = {}
    for index, request in enumerate(requests):
        task, started = request.task, time.time_ns()
        episode = GuardedEpisode(request.environment, task, call_seconds)
        plays[index] = _Play(request, episode, list(task.messages))
        plays[index].took("environment", "reset", started)
        policy.begin(index, task.messages, task.tools, task.limits, request.seed)
    results: dict[int, EpisodeResult] = {}
    while len(results) < len(plays):
        for turn in policy.poll():
            play = plays[turn.episode]
            play.took("generation", f"turn {play.turns + 1}", play.waits_since)
            ended = _take_turn(policy, turn.episode, play, turn.message)
            if not ended:
                continue
            judged = time.time_ns()
            verdict = play.episode.verdict()
            play.took("environment", "verdict", judged)
            if play.episode.fault:
                ended = "fault"
            result = EpisodeResult(
                task=play.request.task,
                seed=play.request.seed,
                messages=play.messages,
                verdict=verdict,
                trajectory=policy.finish(turn.episode),
                turns=play.turns,
                tool_errors=play.tool_errors,
                ended=ended if ended != "malformed" or not turn.error else f"malformed: {turn.error}",
                fault=play.episode.fault,
                spans=play.spans,
            )
            results[turn.episode] = result
            if on_episode:
                on_episode(result)
    return [results[index] for index in sorted(results)]


def _take_turn(policy: Policy, index: int, play: _Play, message: Message | None) -> str:
    """Play one turn; how the episode ended, or "" when it goes on."""
    play.turns += 1
    if message is None:
        return "malformed"
    play.messages.append(message)
    if not message.tool_calls:
        return "no_call"
    replies = []
    for call in message.tool_calls:
        called = time.time_ns()
        observation = play.episode.step(call)
        play.took("tool", call.name, called)
        play.tool_errors += observation.is_error
        replies.append(Message(role="tool", content=observation.content))
        if observation.done:
            play.messages.extend(replies)
            return "submitted"
    play.messages.extend(replies)
    if play.turns >= play.request.task.limits.turns:
        return "turns"
    return "" if policy.reply(index, replies) else "tokens"


def transcript(result: EpisodeResult) -> str:
    """An episode as a person reads it."""
    lines = [f"{result.task.template}: {'passed' if result.verdict.passed else 'failed'} ({result.verdict.reason})"]
    for message in result.messages:
        calls = " ".join(
            f"{call.name}({', '.join(f'{k}={v}' for k, v in call.arguments.items())})" for call in message.tool_calls
        )
        lines.append(f"  {message.role:>9}  {' '.join(part for part in (message.content, calls) if part)}")
    return "\n".join(lines)


def episode_trace(result: EpisodeResult) -> dict[str, Any]:
    """The episode with its parts and their times, in plain values, for `Tracker.trace`."""
    replies = iter([message for message in result.messages if message.role == "tool"])
    written = iter([message for message in result.messages if message.role == "assistant"])
    calls = iter([call for message in result.messages for call in message.tool_calls])
    spans = []
    for span in result.spans:
        values: dict[str, Any] = {"kind": span.kind, "name": span.name, "start": span.start, "end": span.end}
        if span.kind == "generation" and (message := next(written, None)) is not None:
            values["outputs"] = message.model_dump(mode="json", exclude_defaults=True)
        if span.kind == "tool" and (call := next(calls, None)) is not None:
            reply = next(replies, None)
            values |= {"inputs": call.arguments, "outputs": reply.content if reply else ""}
        if span.name == "verdict":
            values["outputs"] = {"reward": float(result.verdict.reward), "reason": result.verdict.reason}
        spans.append(values)
    return {
        "name": result.task.environment,
        "inputs": [message.model_dump(mode="json", exclude_defaults=True) for message in result.task.messages],
        "outputs": {"reward": float(result.verdict.reward), "reason": result.verdict.reason, "ended": result.ended},
        "tags": {"task": result.task.id, "template": result.task.template, "seed": str(result.seed)},
        "spans": spans,
    }
