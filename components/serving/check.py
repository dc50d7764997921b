"""Serving check: serves the champion in a process of its own and plays held-out tasks through the official client.

    python -m components.serving check --config check.yaml

The check asks whether the whole way works: registry, store, hashes, server, client, tool calls, environment, verdict.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.environments.protocol import environment
from components.rollouts import EpisodeRequest, EpisodeResult, OpenAIPolicy, run_episodes
from components.rollouts.loop import episode_trace, transcript
from components.runtime import processes
from components.runtime.contracts import Pointer, TaskRecord
from components.runtime.errors import EXIT_INPUT, InputError
from components.runtime.registry import CHAMPION, SCHEME, Registry
from components.runtime.settings import Settings
from components.runtime.stage import StageContext, StageResult
from components.runtime.task_set import read_tasks
from components.serving.config import ServingConfig


def run(config: ServingConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Stage `serving`. inputs: tasks, checkpoint; no outputs.

    Raises ValueError when the champion is another checkpoint than the given one, InputError when the server cannot
    start for a reason that the user can repair.
    """
    settings = Settings.read()
    model = _model(config, settings, context, inputs["checkpoint"])
    tasks = choose_tasks(read_tasks(context.fetch(inputs["tasks"]), "test"), 2 * config.episodes)
    context.progress.note(f"serving {model}")
    results: list[EpisodeResult] = []
    modes: dict[str, list[EpisodeResult]] = {}

    def show(result: EpisodeResult) -> None:
        results.append(result)
        context.progress.update(len(results), len(tasks))
        context.progress.episode(transcript(result))
        context.tracker.trace(episode_trace(result))

    with serve(model, settings, context.work_dir, config.start_seconds) as (url, name):
        started, tokens = time.monotonic(), 0
        for mode, first in (("plain", 0), ("streaming", 1)):
            policy = OpenAIPolicy(
                url, name, stream=mode == "streaming", temperature=0.0, max_tokens=config.max_turn_tokens
            )
            requests = [EpisodeRequest(environment(task.environment), task, context.seed) for task in tasks[first::2]]
            modes[mode] = run_episodes(policy, requests, on_episode=show)
            tokens += policy.tokens
        seconds = time.monotonic() - started
    summary = summarise(modes) | {"tokens": tokens, "tokens_per_second": tokens / seconds, "model": model}
    if not summary["episode_ok"]:
        context.progress.note("no multi-turn episode passed over the API; the server works, the model does not")
    return StageResult({}, summary)


def summarise(modes: dict[str, list[EpisodeResult]]) -> dict[str, Any]:
    """episode_ok: each mode carried a multi-turn tool episode to a submission, and at least one of those passed."""
    complete = {mode: [r for r in played if r.turns >= 2 and r.ended == "submitted"] for mode, played in modes.items()}
    passed = [result for done in complete.values() for result in done if result.verdict.passed]
    return {
        "episode_ok": all(complete.values()) and bool(passed),
        "episodes": sum(len(played) for played in modes.values()),
        "complete": {mode: len(done) for mode, done in complete.items()},
        "passed": sum(result.verdict.passed for played in modes.values() for result in played),
    }


def choose_tasks(tasks: list[TaskRecord], number: int) -> list[TaskRecord]:
    """The shortest tasks that need at least two turns, each of another template as far as there are enough."""
    fitting = sorted((t for t in tasks if len(t.solution) >= 2), key=lambda task: (len(task.solution), task.id))
    if not fitting:
        raise InputError("the task set has no held-out task of two or more turns; synthesise a larger test split")
    templates: set[str] = set()
    fresh = [t for t in fitting if not (t.template in templates or templates.add(t.template))]  # type: ignore[func-returns-value]
    return (fresh + [task for task in fitting if task not in fresh])[:number]


def _model(config: ServingConfig, settings: Settings, context: StageContext, checkpoint: Pointer) -> str:
    if config.source == "checkpoint":
        return str(context.fetch(checkpoint))
    registry = Registry(settings)
    champion = registry.alias(CHAMPION)
    if champion is None or champion.pointer.sha256 != checkpoint.sha256:
        found = champion.pointer.sha256[:12] if champion else "none"
        raise ValueError(f"the champion is {found}, but the checkpoint to check is {checkpoint.sha256[:12]}")
    return f"{SCHEME}{registry.name}@{CHAMPION}"


@contextmanager
def serve(model: str, settings: Settings, work_dir: Path, seconds: float) -> Iterator[tuple[str, str]]:
    """A server process on a free port of this machine; gives its URL and the model's name, and ends it.

    Raises InputError or RuntimeError with the server's own words when it does not start within `seconds`.
    """
    log = work_dir / "server.log"
    with log.open("w") as errors:
        process = processes.start(
            [sys.executable, "-m", "components.serving", "--model", model, "--port", "0"],
            environment={**os.environ, **settings.environment()},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            line = _first_line(process, seconds)
            if not line:
                code = process.poll()
                message = f"the server did not start (exit code {code}): {log.read_text().strip()[-2000:]}"
                raise InputError(message) if code == EXIT_INPUT else RuntimeError(message)
            name, _, url = line.removeprefix("serving ").partition(" on ")
            yield url, name.rsplit(" (", 1)[0]
        finally:
            processes.stop(process)


def _first_line(process: subprocess.Popen, seconds: float) -> str:
    """What the server says when it listens; "" when it ended or was silent for so long."""
    assert process.stdout is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    stream = process.stdout
    threading.Thread(target=lambda: lines.put(stream.readline()), daemon=True).start()
    try:
        line = lines.get(timeout=seconds).strip()
    except queue.Empty:
        return ""
    if not line:
        process.wait(timeout=10)
    return line
