"""Figures of training curves: the phases of a stage on one axis, grouped by what they measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from components.runtime.report import line_figure

GROUPS = (
    ("loss", ("loss", "ce"), "nats per token"),
    ("KL", ("kl",), "nats"),
    ("reward", ("reward", "pass_at_1"), "share of episodes"),
)


def curve_figures(title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    """Loss, KL and reward of a stage, as far as it recorded them. What else it recorded (its cost) makes no phase."""
    shown = {name.partition("/")[0] for name in curves if any(is_about(name, words) for _, words, _ in GROUPS)}
    joined, phases = one_axis({name: points for name, points in curves.items() if name.partition("/")[0] in shown})
    figures = []
    for label, words, unit in GROUPS:
        chosen = {name: points for name, points in joined.items() if is_about(name, words)}
        if chosen:
            figures.append(line_figure(f"{title}: {label}", chosen, x="step", y=unit, marks=phases))
    return figures


def one_axis(
    curves: Mapping[str, Sequence[tuple[int, float]]],
) -> tuple[dict[str, list[tuple[int, float]]], list[tuple[int, str]]]:
    """Curves named `phase/name` joined into one curve per name, and where each phase begins.

    Every phase counts its own steps from 0; on the joined axis a phase begins after the last step of the one before.
    """
    starts: dict[str, int] = {}
    end = 0
    for phase in dict.fromkeys(name.partition("/")[0] for name in curves):
        starts[phase] = end
        steps = [point[0] for name, points in curves.items() if name.partition("/")[0] == phase for point in points]
        end += max(steps) + 1
    joined: dict[str, list[tuple[int, float]]] = {}
    for name, points in curves.items():
        phase, _, short = name.partition("/")
        joined.setdefault(short or phase, []).extend((starts[phase] + step, value) for step, value in points)
    return joined, [(start, phase) for phase, start in starts.items()] if len(starts) > 1 else []


def is_about(name: str, words: tuple[str, ...]) -> bool:
    """Whether a curve's name has one of the words as a part: `sparse/lm_loss` is about `loss`, `scale` not `ce`."""
    parts = name.lower().replace("/", "_").replace(".", "_").replace("@", "_").split("_")
    return any(word in parts or ("_" in word and word in name.lower()) for word in words)
