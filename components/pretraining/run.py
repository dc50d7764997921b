"""Continued pre-training of a dense model into DSA (arXiv 2512.02556, section 2.1).

    python -m components.pretraining --config pretraining.yaml

Three phases: a dense base where no base checkpoint is given; the warm-up, in which attention stays dense and the
lightning indexer alone learns to predict it (Eq. 3); sparse training, in which the network learns from the language
modelling loss over the selected keys and the indexer, its input detached, from the KL on the selected set (Eq. 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from components.environments.chat_format import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_WORDS, UNKNOWN
from components.pretraining.config import PretrainingConfig
from components.pretraining.data import (
    Example,
    demonstration_example,
    document_example,
    known_words,
    load_examples,
    pack,
    save_examples,
)
from components.pretraining.episode import play_one
from components.pretraining.phases import Corpus, Recorder, train_phase, validate
from components.pretraining.report import write_report
from components.pretraining.resume import PHASES, Place, Resume
from components.runtime.contracts import Pointer
from components.runtime.errors import InputError
from components.runtime.processes import threads_of_each
from components.runtime.ranks import Ranks, open_ranks
from components.runtime.stage import StageContext, StageResult
from components.runtime.task_set import read_demonstrations, read_documents, read_tasks, read_vocabulary
from components.runtime.tracking import read_metrics
from model import ModelConfig, Transformer
from model.checkpoint import (
    CheckpointError,
    load_model,
    load_tokenizer,
    save_model,
    save_tokenizer,
    word_tokenizer,
)


def run(config: PretrainingConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Inputs: `tasks`, optionally `base` (a checkpoint). Outputs: `checkpoint`."""
    directory = context.fetch(inputs["tasks"])
    base = context.fetch(inputs["base"]) if "base" in inputs else None
    _set_threads(config)
    try:
        model, tokenizer = _start(config, context.seed, directory, base)
    except CheckpointError as error:
        raise InputError(f"base checkpoint {inputs['base'].uri}: {error}") from error
    corpus = load_corpus(directory, tokenizer, config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    context.tracker.parameters({"model_parameters": parameters})
    summary: dict[str, float] = {"parameters": parameters}
    resume = Resume(context, context.identity(config, inputs), config.state_seconds)
    recorder = Recorder(config, corpus, context, resume)
    examples = context.work_dir / "examples.pt"
    if config.processes > 1:
        save_examples(corpus.examples, examples)
    arguments = (config, context.seed, directory, base, examples)
    with open_ranks(config.processes, context.work_dir, _follow, *arguments) as ranks:
        _train(config, model, corpus.examples, context.seed, resume.place, ranks, recorder, dense=base is None)
    for mode in ("dense", "sparse"):
        losses = validate(model, corpus, mode)
        summary.update({f"{mode}_{name}": value for name, value in losses.items()})
    shown = {task.environment: task for task in reversed(corpus.shown_tasks)}  # the first of each family
    plays = [(task, play_one(model, tokenizer, task, 0)) for _, task in sorted(shown.items())]
    curves = read_metrics(context.tracker.directory) if context.tracker.directory else {}
    context.tracker.artifact(write_report(context.work_dir, summary, curves, plays))
    checkpoint = context.work_dir / "checkpoint"
    save_model(model, checkpoint)
    save_tokenizer(tokenizer, checkpoint, chat_template=CHAT_TEMPLATE, bos=BOS, eos=END, pad=PAD, unknown=UNKNOWN)
    parents = [inputs[name] for name in ("tasks", "base") if name in inputs]
    pointer = context.publish("checkpoint", checkpoint, parents=parents, facts=summary)
    resume.finish()
    return StageResult({"checkpoint": pointer}, summary)


def _train(
    config: PretrainingConfig,
    model: Transformer,
    examples: Mapping[str, Sequence[Example]],
    seed: int,
    place: Place | None,
    ranks: Ranks,
    recorder: Recorder | None,
    *,
    dense: bool,
) -> None:
    place = ranks.from_first(place)
    for name in PHASES:
        if (name != "dense" or dense) and not place.is_past(name):
            train_phase(name, getattr(config, name), config, model, examples, seed, place, ranks, recorder)


def _follow(
    ranks: Ranks, config: PretrainingConfig, seed: int, directory: Path, base: Path | None, examples: Path
) -> None:
    """What the ranks above 0 do: the same training on their share of each batch, and nothing beside it."""
    _set_threads(config)
    model, _ = _start(config, seed, directory, base)
    _train(config, model, load_examples(examples), seed, None, ranks, None, dense=base is None)


def _set_threads(config: PretrainingConfig) -> None:
    torch.set_num_threads(threads_of_each(config.threads, config.processes))


def _start(config: PretrainingConfig, seed: int, directory: Path, base: Path | None) -> tuple[Transformer, Tokenizer]:
    """The weights to begin with and their tokenizer. Raises CheckpointError for a base that cannot be read."""
    torch.manual_seed(seed)
    if base is not None:
        return load_model(base), load_tokenizer(base)
    tokenizer = word_tokenizer(SPECIAL_WORDS, read_vocabulary(directory), UNKNOWN)
    return Transformer(_preset(config.model, tokenizer)).initialise(seed), tokenizer


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
        {"demonstrations": demonstrations["train"], "documents": documents["train"]},
        pack(demonstrations["validation"][:256]),
        pack(documents["validation"][:32]),
    )
