"""The training loop of a phase, and the losses of pre-training (arXiv 2512.02556, section 2.1)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from components.pretraining.config import PhaseConfig, PretrainingConfig
from components.pretraining.data import Batch, Example, Stream, Totals, pack
from components.pretraining.episode import play_one
from components.pretraining.optimizers import curriculum_share, learning_rate_share, optimizers_of
from components.pretraining.resume import Place, Resume
from components.runtime.contracts import TaskRecord
from components.runtime.ranks import Ranks
from components.runtime.stage import StageContext
from model import PackedContext, Transformer
from model.context import IndexerLoss, Selection
from model.moe import balance, expert_load


@dataclass
class Corpus:
    """examples: what is trained on, "demonstrations" and "documents"."""

    tokenizer: Tokenizer
    shown_tasks: list[TaskRecord]
    examples: dict[str, list[Example]]
    validation_demonstrations: Batch
    validation_documents: Batch


MODES: dict[str, tuple[Selection, IndexerLoss]] = {
    "dense": ("dense", "none"),
    "warmup": ("dense", "dense"),
    "sparse": ("sparse", "sparse"),
}


class Recorder:
    """What rank 0 does beside training: curves, validation, shown episodes, training states."""

    def __init__(self, config: PretrainingConfig, corpus: Corpus, context: StageContext, resume: Resume) -> None:
        self.config, self.corpus, self.context, self.resume = config, corpus, context, resume

    def step_done(self, name: str, step: int, steps: int, model: Transformer, values: dict[str, float]) -> None:
        """Record `values` of `step`, and validate where it is due."""
        last, every = step + 1 == steps, self.config.validation_every
        if last or (step + 1) % every == 0:
            checked = validate(model, self.corpus, model.attention_mode, MODES[name][1])
            values.update({f"{name}/validation_{key}": value for key, value in checked.items()})
            task = self.corpus.shown_tasks[step % len(self.corpus.shown_tasks)]
            self.context.progress.episode(play_one(model, self.corpus.tokenizer, task, step))
        if last or step % 10 == 0 or (step + 1) % every == 0:
            self.context.tracker.metrics(values, step)
        shown = {key.split("/")[1]: value for key, value in values.items() if key.endswith(("_loss", "_kl"))}
        self.context.progress.update(step + 1, steps, shown)


def train_phase(
    name: str,
    phase: PhaseConfig,
    config: PretrainingConfig,
    model: Transformer,
    examples: Mapping[str, Sequence[Example]],
    seed: int,
    place: Place,
    ranks: Ranks,
    recorder: Recorder | None,
) -> None:
    """Run one phase, or the rest of it; `model` is changed in place, alike on all ranks.

    Curves are logged as `<phase>/<loss>`. Raises FloatingPointError for a loss that is not finite.
    """
    if phase.steps == 0:
        return
    if recorder:
        recorder.context.progress.phase(name)
    model.train()
    model.attention_mode, indexer_loss = MODES[name]
    optimizers = optimizers_of(name, phase, config, model, ranks)
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{name}").getrandbits(62))
    streams = {"demonstrations": Stream(examples["demonstrations"], phase.demonstration_tokens, generator)}
    if phase.document_tokens:
        streams["documents"] = Stream(examples["documents"], phase.document_tokens, generator)
    start = place.load(name, model, optimizers, generator, streams)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    routers = model.routers()
    for step in range(start, phase.steps):
        for group in groups:
            group["lr"] = group["peak"] * learning_rate_share(step, phase)
        parts: dict[str, torch.Tensor] = {}
        loads = [torch.zeros_like(router.e_score_correction_bias) for router in routers]
        for kind, stream in streams.items():
            chosen = stream.next(curriculum_share(step, phase) if kind == "documents" else 1.0)
            totals, mine = Totals.of(chosen), ranks.share(chosen)
            loss, losses, experts = batch_loss(model, mine, totals, indexer_loss, train_network=name != "warmup")
            if mine:
                loss.backward()
            parts.update({f"{name}/{kind}_{key}": value for key, value in losses.items()})
            for load_E, router, experts_TK in zip(loads, routers, experts, strict=False):
                load_E += expert_load(router, experts_TK)
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.sum([*(parameter.grad for parameter in trained), *parts.values(), *loads])
        values = {key: float(value) for key, value in parts.items()}
        for key, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{key}, step {step}: the loss is {value}")
        values[f"{name}/gradient_norm"] = float(torch.nn.utils.clip_grad_norm_(trained, config.gradient_clip))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if name != "warmup":
            for router, load_E in zip(routers, loads, strict=True):
                balance(router, load_E, config.router_bias_speed)
        if recorder:
            recorder.step_done(name, step, phase.steps, model, values)
            recorder.resume.save_if_due(name, step + 1, model, optimizers, generator, streams)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()


def batch_loss(
    model: Transformer, examples: list[Example], totals: Totals, indexer_loss: IndexerLoss, *, train_network: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
    """This rank's part of a batch's loss (fp32 scalar), the parts of the values that curves show (nats), expert ids.

    `totals` are those of the whole batch, so that losses and values of the ranks add up to the batch's.
    """
    parts = {name: torch.zeros(()) for name, used in (("loss", train_network), ("kl", indexer_loss != "none")) if used}
    if not examples:
        return torch.zeros(()), parts, []
    batch = pack(examples)
    packed = PackedContext.from_lengths(batch.lengths)
    packed.indexer_loss, packed.record_routing = indexer_loss, True
    hidden_TC = model.hidden(batch.inputs_T, packed)
    loss = hidden_TC.new_zeros(())
    if train_network:
        rows = batch.weights_T.nonzero().flatten()
        cross_entropy_R = F.cross_entropy(model.lm_head(hidden_TC[rows]), batch.targets_T[rows], reduction="none")
        weights_R = batch.weights_T[rows]
        loss = (cross_entropy_R * weights_R).sum() / totals.weight
        parts["loss"] = cross_entropy_R.detach()[weights_R == 1].sum() / totals.answer_tokens
    if packed.losses:
        divergence = torch.stack(packed.losses).mean() * (len(batch.inputs_T) / totals.tokens)
        loss = loss + divergence
        parts["kl"] = divergence.detach()
    return loss, parts, packed.routing


@torch.no_grad()
def validate(
    model: Transformer, corpus: Corpus, mode: Selection, indexer_loss: IndexerLoss = "none"
) -> dict[str, float]:
    """Cross-entropy (nats) and accuracy on validation demonstrations and on the answers in validation documents.

    With `indexer_loss` also the lightning indexer's KL (nats) of each layer on the documents.
    """
    before, model.attention_mode = model.attention_mode, mode
    values = {}
    kinds = {"demonstration": corpus.validation_demonstrations, "document": corpus.validation_documents}
    for kind, batch in kinds.items():
        packed = PackedContext.from_lengths(batch.lengths)
        packed.indexer_loss = indexer_loss if kind == "document" else "none"
        hidden_TC = model.hidden(batch.inputs_T, packed)
        values.update({f"kl_layer_{layer}": float(loss) for layer, loss in enumerate(packed.losses)})
        rows = (batch.weights_T == 1).nonzero().flatten()
        logits_RV, targets_R = model.lm_head(hidden_TC[rows]), batch.targets_T[rows]
        values[f"{kind}_loss"] = float(F.cross_entropy(logits_RV, targets_R))
        values[f"{kind}_accuracy"] = float((logits_RV.argmax(-1) == targets_R).float().mean())
    model.attention_mode = before
    return values
