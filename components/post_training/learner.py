"""Trajectories -> log-probabilities: packs what the engine recorded, and makes the network keep its choices.

Keep Routing: the experts that the rollout used are used again. Keep Selection: so are the keys that its lightning
indexer selected. Keep Sampling Mask: what top-p cut away is cut away from the learner's distribution too.
Shape suffixes: T packed tokens, R sampled tokens, V vocabulary, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from model import PackedContext, Transformer
from model.engine import Trajectory


@dataclass
class RolloutBatch:
    """Packed trajectories. rows_R: packed position whose logits predict each sampled token."""

    inputs_T: torch.Tensor
    lengths: list[int]
    rows_R: torch.Tensor
    tokens_R: torch.Tensor
    old_logprob_R: torch.Tensor
    sequence_R: torch.Tensor
    advantage_N: torch.Tensor
    routing: list[torch.Tensor] | None
    selections: list[torch.Tensor] | None
    kept_RV: torch.Tensor | None
    temperature: float


def pack_trajectories(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float],
    vocabulary: int,
    *,
    keep_routing: bool,
    keep_sampling_masks: bool = True,
    keep_selection: bool = False,
) -> RolloutBatch:
    """Raises ValueError when a trajectory's record does not cover its tokens, or temperatures differ."""
    temperatures = {trajectory.temperature for trajectory in trajectories}
    if len(temperatures) != 1:
        raise ValueError(f"trajectories of one batch must share a temperature, got {sorted(temperatures)}")
    rows, sequence, kept = [], [], []
    start = 0
    for index, trajectory in enumerate(trajectories):
        fed = len(trajectory) - 1
        if keep_routing and trajectory.routing.shape[0] and trajectory.routing.shape[1] != fed:
            raise ValueError(f"routing covers {trajectory.routing.shape[1]} tokens of {fed}")
        places = trajectory.sampled[1:].nonzero().flatten()
        rows.append(places + start)
        sequence.append(torch.full_like(places, index))
        if keep_sampling_masks:
            kept.append(_kept_mask(trajectory, len(places), vocabulary))
        start += fed
    routing = None
    if keep_routing and trajectories[0].routing.shape[0]:
        layers = trajectories[0].routing.shape[0]
        routing = [torch.cat([t.routing[layer] for t in trajectories]).long() for layer in range(layers)]
    selections = None
    if keep_selection:
        selections = _selections(trajectories)
    cut = keep_sampling_masks and any(trajectory.sampling_masks is not None for trajectory in trajectories)
    return RolloutBatch(
        inputs_T=torch.cat([t.token_ids[:-1] for t in trajectories]),
        lengths=[len(t) - 1 for t in trajectories],
        rows_R=torch.cat(rows),
        tokens_R=torch.cat([t.token_ids[t.sampled] for t in trajectories]),
        old_logprob_R=torch.cat([t.logprobs[t.sampled] for t in trajectories]),
        sequence_R=torch.cat(sequence),
        advantage_N=torch.tensor(list(advantages)),
        routing=routing,
        selections=selections,
        kept_RV=torch.cat(kept) if cut else None,
        temperature=temperatures.pop(),
    )


def _selections(trajectories: Sequence[Trajectory]) -> list[torch.Tensor]:
    """Per layer the selected positions [T, K] of all trajectories' fed tokens."""
    found = [trajectory.selections for trajectory in trajectories]
    recorded = [selection for selection in found if selection is not None]
    if len(recorded) != len(found):
        raise ValueError("keep_selection needs trajectories of an engine with record_selections")
    return list(torch.cat(recorded, dim=1).unbind(0))


def _kept_mask(trajectory: Trajectory, sampled: int, vocabulary: int) -> torch.Tensor:
    """bool [sampled, V]: what top-p kept; everything where nothing was cut."""
    if trajectory.sampling_masks is None:
        return torch.ones(sampled, vocabulary, dtype=torch.bool)
    if len(trajectory.sampling_masks) != sampled:
        raise ValueError(f"{len(trajectory.sampling_masks)} sampling masks for {sampled} sampled tokens")
    mask = torch.zeros(sampled, vocabulary, dtype=torch.bool)
    for row, ids in enumerate(trajectory.sampling_masks):
        mask[row, ids.long()] = True
    return mask


def logprobs(
    model: Transformer, batch: RolloutBatch, *, keep_routing: bool = True, keep_selection: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability [R] of each sampled token under `model`, and the entropy [R] of its distribution (detached)."""
    context = PackedContext.from_lengths(batch.lengths)
    context.kept_routing = batch.routing if keep_routing else None
    context.kept_selections = batch.selections if keep_selection else None
    hidden_TC = model.hidden(batch.inputs_T, context)
    logits_RV = model.lm_head(hidden_TC[batch.rows_R]).float() / batch.temperature
    if batch.kept_RV is not None:
        logits_RV = logits_RV.masked_fill(~batch.kept_RV, float("-inf"))
    logprob_RV = logits_RV.log_softmax(dim=-1)
    with torch.no_grad():
        entropy_R = torch.special.entr(logprob_RV.exp()).sum(dim=-1)
    return logprob_RV.gather(1, batch.tokens_R[:, None]).squeeze(1), entropy_R


def micro_batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of sequences of these lengths, by length, in parts of at most `tokens` tokens (one sequence at least)."""
    part: list[int] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if part and used + lengths[index] > tokens:
            yield part
            part, used = [], 0
        part.append(index)
        used += lengths[index]
    if part:
        yield part
