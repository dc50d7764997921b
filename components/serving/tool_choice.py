"""`tool_choice` as a mask over the next word: the call is right by construction, not by hope.

none: no call. required: the turn ends with a call of a known tool whose arguments have the schema's number and types.
A named function: the same, of that tool. auto: no mask, the model's own distribution as in training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from components.environments.chat_format import ARG, CALL, END, SPECIAL_WORDS
from components.runtime.contracts import ToolDefinition

# a model that has to call something may think aloud before, and write arguments, but not without end
MOST_CONTENT_WORDS = MOST_ARGUMENT_WORDS = 24


class ToolChoiceMask:
    """A `model.engine.LogitMask` for one turn.

    words: the vocabulary by token id; prompt_length: tokens before the turn; allowed_tools: tools that may be called
    (none: calls are forbidden); must_call: the turn may not end without a call; one_call: at most one call.
    """

    def __init__(
        self,
        words: Sequence[str],
        prompt_length: int,
        allowed_tools: Sequence[ToolDefinition],
        *,
        must_call: bool,
        one_call: bool,
    ) -> None:
        self.words, self.prompt_length = words, prompt_length
        self.tools = {tool.name: tool for tool in allowed_tools}
        self.must_call, self.one_call = must_call, one_call
        self.ids = {word: i for i, word in enumerate(words)}
        special = {self.ids[word] for word in SPECIAL_WORDS if word in self.ids}
        self.plain_V = torch.tensor([i not in special for i in range(len(words))])
        self.integers_V = torch.tensor([word.lstrip("-").isdigit() for word in words])

    def allowed(self, token_ids: list[int]) -> torch.Tensor:
        """bool [V] of the tokens that may come next."""
        turn = [self.words[i] for i in token_ids[self.prompt_length :]]
        if CALL not in turn:
            endless = self.must_call and len(turn) >= MOST_CONTENT_WORDS
            allowed_V = torch.zeros_like(self.plain_V) if endless else self.plain_V.clone()
            self._set(allowed_V, CALL, bool(self.tools))
            self._set(allowed_V, END, not self.must_call)
            return allowed_V
        last_call = len(turn) - 1 - turn[::-1].index(CALL)
        return self._inside(turn[last_call + 1 :])

    def _set(self, allowed_V: torch.Tensor, word: str, value: bool) -> None:
        allowed_V[self.ids[word]] = value

    def _inside(self, call: list[str]) -> torch.Tensor:
        """What may follow inside a call: the tool's name, then arguments that fit its schema, then the end."""
        nothing_V = torch.zeros(len(self.words), dtype=torch.bool)
        if not call:
            for name in self.tools:
                self._set(nothing_V, name, True)
            return nothing_V
        schema = self.tools[call[0]].input_schema
        properties = list(schema.get("properties", {}).values())
        position = call.count(ARG)
        written = len(call) - 1 if position == 0 else len(call) - 1 - (len(call) - 1 - call[::-1].index(ARG))
        kind = properties[position].get("type", "string") if properties else None
        allowed_V = nothing_V
        if kind == "integer" and written == 0:
            allowed_V = self.integers_V.clone()
        elif kind not in ("integer", None) and written < MOST_ARGUMENT_WORDS:
            allowed_V = self.plain_V.clone()
        if written > 0 or not properties:
            enough = position + 1 >= len(schema.get("required", [])) or not properties
            self._set(allowed_V, END, enough)
            self._set(allowed_V, CALL, enough and not self.one_call)
            self._set(allowed_V, ARG, position + 1 < len(properties))
        return allowed_V
