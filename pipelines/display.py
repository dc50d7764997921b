"""The display of a run: a live table on a terminal, one line an interval in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.watch import RunWatch, StageView

EPISODES_FROM = 60.0  # seconds: from the second minute on, an episode that the model just played
LINE_SECONDS = 10.0
EPISODE_LINE_SECONDS = 60.0
MARKS = {"waiting": "·", "running": "▶", "done": "✓", "cached": "✓", "failed": "✗"}
STYLES = {"waiting": "dim", "running": "bold", "done": "green", "cached": "cyan", "failed": "red"}


def duration(seconds: float) -> str:
    """`7 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Display(Protocol):
    def update(self, watch: RunWatch, events: list[tuple[StageView, dict[str, Any]]]) -> None: ...


@contextmanager
def display(console: Console, title: str) -> Iterator[Display]:
    """The display that suits where the output goes."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=False) as live:
            yield LiveDisplay(live, title)
    else:
        yield LineDisplay(console, title)


class LiveDisplay:
    """A table of stages that is redrawn in place, and below it the last episode."""

    def __init__(self, live: Live, title: str) -> None:
        self._live, self._title, self._start = live, title, time.monotonic()

    def update(self, watch: RunWatch, events: list[tuple[StageView, dict[str, Any]]]) -> None:
        self._live.update(self.render(watch, time.monotonic() - self._start))

    def render(self, watch: RunWatch, elapsed: float) -> Group:
        table = Table(box=None, pad_edge=False, expand=True, show_header=False)
        table.add_column(width=1)
        table.add_column(width=22, no_wrap=True)
        table.add_column(width=18)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for view in watch.stages.values():
            style = STYLES[view.state]
            bar: Any = ""
            if view.state == "running" and view.total:
                bar = ProgressBar(total=view.total, completed=view.step, width=18)
            elif view.state == "cached":
                bar = Text("from cache", style=style)
            elif view.state in ("done", "failed"):
                bar = Text(duration(view.seconds), style=style)
            table.add_row(
                Text(MARKS[view.state], style=style), Text(view.title, style=style), bar, Text(describe(view))
            )
        parts: list[Any] = [Text(f"{self._title}   {duration(elapsed)}", style="bold"), table]
        if watch.episode and elapsed >= EPISODES_FROM:
            stage, text = watch.episode
            parts.append(Panel(Text(text), title=f"an episode just played ({stage})", border_style="dim"))
        return Group(*parts)


class LineDisplay:
    """Lines for a log: every start and end, every note, progress once an interval, an episode once a minute."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._start = time.monotonic()
        self._last_line = self._last_episode = float("-inf")
        self._shown = 0
        self._print(title)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, watch: RunWatch, events: list[tuple[StageView, dict[str, Any]]]) -> None:
        for view, event in events:
            if event["kind"] == "started":
                self._print(f"[{view.name}] started")
            elif event["kind"] == "ended":
                took = "from cache" if view.state == "cached" else f"{view.state} in {duration(view.seconds)}"
                self._print(f"[{view.name}] {took}")
            elif event["kind"] == "note":
                self._print(f"[{view.name}] {event['text']}")
            elif event["kind"] == "phase":
                self._print(f"[{view.name}] {event['name']}")
        now = time.monotonic()
        running = watch.running
        if running and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            text = describe(running)
            if text:
                self._print(f"[{running.name}] {text}")
        fresh = watch.episode and watch.episodes > self._shown
        due = now - self._start >= EPISODES_FROM and now - self._last_episode >= EPISODE_LINE_SECONDS
        if watch.episode and fresh and due:
            self._last_episode, self._shown = now, watch.episodes
            stage, text = watch.episode
            self._print(f"an episode just played ({stage}):\n" + "\n".join("    " + line for line in text.splitlines()))


def describe(view: StageView) -> str:
    """Phase, step, rate, time left and values of a running stage, in one line."""
    if view.state == "failed":
        return str(view.failure.get("message", "")).splitlines()[0] if view.failure.get("message") else ""
    if view.state != "running":
        return ""
    parts = [view.phase] if view.phase else []
    if view.total:
        parts.append(f"{view.step}/{view.total}")
        if view.rate:
            parts.append(f"{view.rate:.3g}/s")
        if view.left is not None:
            parts.append(f"{duration(view.left)} left")
    parts += [f"{name} {value:.4g}" for name, value in view.values.items()]
    return "  ".join(parts)


def marked_table(name: str, detail: str, rows: Iterable[tuple[str, str, str]]) -> Table:
    """What was looked at, a row each: a mark, its name, what was found. `name` and `detail` head the last columns."""
    made = Table(title_justify="left", show_edge=False)
    made.add_column("")
    made.add_column(name, no_wrap=True)
    made.add_column(detail, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
