"""What a phase trains, by which optimiser, and at which rate."""

from __future__ import annotations

import math

import torch

from components.pretraining.config import PhaseConfig, PretrainingConfig
from components.pretraining.muon import Muon
from components.runtime.ranks import Ranks
from model import Transformer


def learning_rate_share(step: int, phase: PhaseConfig) -> float:
    """Linear warm-up, then cosine down to `final_share`; 1 is the peak."""
    if step < phase.warmup_steps:
        return (step + 1) / phase.warmup_steps
    done = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    return phase.final_share + (1 - phase.final_share) * 0.5 * (1 + math.cos(math.pi * done))


def curriculum_share(step: int, phase: PhaseConfig) -> float:
    """Share of the documents, shortest first, that a step may draw from; grows in eighths."""
    if phase.curriculum == 0:
        return 1.0
    return min(1.0, math.ceil(8 * (step + 1) / (phase.curriculum * phase.steps)) / 8)


def optimizers_of(
    name: str, phase: PhaseConfig, config: PretrainingConfig, model: Transformer, ranks: Ranks | None = None
) -> list[torch.optim.Optimizer]:
    """Muon over the network's matrices, AdamW over the rest, of what the phase trains (sets requires_grad).

    Embedding, head, routers, vectors and the lightning indexer belong to AdamW; vectors and the embedding do not decay.
    Every parameter group has a `peak` rate.
    """
    network, indexer = model.network_parameters(), model.indexer_parameters()
    for parameter in network:
        parameter.requires_grad_(name != "warmup")
    for parameter in indexer:
        parameter.requires_grad_(name != "dense")
    found: list[torch.optim.Optimizer] = []
    matrices = {id(p) for p in model.hidden_matrices()}
    muon = [p for p in network if p.requires_grad and id(p) in matrices]
    if muon:
        rate, decay = phase.matrix_learning_rate, config.weight_decay
        found.append(Muon([{"params": muon, "peak": rate}], lr=rate, weight_decay=decay, ranks=ranks))
    embedding = model.model.embed_tokens.weight
    indexer_rate = phase.learning_rate if name == "warmup" else phase.indexer_learning_rate
    groups = []
    for parameters, peak in ((network, phase.learning_rate), (indexer, indexer_rate)):
        trained = [p for p in parameters if p.requires_grad and id(p) not in matrices]
        decayed = [p for p in trained if p.dim() >= 2 and p is not embedding]
        kept = [p for p in trained if p.dim() < 2 or p is embedding]
        groups.append({"params": decayed, "lr": peak, "peak": peak, "weight_decay": config.weight_decay})
        groups.append({"params": kept, "lr": peak, "peak": peak, "weight_decay": 0.0})
    found.append(torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), fused=True))
    return found
