"""Self-contained HTML pages with plots: no script, no network, light and dark, a text alternative for every picture.

figure = line_figure("Loss", {"train": [(0, 4.1), (10, 2.0)]}, x="step", y="nats per token")
write_page(Path("report.html"), "My report", ["<p>One paragraph.</p>", figure])
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Distinct on white and on black, also for the colour-blind (Okabe and Ito 2008, darkened blue).
COLOURS = ["#3b82c4", "#d97b1f", "#2f9e77", "#b65fa8", "#8a8a2a", "#c0504d"]
INK = "#123457"  # drawn by matplotlib, replaced by the page's text colour
MOST_POINTS = 400  # of one curve in a picture; longer ones are averaged in bins

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5d6b7a; --paper: #ffffff; --line: #d5dce4; --card: #f5f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --soft: #9aa7b5; --paper: #14191f; --line: #303943; --card: #1c232b } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 2rem 1.2rem 4rem; max-width: 62rem }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p.lead { color: var(--soft); margin: 0 0 1.4rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
.wide { overflow-x: auto }
td.number, th.number { text-align: right }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem }
.tile { background: var(--card); border-radius: .5rem; padding: .7rem .9rem }
.tile b { display: block; font-size: 1.35rem; font-weight: 600 } .tile span { color: var(--soft); font-size: .88rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.4rem }
.tiles + .figures { margin-top: 1.6rem }
figure { margin: 0 } figure svg { width: 100%; height: auto; color: var(--ink) }
figcaption { font-weight: 600 } details { color: var(--soft); font-size: .88rem } summary { cursor: pointer }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem } .pair pre { white-space: pre-wrap; margin: .3rem 0 }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
pre { background: var(--card); padding: .8rem; border-radius: .5rem; overflow-x: auto; font-size: .85rem }
@media (max-width: 34rem) { .figures, .pair { grid-template-columns: 1fr } }
@media print { body { max-width: none; padding: 0 } figure, .pair { break-inside: avoid } }
"""


@dataclass(frozen=True)
class Series:
    """What one drawn thing is, for the text alternative: a name and its values as words."""

    name: str
    values: str


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of equal bins in order, so that a noisy curve keeps its level."""
    if len(points) <= most:
        return list(points)
    bins = [points[len(points) * i // most : len(points) * (i + 1) // most] for i in range(most)]
    return [(sum(x for x, _ in one) / len(one), sum(y for _, y in one) / len(one)) for one in bins]


def line_figure(
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A figure with one line a curve. Points are (x, y); the curves' names are the legend; `marks` are labelled x."""
    figure, axes = _axes(x, y)
    described = []
    for position, (name, points) in enumerate(curves.items()):
        drawn = thin(points)
        colour = COLOURS[position % len(COLOURS)]
        axes.plot([p[0] for p in drawn], [p[1] for p in drawn], color=colour, label=name, linewidth=1.6)
        ys = [p[1] for p in points]
        described.append(
            Series(name, f"from {ys[0]:.4g} at {points[0][0]:g} to {ys[-1]:.4g} at {points[-1][0]:g}; "
                         f"lowest {min(ys):.4g}, highest {max(ys):.4g}")
        )  # fmt: skip
    for position, (place, label) in enumerate(marks):
        axes.axvline(place, color=INK, alpha=0.25, linewidth=0.8, linestyle=":")
        axes.annotate(
            label,
            (place, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 1 + 9 * (position % 2)),  # neighbours at two heights
            textcoords="offset points",
            color=INK,
            fontsize=8,
            va="bottom",
        )
    if len(curves) > 1:
        _legend(figure)
    return _finish(figure, title, described)


def interval_figure(title: str, rows: Sequence[tuple[str, float, float, float]], *, x: str) -> str:
    """One row a (name, value, low, high): a dot with its interval. Values are shares of 0 to 1."""
    figure, axes = _axes(x, "", height=0.9 + 0.42 * len(rows))
    for position, (_name, value, low, high) in enumerate(rows):
        colour = COLOURS[position % len(COLOURS)]
        axes.plot([low, high], [position, position], color=colour, linewidth=3, alpha=0.55, solid_capstyle="round")
        axes.plot([value], [position], "o", color=colour, markersize=7)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    return _finish(figure, title, [Series(n, f"{v:.3f} (interval {lo:.3f} to {hi:.3f})") for n, v, lo, hi in rows])


def bar_figure(title: str, groups: Mapping[str, Sequence[tuple[str, float]]], *, x: str, y: str) -> str:
    """Bars side by side: for each group's name a list of (label, value); all groups share the labels."""
    figure, axes = _axes(x, y)
    labels = [label for label, _ in next(iter(groups.values()))]
    width = 0.8 / len(groups)
    for position, (name, bars) in enumerate(groups.items()):
        places = [i - 0.4 + width * (position + 0.5) for i in range(len(bars))]
        axes.bar(places, [value for _, value in bars], width * 0.92, color=COLOURS[position], label=name)
    axes.set_xticks(range(len(labels)), labels, rotation=35 if sum(map(len, labels)) > 45 else 0)
    if len(groups) > 1:
        _legend(figure)
    described = [
        Series(name, ", ".join(f"{label}: {value:.4g}" for label, value in bars)) for name, bars in groups.items()
    ]
    return _finish(figure, title, described)


def _legend(figure: Any) -> None:
    """Above the plot, where it covers nothing."""
    figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=INK, fontsize=9)


def _axes(x: str, y: str, height: float = 3.0) -> tuple[Any, Any]:
    # Figure without pyplot: no global state, no display, no leak between reports.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
        axes.spines[side].set_alpha(0.4)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(True, color=INK, alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    return figure, axes


def _finish(figure: Any, title: str, described: Sequence[Series]) -> str:
    import matplotlib

    stream = io.StringIO()
    # Text stays text (selectable, in the page's font); ids depend on the title, so figures can share a page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    words = "; ".join(f"{one.name}: {one.values}" for one in described)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(f"{title}. {words}", quote=True)}"', 1)
    rows = "".join(f"<tr><th>{html.escape(one.name)}</th><td>{html.escape(one.values)}</td></tr>" for one in described)
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}"
        f"<details><summary>in words</summary><table>{rows}</table></details></figure>"
    )


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Big numbers: (number, what it is)."""
    inner = "".join(f'<div class="tile"><b>{html.escape(n)}</b><span>{html.escape(w)}</span></div>' for n, w in values)
    return f'<div class="tiles">{inner}</div>'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table; `numbers` are the columns that are set right-aligned."""

    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if i in numbers else ''}>{html.escape(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    table = f"<table><thead><tr>{cells(header, 'th')}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide" tabindex="0">{table}</div>'


def text_block(text: str) -> str:
    """Text as it stands, in a box that scrolls, also by the keyboard."""
    return f'<pre tabindex="0">{html.escape(text)}</pre>'


def side_by_side(left: str, right: str) -> str:
    """Two texts beside each other, one above the other on a narrow screen."""
    return f'<div class="pair">{text_block(left)}{text_block(right)}</div>'


def write_page(path: Path, title: str, parts: Sequence[str], *, lead: str = "") -> Path:
    """Write a page of HTML parts. Returns `path`."""
    intro = f'<p class="lead">{html.escape(lead)}</p>' if lead else ""
    path.write_text(
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>{intro}\n"
        + "\n".join(parts)
        + "</main></body></html>\n"
    )
    return path
