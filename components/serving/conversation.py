"""Between the OpenAI API and the chat format: request messages -> words, written words -> content and tool calls."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from components.environments.chat_format import (
    CALL,
    END,
    SPECIAL_WORDS,
    ChatFormatError,
    call_words,
    parse_assistant,
    prompt_words,
)
from components.runtime.contracts import Message, ToolCall, ToolDefinition
from components.serving.requests import ApiError, ChatRequest, RequestMessage


def request_words(request: ChatRequest) -> tuple[list[str], list[ToolDefinition]]:
    """The words of the prompt and the tools. Raises ApiError (400) for a conversation that cannot be answered."""
    tools = [tool.definition() for tool in request.tools]
    if len({tool.name for tool in tools}) < len(tools):
        raise ApiError(400, "two tools have the same name", param="tools")
    for tool in tools:
        if any(word.split() != [word] or word in SPECIAL_WORDS for word in [tool.name, *_properties(tool)]):
            raise ApiError(400, f"the names of tool {tool.name!r} must be single, unreserved words", param="tools")
    by_name = {tool.name: tool for tool in tools}
    messages = [_message(message, by_name, f"messages[{i}]") for i, message in enumerate(request.messages)]
    try:
        return prompt_words(messages, tools), tools
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error


def _properties(tool: ToolDefinition | None) -> list[str]:
    return list(tool.input_schema.get("properties", {})) if tool else []


def _message(message: RequestMessage, tools: dict[str, ToolDefinition], where: str) -> Message:
    text = message.text()
    # A word of the chat format inside a text would be read as structure: a tool result could forge a turn. What the
    # model itself wrote (a call that did not parse) comes back as the assistant's content, as it was.
    forbidden = {END} if message.role == "assistant" else set(SPECIAL_WORDS)
    forged = [word for word in text.split() if word in forbidden]
    if forged:
        raise ApiError(400, f"{where} holds the reserved word {forged[0]}", param=where)
    if message.tool_calls and message.role != "assistant":
        raise ApiError(400, f"{where}: only an assistant message has tool_calls", param=where)
    calls = []
    for call in message.tool_calls or []:
        arguments = json.loads(call.function.arguments)
        order = [key for key in _properties(tools.get(call.function.name)) if key in arguments]
        order += [key for key in arguments if key not in order]
        written = ToolCall(name=call.function.name, arguments={key: arguments[key] for key in order})
        parts = [ToolCall(name=written.name, arguments={key: arguments[key]}) for key in order]
        if any(word in SPECIAL_WORDS for part in parts for word in [written.name, *call_words(part)[2:]]):
            raise ApiError(400, f"{where}: a tool call holds a reserved word", param=where)
        calls.append(written)
    role = "system" if message.role == "developer" else message.role
    return Message(role=role, content=text, tool_calls=calls)


@dataclass
class Answer:
    """The text of a turn as it grows, split into what is content and what is a call.

    `content` may be sent at any time; calls are known when the turn has ended.
    """

    tools: Sequence[ToolDefinition]
    stop_texts: Sequence[str] = ()
    words: list[str] = field(default_factory=list)
    content: str = ""
    stopped: bool = False

    def add(self, word: str) -> str:
        """Take one more word; returns the content that became certain with it ("" when none did)."""
        self.words.append(word)
        if CALL in self.words or word == END or self.stopped:
            return self._flush(hold=0)
        text = self._text()
        found = [text.find(stop) for stop in self.stop_texts if stop in text]
        if found:
            self.stopped = True
            text = text[: min(found)]
            fresh, self.content = text[len(self.content) :], text
            return fresh
        return self._flush(hold=max((len(stop) for stop in self.stop_texts), default=1) - 1)

    def _text(self) -> str:
        """The content: words before the first call."""
        words = self.words[: self.words.index(CALL)] if CALL in self.words else self.words
        return " ".join(word for word in words if word != END)

    def _flush(self, hold: int) -> str:
        if self.stopped:
            return ""
        text = self._text()
        certain = text[: len(text) - hold] if hold else text
        if len(certain) <= len(self.content):
            return ""
        fresh, self.content = certain[len(self.content) :], certain
        return fresh

    def end(self) -> tuple[str, list[ToolCall]]:
        """The turn has ended: content that was held back, and the calls. A call that does not parse is content."""
        fresh = self._flush(hold=0)
        if CALL not in self.words or self.stopped:
            return fresh, []
        try:
            return fresh, parse_assistant(self.words, self.tools).tool_calls
        except ChatFormatError:
            raw = " ".join(word for word in self.words[self.words.index(CALL) :] if word != END)
            raw = f" {raw}" if self.content else raw
            self.content += raw
            return fresh + raw, []


def openai_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Tool calls in the API's form, each with a fresh id."""
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in calls
    ]
