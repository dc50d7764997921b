"""The engine thread: requests join the running batch at any step, and leave it when they end or nobody listens.

One thread owns the engine; the HTTP side talks to it through a queue of commands and gets tokens back on its event
loop. The number of requests is bounded: one too many is refused at once instead of waiting without end.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Literal

from components.serving.metrics import Metrics
from model.engine import Engine, SamplingParameters

Command = Literal["add", "drop", "close"]


class Overloaded(RuntimeError):
    """As many requests as the server takes are running and waiting already."""


class EngineFailed(RuntimeError):
    """The engine thread ended with an error; the process must be restarted."""


@dataclass(frozen=True)
class Token:
    """One sampled token; finish_reason ("stop" or "length") with the last one of the turn."""

    id: int
    logprob: float
    finish_reason: str | None


@dataclass
class Generation:
    """A request in the engine. `tokens` gives Token, then nothing; an Exception in it is the request's end."""

    prompt_ids: list[int]
    sampling: SamplingParameters
    loop: asyncio.AbstractEventLoop
    tokens: asyncio.Queue[Token | BaseException] = field(default_factory=asyncio.Queue)
    created: float = field(default_factory=time.monotonic)
    handle: int | None = None
    seen: int = 0  # tokens of the turn that were handed over
    ended: bool = False
    reason: str = "abort"  # why it was cancelled, for the metrics


class Generator:
    """Starts the engine thread; `close` ends it.

    max_waiting: requests that may wait beside the engine's max_sequences running ones.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, max_waiting: int = 64) -> None:
        self.engine, self.metrics = engine, metrics
        self.capacity = engine.max_sequences + max_waiting
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[tuple[Command, Generation | None]] = queue.SimpleQueue()
        self._open: dict[int, Generation] = {}
        self._numbers = itertools.count()
        self._taken = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- the HTTP side -----------------------------------------------------------------------------------------------

    def submit(self, prompt_ids: list[int], sampling: SamplingParameters) -> Generation:
        """Queue a request; call it on the event loop that is to get the tokens.

        Raises Overloaded when the server is full, EngineFailed when the engine thread is gone.
        """
        with self._lock:
            if self.failure is not None:
                raise EngineFailed(f"the engine ended: {self.failure!r}")
            if self._taken >= self.capacity:
                raise Overloaded(f"{self._taken} requests are running and waiting; try again later")
            self._taken += 1
            generation = Generation(prompt_ids, sampling, asyncio.get_running_loop())
            self._commands.put(("add", generation))
        return generation

    def cancel(self, generation: Generation, reason: str = "abort") -> None:
        """Take the request out of the batch and free its cache. Harmless when it has ended."""
        generation.reason = reason
        self._commands.put(("drop", generation))

    def close(self) -> None:
        """End the engine thread after its current step."""
        self._commands.put(("close", None))
        self._thread.join()

    @property
    def running(self) -> bool:
        return self.failure is None and self._thread.is_alive()

    # -- the engine thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                self.engine.step()
                self._hand_over()
        except BaseException as error:
            self._fail(error)
            raise

    def _obey(self) -> bool:
        """Carry out waiting commands; sleeps until there is one when nothing is running. False: end."""
        while True:
            idle = not self._open
            try:
                command, generation = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if generation is None:
                return False
            if command == "add":
                self._add(generation)
            else:
                self._drop(generation)

    def _add(self, generation: Generation) -> None:
        limit = len(generation.prompt_ids) + generation.sampling.max_new_tokens
        try:
            generation.handle = self.engine.add(generation.prompt_ids, generation.sampling, max_total_tokens=limit)
        except (ValueError, RuntimeError) as error:  # this request's own fault; the others go on
            self._end(generation)
            self._deliver([(generation, error)])
            return
        self._open[generation.handle] = generation
        self._gauge()

    def _drop(self, generation: Generation) -> None:
        if generation.handle is not None and self._open.pop(generation.handle, None) is not None:
            self.engine.release(generation.handle)
            self.metrics.requests.labels(generation.reason).inc()
        self._end(generation)
        self._gauge()

    def _end(self, generation: Generation) -> None:
        if not generation.ended:
            generation.ended = True
            with self._lock:
                self._taken -= 1

    def _hand_over(self) -> None:
        """Give every request the tokens that it has not seen."""
        out: list[tuple[Generation, Token | BaseException]] = []
        now = time.monotonic()
        for handle, generation in list(self._open.items()):
            ids, logprobs, finish_reason = self.engine.written(handle)
            if not generation.seen and ids:
                self.metrics.first_token.observe(now - generation.created)
                self.metrics.prompt_tokens.inc(len(generation.prompt_ids))
            self.metrics.generated_tokens.inc(len(ids) - generation.seen)
            for i in range(generation.seen, len(ids)):
                last = i + 1 == len(ids)
                out.append((generation, Token(ids[i], logprobs[i], finish_reason if last else None)))
            generation.seen = len(ids)
            if finish_reason is not None:
                del self._open[handle]
                self.engine.release(handle)
                self._end(generation)
                self.metrics.requests.labels(finish_reason).inc()
                self.metrics.duration.observe(now - generation.created)
        self._gauge()
        self._deliver(out)

    def _deliver(self, out: list[tuple[Generation, Token | BaseException]]) -> None:
        """One call into each event loop, however many tokens there are."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Generation, Token | BaseException]]] = {}
        for item in out:
            loops.setdefault(item[0].loop, []).append(item)
        for loop, items in loops.items():
            try:
                loop.call_soon_threadsafe(_put, items)
            except RuntimeError:  # the loop is closed: its clients are gone
                for generation, _ in items:
                    self.cancel(generation)

    def _gauge(self) -> None:
        running = min(len(self._open), self.engine.max_sequences)
        self.metrics.running.set(running)
        self.metrics.waiting.set(len(self._open) - running)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self.failure = error
        unanswered = list(self._open.values())
        while not self._commands.empty():  # submitted but never added; `submit` adds no more since `failure` is set
            command, generation = self._commands.get_nowait()
            if command == "add" and generation is not None:
                unanswered.append(generation)
        failed = EngineFailed(f"the engine ended: {error!r}")
        self._deliver([(generation, failed) for generation in unanswered])


def _put(items: list[tuple[Generation, Token | BaseException]]) -> None:
    for generation, item in items:
        generation.tokens.put_nowait(item)
