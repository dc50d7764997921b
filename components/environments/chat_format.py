"""One text for one conversation: messages and tools -> words, and the words of an assistant turn -> message.

The text is a sequence of words joined by single spaces; the tokenizer is word-level, so words are tokens. A tool call
is written `<|call|> name first <|arg|> second <|end|>`, its arguments in the order of the schema's properties.

    <|bos|> <|tools|> neighbors entity relation page <|tools|> submit answer <|user|> ... <|assistant|>
    <|call|> neighbors e17 <|arg|> works_at <|arg|> 1 <|end|> <|tool|> e5 <|assistant|> ...

The same rules stand in the checkpoint's chat template (`CHAT_TEMPLATE`), which stock `transformers` reads; a test
compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.runtime.contracts import Message, ToolCall, ToolDefinition

BOS, PAD, UNKNOWN = "<|bos|>", "<|pad|>", "<|unknown|>"
TOOLS, SYSTEM, USER, ASSISTANT, TOOL = "<|tools|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
CALL, ARG, END = "<|call|>", "<|arg|>", "<|end|>"
SPECIAL_WORDS = [PAD, BOS, UNKNOWN, TOOLS, SYSTEM, USER, ASSISTANT, TOOL, CALL, ARG, END]

CHAT_TEMPLATE = (
    "{{- '<|bos|>' -}}"
    "{%- for t in (tools or []) -%}{{- ' <|tools|> ' ~ t.function.name -}}"
    "{%- for p in t.function.parameters.properties -%}{{- ' ' ~ p -}}{%- endfor -%}{%- endfor -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}"
    "{%- if m.content -%}{{- ' ' ~ m.content -}}{%- endif -%}"
    "{%- for c in (m.tool_calls or []) -%}{%- set f = c.function if c.function is defined else c -%}"
    "{{- ' <|call|> ' ~ f.name -}}"
    "{%- for v in f.arguments.values() -%}{{- ' <|arg|> ' if not loop.first else ' ' -}}"
    "{{- (v | join(' ')) if (v is sequence and v is not string) else v -}}{%- endfor -%}"
    "{%- endfor -%}{{- ' <|end|>' -}}"
    "{%- else -%}{{- ' <|' ~ m.role ~ '|> ' ~ m.content -}}"
    "{%- if loop.last or loop.nextitem.role == 'assistant' -%}{{- ' <|assistant|>' -}}{%- endif -%}"
    "{%- endif -%}{%- endfor -%}"
)


class ChatFormatError(ValueError):
    """The model wrote something that is no tool call, or a call that does not fit the tool's schema."""


def _argument_words(value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return str(value).split()


def call_words(call: ToolCall) -> list[str]:
    """`<|call|> name a <|arg|> b`, without the closing `<|end|>`."""
    words = [CALL, call.name]
    for position, value in enumerate(call.arguments.values()):
        if position:
            words.append(ARG)
        words.extend(_argument_words(value))
    return words


def assistant_words(message: Message) -> list[str]:
    """What the model itself writes for one assistant message, `<|end|>` included."""
    words = message.content.split()
    for call in message.tool_calls:
        words.extend(call_words(call))
    return [*words, END]


def reply_words(messages: Sequence[Message]) -> list[str]:
    """What is put between two assistant turns: tool results (or a new user message), then `<|assistant|>`."""
    words: list[str] = []
    for message in messages:
        words.extend([f"<|{message.role}|>", *message.content.split()])
    return [*words, ASSISTANT]


def prompt_words(messages: Sequence[Message], tools: Sequence[ToolDefinition]) -> list[str]:
    """The words before an assistant turn: tools, the conversation so far, `<|assistant|>`.

    Raises ValueError when the conversation ends with an assistant message.
    """
    if not messages or messages[-1].role == "assistant":
        raise ValueError("a prompt ends with a system, user or tool message")
    words, _ = conversation_words(messages, tools)
    return words


def conversation_words(messages: Sequence[Message], tools: Sequence[ToolDefinition]) -> tuple[list[str], list[bool]]:
    """The whole conversation as words, and for each word whether an assistant wrote it (what is trained on)."""
    words = [BOS]
    for tool in tools:
        words.extend([TOOLS, tool.name, *tool.input_schema.get("properties", {})])
    by_assistant = [False] * len(words)
    pending: list[Message] = []
    for message in messages:
        if message.role != "assistant":
            pending.append(message)
            continue
        reply = reply_words(pending)
        turn = assistant_words(message)
        words += reply + turn
        by_assistant += [False] * len(reply) + [True] * len(turn)
        pending = []
    if pending:
        reply = reply_words(pending)
        words += reply
        by_assistant += [False] * len(reply)
    return words, by_assistant


def _convert(words: list[str], schema: dict[str, Any], where: str) -> Any:
    kind = schema.get("type", "string")
    if kind == "array":
        return list(words)
    if kind == "integer":
        if len(words) != 1 or not words[0].lstrip("-").isdigit():
            raise ChatFormatError(f"{where} must be one integer, got {' '.join(words)!r}")
        return int(words[0])
    if not words:
        raise ChatFormatError(f"{where} is empty")
    return " ".join(words)


def parse_assistant(words: Sequence[str], tools: Sequence[ToolDefinition]) -> Message:
    """The assistant message that `words` (without or with the closing `<|end|>`) say.

    Raises ChatFormatError when a call names no known tool or its arguments do not fit the schema.
    """
    body = list(words[:-1] if words and words[-1] == END else words)
    if CALL not in body:
        return Message(role="assistant", content=" ".join(body))
    start = body.index(CALL)
    content = " ".join(body[:start])
    by_name = {tool.name: tool for tool in tools}
    calls = []
    for segment in _split(body[start + 1 :], CALL):
        if not segment or segment[0] not in by_name:
            raise ChatFormatError(f"unknown tool {segment[0] if segment else ''!r}; known: {', '.join(by_name)}")
        name = segment[0]
        properties: dict[str, Any] = by_name[name].input_schema.get("properties", {})
        values = _split(segment[1:], ARG) if len(segment) > 1 else []
        required = by_name[name].input_schema.get("required", [])
        if len(values) > len(properties) or len(values) < len(required):
            raise ChatFormatError(f"{name} takes {', '.join(properties) or 'no arguments'}; got {len(values)} values")
        arguments = {
            key: _convert(value, properties[key], f"{name}.{key}")
            for key, value in zip(properties, values, strict=False)
        }
        calls.append(ToolCall(name=name, arguments=arguments))
    return Message(role="assistant", content=content, tool_calls=calls)


def _split(words: list[str], separator: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts
