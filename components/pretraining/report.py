"""The HTML page of pre-training: losses of the three phases, the lightning indexer's KL, what the model writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from components.runtime.contracts import TaskRecord
from components.runtime.curves import one_axis
from components.runtime.report import html_table, line_figure, side_by_side, tiles, write_page

PAGE = "pretraining.html"
Curves = Mapping[str, Sequence[tuple[int, float]]]


def write_report(
    directory: Path, summary: Mapping[str, float], curves: Curves, plays: Sequence[tuple[TaskRecord, str]]
) -> Path:
    """Write `pretraining.html`, one self-contained page. Returns its path.

    `plays`: validation tasks and how the final model plays them.
    """
    joined, phases = one_axis(curves)

    def figure(title: str, unit: str, names: Mapping[str, str]) -> str:
        found = {label: joined[name] for label, name in names.items() if name in joined}
        return line_figure(title, found, x="step", y=unit, marks=phases) if found else ""

    layers = {
        name.removeprefix("validation_").replace("_", " "): name for name in joined if name.startswith("validation_kl_")
    }
    figures = [
        figure(
            "Training loss", "nats per token", {"demonstrations": "demonstrations_loss", "documents": "documents_loss"}
        ),
        figure(
            "Validation loss",
            "nats per token",
            {"demonstrations": "validation_demonstration_loss", "answers in documents": "validation_document_loss"},
        ),
        figure(
            "Validation accuracy",
            "share of tokens",
            {"demonstrations": "validation_demonstration_accuracy", "answers": "validation_document_accuracy"},
        ),
        figure(
            "KL of the lightning indexer", "nats", {"demonstrations": "demonstrations_kl", "documents": "documents_kl"}
        ),
        figure("KL of the lightning indexer by layer, validation documents", "nats", layers),
        figure("Norm of the gradient", "before clipping", {"norm": "gradient_norm"}),
    ]
    rows = [
        [what, *(f"{summary[f'{mode}_{name}']:.4f}" for mode in ("dense", "sparse"))]
        for what, name in (
            ("loss on demonstrations, nats per token", "demonstration_loss"),
            ("accuracy on demonstrations", "demonstration_accuracy"),
            ("loss on answers in documents, nats per token", "document_loss"),
            ("accuracy on answers in documents", "document_accuracy"),
        )
    ]
    parts = [
        tiles(
            [
                (f"{summary['parameters'] / 1e6:.2f} M", "parameters"),
                (f"{summary['sparse_demonstration_accuracy']:.3f}", "accuracy on validation demonstrations, sparse"),
                (
                    f"{summary['sparse_demonstration_loss'] - summary['dense_demonstration_loss']:+.4f}",
                    "nats per token, sparse minus dense attention",
                ),
            ]
        ),
        f'<div class="figures">{"".join(figures)}</div>',
        "<h2>The final weights on validation data, by attention</h2>",
        html_table(["measure", "dense", "sparse"], rows, numbers=[1, 2]),
        "<h2>Validation tasks: the reference solution, and the model's play</h2>",
        *(side_by_side(_reference(task), text) for task, text in plays),
    ]
    return write_page(directory / PAGE, "Pre-training", parts, lead="dense base, indexer warm-up, sparse training")


def _reference(task: TaskRecord) -> str:
    calls = [f"{call.name}({', '.join(map(str, call.arguments.values()))})" for call in task.solution]
    return "\n".join([task.template, *(message.content for message in task.messages), *calls])
