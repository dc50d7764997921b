"""What a client may send to /v1/chat/completions, with the names and meanings of the OpenAI API.

A parameter that this server cannot honour is refused, never ignored: a client that asks for it expects it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.runtime.contracts import ToolDefinition


class ApiError(Exception):
    """An error in the OpenAI form: {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Lenient(BaseModel):
    """Messages come back from clients with fields that they were given (refusal, annotations, ...)."""

    model_config = ConfigDict(extra="ignore")


class TextPart(Lenient):
    type: Literal["text"]
    text: str


class FunctionCall(Lenient):
    name: str
    arguments: str = Field(description="JSON object")

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, text: str) -> str:
        if not isinstance(json.loads(text or "{}"), dict):
            raise ValueError("the arguments of a tool call are a JSON object")
        return text or "{}"


class RequestToolCall(Lenient):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class RequestMessage(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[RequestToolCall] | None = None
    tool_call_id: str | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return " ".join(part.text for part in self.content)
        return self.content or ""


class Function(Lenient):
    name: str = Field(min_length=1)
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)


class RequestTool(Lenient):
    type: Literal["function"]
    function: Function

    def definition(self) -> ToolDefinition:
        function = self.function
        return ToolDefinition(name=function.name, description=function.description, input_schema=function.parameters)


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: NamedFunction


class StreamOptions(Lenient):
    include_usage: bool = False


class ResponseFormat(Lenient):
    type: Literal["text"]


NULLABLE = (
    *("tools", "tool_choice", "parallel_tool_calls", "stream", "temperature", "top_p", "n", "logprobs"),
    *("top_logprobs", "presence_penalty", "frequency_penalty"),
)
Penalty = Annotated[float, Field(ge=0, le=0, description="not supported: only 0")]


class ChatRequest(Strict):
    """The body of /v1/chat/completions."""

    model: str
    messages: list[RequestMessage] = Field(min_length=1)
    tools: list[RequestTool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, description="tokens of the answer")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="the newer name of max_tokens")
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, description="same seed, same request: same answer")
    stop: str | list[str] | None = Field(default=None, description="at most 4 texts that end the answer")
    n: int = Field(default=1, ge=1, le=1, description="only 1")
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=0, description="only 0: the engine reports chosen tokens")
    response_format: ResponseFormat | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    # told to us for the client's own records; nothing here depends on them
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    @field_validator(*NULLABLE, mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        """The API lets a client write null for "not given"."""
        if value is None:
            return cls.model_fields[info.field_name].get_default(call_default_factory=True)
        return value

    def stop_texts(self) -> list[str]:
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(texts) > 4 or any(not text for text in texts):
            raise ApiError(400, "stop takes 1 to 4 texts that are not empty", param="stop")
        return texts
