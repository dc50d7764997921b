"""Who plays: our engine (tokens in, tokens out), or an OpenAI-compatible endpoint.

A policy plays many episodes at once. `begin` starts one, `poll` returns the turns that ended since, each of which is
answered with `reply` or closed with `finish`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tokenizers import Tokenizer

from components.environments.chat_format import ChatFormatError, parse_assistant, prompt_words, reply_words
from components.runtime.contracts import Limits, Message, ToolCall, ToolDefinition
from model.engine import Engine, SamplingParameters, Trajectory


@dataclass(frozen=True)
class PolicyTurn:
    """A turn that ended. `message` is None when what the model wrote is no message; `error` says why then."""

    episode: int
    message: Message | None
    error: str = ""


class Policy(Protocol):
    def begin(
        self, episode: int, messages: Sequence[Message], tools: Sequence[ToolDefinition], limits: Limits, seed: int
    ) -> None: ...
    def poll(self) -> list[PolicyTurn]: ...
    def reply(self, episode: int, messages: Sequence[Message]) -> bool:
        """False when the trajectory's token limit leaves no room for the reply."""
        ...

    def finish(self, episode: int) -> Trajectory | None: ...


class EnginePolicy:
    """Our engine. Replies are appended as tokens; what the model wrote is never re-tokenised."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, sampling: SamplingParameters) -> None:
        self.engine, self.tokenizer, self.sampling = engine, tokenizer, sampling
        self._words = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
        self._ids = {word: index for index, word in enumerate(self._words)}
        self._handles: dict[int, int] = {}
        self._episodes: dict[int, int] = {}
        self._tools: dict[int, Sequence[ToolDefinition]] = {}

    def encode(self, words: Sequence[str]) -> list[int]:
        """Token ids of words. A closed word-level vocabulary maps directly; any other tokenizer encodes the text."""
        ids = [self._ids.get(word, -1) for word in words]
        return ids if min(ids) >= 0 else self.tokenizer.encode(" ".join(words), add_special_tokens=False).ids

    def begin(
        self, episode: int, messages: Sequence[Message], tools: Sequence[ToolDefinition], limits: Limits, seed: int
    ) -> None:
        sampling = replace(self.sampling, seed=seed)
        handle = self.engine.add(self.encode(prompt_words(messages, tools)), sampling, max_total_tokens=limits.tokens)
        self._handles[episode], self._episodes[handle], self._tools[episode] = handle, episode, tools

    def poll(self) -> list[PolicyTurn]:
        turns = []
        for turn in self.engine.step():
            episode = self._episodes[turn.handle]
            if turn.finish_reason == "length":
                turns.append(PolicyTurn(episode, None, "the turn reached its length limit"))
                continue
            words = [self._words[token] for token in turn.token_ids]
            try:
                turns.append(PolicyTurn(episode, parse_assistant(words, self._tools[episode])))
            except ChatFormatError as error:
                turns.append(PolicyTurn(episode, None, str(error)))
        return turns

    def reply(self, episode: int, messages: Sequence[Message]) -> bool:
        return self.engine.extend(self._handles[episode], self.encode(reply_words(messages)))

    def finish(self, episode: int) -> Trajectory:
        handle = self._handles.pop(episode)
        del self._episodes[handle], self._tools[episode]
        return self.engine.release(handle)


class OpenAIPolicy:
    """A chat completions endpoint, driven by the official client. One request at a time, in the order of `begin`."""

    def __init__(
        self, base_url: str, model: str, *, api_key: str = "none", stream: bool = False, **options: Any
    ) -> None:
        import openai

        self.client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=2)
        self.model, self.stream, self.options = model, stream, options
        self.tokens = 0
        self._waiting: deque[int] = deque()
        self._messages: dict[int, list[dict[str, Any]]] = {}
        self._tools: dict[int, list[dict[str, Any]]] = {}
        self._seeds: dict[int, int] = {}
        self._calls: dict[int, list[str]] = {}

    def begin(
        self, episode: int, messages: Sequence[Message], tools: Sequence[ToolDefinition], limits: Limits, seed: int
    ) -> None:
        self._messages[episode] = [{"role": m.role, "content": m.content} for m in messages]
        self._tools[episode] = [tool.openai() for tool in tools]
        self._seeds[episode] = seed
        self._waiting.append(episode)

    def poll(self) -> list[PolicyTurn]:
        if not self._waiting:
            return []
        episode = self._waiting.popleft()
        content, calls, reason = self._complete(episode)
        if reason == "length":
            return [PolicyTurn(episode, None, "the turn reached its length limit")]
        self._messages[episode].append(
            {
                "role": "assistant",
                "content": content or None,
                **({"tool_calls": calls} if calls else {}),
            }
        )
        self._calls[episode] = [call["id"] for call in calls]
        try:
            parsed = [
                ToolCall(name=c["function"]["name"], arguments=json.loads(c["function"]["arguments"])) for c in calls
            ]
        except json.JSONDecodeError as error:
            return [PolicyTurn(episode, None, f"the arguments are no JSON: {error}")]
        return [PolicyTurn(episode, Message(role="assistant", content=content, tool_calls=parsed))]

    def _complete(self, episode: int) -> tuple[str, list[dict[str, Any]], str]:
        request = {
            "model": self.model,
            "messages": self._messages[episode],
            "tools": self._tools[episode],
            "seed": self._seeds[episode],
            **self.options,
        }
        if not self.stream:
            answer = self.client.chat.completions.create(**request)
            self.tokens += answer.usage.completion_tokens if answer.usage else 0
            choice = answer.choices[0]
            calls = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in choice.message.tool_calls or []
            ]
            return choice.message.content or "", calls, choice.finish_reason
        content, reason = "", ""
        by_index: dict[int, dict[str, Any]] = {}
        stream = self.client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        for chunk in stream:
            if chunk.usage:
                self.tokens += chunk.usage.completion_tokens
            for choice in chunk.choices:
                content += choice.delta.content or ""
                reason = choice.finish_reason or reason
                for part in choice.delta.tool_calls or []:
                    call = by_index.setdefault(
                        part.index, {"id": part.id, "type": "function", "function": {"name": "", "arguments": ""}}
                    )
                    call["function"]["name"] += part.function.name or ""
                    call["function"]["arguments"] += part.function.arguments or ""
        return content, list(by_index.values()), reason

    def reply(self, episode: int, messages: Sequence[Message]) -> bool:
        for message, call in zip(messages, self._calls[episode], strict=True):
            self._messages[episode].append({"role": "tool", "tool_call_id": call, "content": message.content})
        self._waiting.append(episode)
        return True

    def finish(self, episode: int) -> None:
        del self._messages[episode], self._tools[episode], self._seeds[episode]
        self._calls.pop(episode, None)
