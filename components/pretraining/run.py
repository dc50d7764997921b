"""Continued pre-training of a dense model into DSA (arXiv 2512.02556, section 2.1).

    python -m components.pretraining --config pretraining.yaml

Three phases: a dense base where no base checkpoint is given; the warm-up, in which attention stays dense and the
lightning indexer alone learns to predict it (Eq. 3); sparse training, in which the network learns from the language
modelling loss over the selected keys and the indexer, its input detached, from the KL on the selected set (Eq. 4).
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from components.environments.chat_format import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_WORDS, UNKNOWN
from components.pretraining.config import PhaseConfig, PretrainingConfig
from components.pretraining.data import (
    Batch,
    Example,
    Stream,
    demonstration_example,
    document_example,
    known_words,
    pack,
)
from components.pretraining.episode import play_one
from components.pretraining.optimizers import curriculum_share, learning_rate_share, optimizers_of
from components.pretraining.resume import PHASES, Resume
from components.runtime.contracts import Pointer, TaskRecord
from components.runtime.errors import InputError
from components.runtime.stage import StageContext, StageResult
from components.runtime.task_set import read_demonstrations, read_documents, read_tasks, read_vocabulary
from model import ModelConfig, PackedContext, Transformer
from model.checkpoint import (
    CheckpointError,
    load_model,
    load_tokenizer,
    save_model,
    save_tokenizer,
    word_tokenizer,
)
from model.context import IndexerLoss, Selection
from model.moe import balance


@dataclass
class Corpus:
    tokenizer: Tokenizer
    shown_tasks: list[TaskRecord]
    demonstrations: list[Example]
    documents: list[Example]
    validation_demonstrations: Batch
    validation_documents: Batch


def run(config: PretrainingConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Inputs: `tasks`, optionally `base` (a checkpoint). Outputs: `checkpoint`."""
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(context.seed)
    directory = context.fetch(inputs["tasks"])
    if "base" in inputs:
        base = context.fetch(inputs["base"])
        try:
            model, tokenizer = load_model(base), load_tokenizer(base)
        except CheckpointError as error:
            raise InputError(f"base checkpoint {inputs['base'].uri}: {error}") from error
    else:
        tokenizer = word_tokenizer(SPECIAL_WORDS, read_vocabulary(directory), UNKNOWN)
        model = Transformer(_preset(config.model, tokenizer)).initialise(context.seed)
    corpus = load_corpus(directory, tokenizer, config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    context.tracker.parameters({"model_parameters": parameters})
    summary: dict[str, float] = {"parameters": parameters}
    resume = Resume(context, context.identity(config, inputs), config.state_seconds)
    for name in PHASES:
        if (name != "dense" or "base" not in inputs) and not resume.is_past(name):
            train_phase(name, getattr(config, name), config, model, corpus, context, resume)
    for mode in ("dense", "sparse"):
        losses = validate(model, corpus, mode)
        summary.update({f"{mode}_{name}": value for name, value in losses.items()})
    checkpoint = context.work_dir / "checkpoint"
    save_model(model, checkpoint)
    save_tokenizer(tokenizer, checkpoint, chat_template=CHAT_TEMPLATE, bos=BOS, eos=END, pad=PAD, unknown=UNKNOWN)
    parents = [inputs[name] for name in ("tasks", "base") if name in inputs]
    pointer = context.publish("checkpoint", checkpoint, parents=parents, facts=summary)
    resume.finish()
    return StageResult({"checkpoint": pointer}, summary)


def _preset(name: str, tokenizer: Tokenizer) -> ModelConfig:
    """The preset with the tokenizer's vocabulary. Raises InputError that lists the presets for an unknown one."""
    special = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD}
    ids = {field: tokenizer.token_to_id(word) for field, word in special.items()}
    try:
        return ModelConfig.preset(name, vocab_size=tokenizer.get_vocab_size(), **ids)
    except ValueError as error:
        raise InputError(f"pretraining.model: {error}") from error


def load_corpus(directory: Path, tokenizer: Tokenizer, config: PretrainingConfig) -> Corpus:
    """Everything as token ids. Raises InputError for a word that the tokenizer does not know."""
    ids = known_words(tokenizer.get_vocab())
    demonstrations = {
        split: [demonstration_example(d, ids) for d in read_demonstrations(directory, split)]
        for split in ("train", "validation")
    }
    documents = {
        split: [document_example(d, ids, config.filler_weight) for d in read_documents(directory, split)]
        for split in ("train", "validation")
    }
    return Corpus(
        tokenizer,
        read_tasks(directory, "validation"),
        demonstrations["train"],
        documents["train"],
        pack(demonstrations["validation"][:256]),
        pack(documents["validation"][:32]),
    )


MODES: dict[str, tuple[Selection, IndexerLoss]] = {
    "dense": ("dense", "none"),
    "warmup": ("dense", "dense"),
    "sparse": ("sparse", "sparse"),
}


def train_phase(
    name: str,
    phase: PhaseConfig,
    config: PretrainingConfig,
    model: Transformer,
    corpus: Corpus,
    context: StageContext,
    resume: Resume,
) -> None:
    """Run one phase, or the rest of it; `model` is changed in place. Curves are logged as `<phase>/<loss>`."""
    if phase.steps == 0:
        return
    context.progress.phase(name)
    model.train()
    model.attention_mode, indexer_loss = MODES[name]
    optimizers = optimizers_of(name, phase, config, model)
    generator = torch.Generator().manual_seed(random.Random(f"{context.seed}/{name}").getrandbits(62))
    streams = {"demonstrations": Stream(corpus.demonstrations, phase.demonstration_tokens, generator)}
    if phase.document_tokens:
        streams["documents"] = Stream(corpus.documents, phase.document_tokens, generator)
    start = resume.load(name, model, optimizers, generator, streams)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    for step in range(start, phase.steps):
        for group in groups:
            group["lr"] = group["peak"] * learning_rate_share(step, phase)
        values: dict[str, float] = {}
        routing: list[list[torch.Tensor]] = []
        for kind, stream in streams.items():
            share = curriculum_share(step, phase) if kind == "documents" else 1.0
            batch = stream.next(share)
            loss, losses, experts = batch_loss(model, batch, indexer_loss, train_network=name != "warmup")
            if not math.isfinite(float(loss.detach())):
                raise FloatingPointError(f"{name}, step {step}: the loss on {kind} is {float(loss.detach())}")
            loss.backward()
            values.update({f"{name}/{kind}_{key}": value for key, value in losses.items()})
            routing.append(experts)
        values[f"{name}/gradient_norm"] = float(torch.nn.utils.clip_grad_norm_(trained, config.gradient_clip))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if name != "warmup":
            for layer, router in enumerate(model.routers()):
                balance(router, torch.cat([experts[layer] for experts in routing]), config.router_bias_speed)
        last = step + 1 == phase.steps
        if last or (step + 1) % config.validation_every == 0:
            checked = validate(model, corpus, model.attention_mode)
            values.update({f"{name}/validation_{key}": value for key, value in checked.items()})
            task = corpus.shown_tasks[step % len(corpus.shown_tasks)]
            context.progress.episode(play_one(model, corpus.tokenizer, task, step))
        if last or step % 10 == 0 or (step + 1) % config.validation_every == 0:
            context.tracker.metrics(values, step)
        shown = {key.split("/")[1]: value for key, value in values.items() if key.endswith(("_loss", "_kl"))}
        context.progress.update(step + 1, phase.steps, shown)
        resume.save_if_due(name, step + 1, model, optimizers, generator, streams)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()


def batch_loss(
    model: Transformer, batch: Batch, indexer_loss: IndexerLoss, *, train_network: bool
) -> tuple[torch.Tensor, dict[str, float], list[torch.Tensor]]:
    """The loss to minimise, its parts as numbers (nats), and the expert ids of each MoE layer."""
    packed = PackedContext.from_lengths(batch.lengths)
    packed.indexer_loss, packed.record_routing = indexer_loss, True
    hidden_TC = model.hidden(batch.inputs_T, packed)
    loss = hidden_TC.new_zeros(())
    parts: dict[str, float] = {}
    if train_network:
        rows = batch.weights_T.nonzero().flatten()
        cross_entropy_R = F.cross_entropy(model.lm_head(hidden_TC[rows]), batch.targets_T[rows], reduction="none")
        weights_R = batch.weights_T[rows]
        loss = (cross_entropy_R * weights_R).sum() / weights_R.sum()
        full = weights_R == 1
        parts["loss"] = float(cross_entropy_R.detach()[full].mean())
    if packed.losses:
        divergence = torch.stack(packed.losses).mean()
        loss = loss + divergence
        parts["kl"] = float(divergence.detach())
    return loss, parts, packed.routing


@torch.no_grad()
def validate(model: Transformer, corpus: Corpus, mode: Selection) -> dict[str, float]:
    """Cross-entropy (nats) and accuracy on validation demonstrations and on the answers in validation documents."""
    before, model.attention_mode = model.attention_mode, mode
    values = {}
    kinds = {"demonstration": corpus.validation_demonstrations, "document": corpus.validation_documents}
    for kind, batch in kinds.items():
        hidden_TC = model.hidden(batch.inputs_T, PackedContext.from_lengths(batch.lengths))
        rows = (batch.weights_T == 1).nonzero().flatten()
        logits_RV, targets_R = model.lm_head(hidden_TC[rows]), batch.targets_T[rows]
        values[f"{kind}_loss"] = float(F.cross_entropy(logits_RV, targets_R))
        values[f"{kind}_accuracy"] = float((logits_RV.argmax(-1) == targets_R).float().mean())
    model.attention_mode = before
    return values
