"""The HTTP side: /v1/chat/completions (tools, streaming), /v1/models, /health, /version, /metrics.

Errors have the OpenAI form. A client that goes away takes its sequence out of the batch.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from components.serving.conversation import Answer, openai_calls, request_words
from components.serving.generator import EngineFailed, Generation, Generator, Overloaded, Token
from components.serving.load import Served, make_engine
from components.serving.metrics import Metrics
from components.serving.requests import ApiError, ChatRequest
from components.serving.tool_choice import ToolChoiceMask
from model.engine import SamplingParameters

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """How much the server takes at once."""

    max_sequences: int = 32
    max_sequence_tokens: int = 1024
    max_waiting: int = 64


def create_app(served: Served, limits: Limits) -> FastAPI:
    """The application; its engine thread starts and ends with it."""
    metrics = Metrics(served.name)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = make_engine(
            served,
            max_sequences=limits.max_sequences,
            max_sequence_tokens=limits.max_sequence_tokens,
        )
        app.state.generator = Generator(engine, metrics, max_waiting=limits.max_waiting)
        try:
            yield
        finally:
            app.state.generator.close()

    app = FastAPI(title="Sparseline", version=version("sparseline"), lifespan=lifespan, docs_url=None, redoc_url=None)
    _handle_errors(app)
    card = {"id": served.name, "object": "model", "created": created, "owned_by": "sparseline"}
    card["max_model_len"] = min(limits.max_sequence_tokens, served.model.config.max_position_embeddings)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, served)
        return card

    @app.get("/health")
    async def health() -> Response:
        generator: Generator = app.state.generator
        if generator.running:
            return JSONResponse({"status": "ok", "model": served.name, "fingerprint": served.fingerprint})
        raise ApiError(503, f"the engine ended: {generator.failure!r}", code="engine_failed")

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version("sparseline")}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        _check_model(body.model, served)
        turn = start_turn(body, served, app.state.generator)
        try:
            if not body.stream:
                return JSONResponse(await _unless_disconnected(turn.completion(), request))
            # an error before the first token is a status, not a broken stream
            return _Stream(turn, await _unless_disconnected(turn.next_token(), request))
        except BaseException:
            turn.cancel()
            raise

    return app


def _check_model(name: str, served: Served) -> None:
    if name != served.name:
        raise ApiError(
            404,
            f"the model {name!r} is not served here; this is {served.name!r}",
            param="model",
            code="model_not_found",
        )


def start_turn(body: ChatRequest, served: Served, generator: Generator) -> Turn:
    """Render the request and hand it to the engine thread. Raises ApiError."""
    words, tools = request_words(body)
    prompt_ids = served.tokenizer.encode(" ".join(words), add_special_tokens=False).ids
    room = generator.engine.max_sequence_tokens - len(prompt_ids)
    if room < 1:
        raise ApiError(
            400,
            f"the conversation has {len(prompt_ids)} tokens, the context {generator.engine.max_sequence_tokens}; "
            "shorten it",
            param="messages",
            code="context_length_exceeded",
        )
    wanted = body.max_completion_tokens or body.max_tokens or room
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
    sampling = SamplingParameters(
        temperature=body.temperature,
        top_p=body.top_p,
        max_new_tokens=min(wanted, room),
        seed=seed,
        logit_mask=_mask(body, tools, served, len(prompt_ids)),
    )
    answer = Answer(tools, body.stop_texts())
    try:
        return Turn(body, served, generator, generator.submit(prompt_ids, sampling), answer)
    except Overloaded as error:
        raise ApiError(503, str(error), code="overloaded", kind="overloaded_error") from error
    except EngineFailed as error:
        raise ApiError(503, str(error), code="engine_failed") from error


def _mask(body: ChatRequest, tools: list[Any], served: Served, prompt_length: int) -> ToolChoiceMask | None:
    choice, one_call = body.tool_choice, not body.parallel_tool_calls
    if choice == "auto" and not (tools and one_call):
        return None  # the model's own distribution
    if choice not in ("none", "auto") and not tools:
        raise ApiError(400, "tool_choice asks for a tool, but the request has no tools", param="tool_choice")
    allowed, must_call = list(tools), choice not in ("none", "auto")
    if choice == "none":
        allowed = []
    elif not isinstance(choice, str):
        allowed = [tool for tool in tools if tool.name == choice.function.name]
        if not allowed:
            raise ApiError(400, f"tool_choice names {choice.function.name!r}, which is no tool", param="tool_choice")
    unknown = [tool.name for tool in allowed if served.tokenizer.token_to_id(tool.name) is None]
    if unknown:
        raise ApiError(400, f"the model has no word for the tool {unknown[0]!r}", param="tools")
    return ToolChoiceMask(served.words, prompt_length, allowed, must_call=must_call, one_call=one_call)


@dataclass
class Turn:
    """One assistant turn on its way from the engine to the client."""

    body: ChatRequest
    served: Served
    generator: Generator
    generation: Generation
    answer: Answer

    def __post_init__(self) -> None:
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason = "stop"
        self.completion_tokens = 0

    def cancel(self) -> None:
        """Take the request out of the batch. Harmless when it has ended."""
        self.generator.cancel(self.generation, "stop" if self.answer.stopped else "abort")

    async def next_token(self) -> Token:
        """Wait for the next token. Raises ApiError when the engine refuses the request or fails."""
        token = await self.generation.tokens.get()
        if isinstance(token, EngineFailed):
            raise ApiError(503, str(token), code="engine_failed")
        if isinstance(token, BaseException):
            raise ApiError(400, str(token))
        return token

    async def pieces(self, token: Token) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
        """Content as it becomes certain, with the log-probabilities of the tokens since the last piece."""
        while True:
            self.completion_tokens += 1
            word = self.served.words[token.id]
            fresh = self.answer.add(word)
            logprobs = [_logprob(word, token.logprob)] if self.body.logprobs else []
            if fresh or logprobs:
                yield fresh, logprobs
            if token.finish_reason is not None or self.answer.stopped:
                self.finish_reason = "stop" if self.answer.stopped else token.finish_reason or "stop"
                self.cancel()  # a stop text ends the answer before the model does
                return
            token = await self.next_token()

    def usage(self) -> dict[str, int]:
        prompt = len(self.generation.prompt_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
        }

    async def completion(self) -> dict[str, Any]:
        """The whole answer as one object."""
        logprobs: list[dict[str, Any]] = []
        async for _, more in self.pieces(await self.next_token()):
            logprobs += more
        _, calls = self.answer.end()
        message: dict[str, Any] = {"role": "assistant", "content": self.answer.content or None}
        if calls:
            message["tool_calls"] = openai_calls(calls)
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": logprobs, "refusal": None} if self.body.logprobs else None,
            "finish_reason": self._reason(bool(calls)),
        }
        return self._frame("chat.completion", [choice]) | {"usage": self.usage()}

    async def events(self, first: Token) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        yield self._event({"role": "assistant", "content": ""})
        try:
            async for content, logprobs in self.pieces(first):
                yield self._event({"content": content}, logprobs=logprobs)
        except ApiError as error:  # the status was sent already
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        rest, calls = self.answer.end()
        if rest:
            yield self._event({"content": rest})
        for index, call in enumerate(openai_calls(calls)):
            arguments = call["function"].pop("arguments")
            call["function"]["arguments"] = ""
            yield self._event({"tool_calls": [{"index": index, **call}]})
            yield self._event({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
        yield self._event({}, finish_reason=self._reason(bool(calls)))
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield f"data: {json.dumps(self._frame('chat.completion.chunk', []) | {'usage': self.usage()})}\n\n"
        yield "data: [DONE]\n\n"

    def _reason(self, called: bool) -> str:
        return "tool_calls" if called and self.finish_reason == "stop" else self.finish_reason

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
            "choices": choices,
        }

    def _event(
        self, delta: dict[str, Any], *, finish_reason: str | None = None, logprobs: list[dict[str, Any]] | None = None
    ) -> str:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        choice["logprobs"] = {"content": logprobs, "refusal": None} if logprobs else None
        return f"data: {json.dumps(self._frame('chat.completion.chunk', [choice]))}\n\n"


def _logprob(word: str, logprob: float) -> dict[str, Any]:
    return {"token": word, "logprob": logprob, "bytes": list(word.encode()), "top_logprobs": []}


class _Stream(StreamingResponse):
    """Server-sent events; however sending them ends, the request leaves the batch."""

    def __init__(self, turn: Turn, first: Token) -> None:
        super().__init__(turn.events(first), media_type="text/event-stream")
        self.turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.turn.cancel()


async def _unless_disconnected(work: Coroutine[Any, Any, Result], request: Request) -> Result:
    """The result of `work`. Raises ApiError when the client goes away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ApiError(499, "the client closed the connection", kind="client_closed_request")
    finally:
        answer.cancel()
        watch.cancel()


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        param = ".".join(str(part) for part in problem["loc"] if part != "body") or None
        return JSONResponse(ApiError(400, f"{param}: {problem['msg']}", param=param).body(), status_code=400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), status_code=error.status_code)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, "the server met an error of its own").body(), status_code=500)
