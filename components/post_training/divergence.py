"""Where engine and learner part: the first token, layer and cause.

The engine decodes token by token over a paged cache, the learner sees whole sequences at once; with the same weights
both must come to the same hidden states but for rounding. `diverge` feeds one recorded trajectory through both, looks
at every layer's output, and compares what may have made the difference: the keys that the lightning indexer selected,
the experts that the router chose, the arithmetic, and, behind the last layer, what top-p cut away.
Shape suffixes: L layers, T tokens that were fed, C hidden size, R sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from components.post_training.config import PostTrainingConfig
from components.post_training.learner import RolloutBatch, logprobs, pack_trajectories
from model import PackedContext, Transformer
from model.context import Context
from model.engine import Engine, SamplingParameters, Trajectory
from model.engine.engine import Turn
from model.engine.sampling import top_p_mask

Cause = Literal["selection", "routing", "dtype", "sampling mask", "record"]
GAP = 1e-4  # nats: the largest difference of log-probabilities that rounding explains, with weights in float32
HIDDEN = 1e-4  # the same of a hidden state, over the root mean square of its token's


@dataclass(frozen=True)
class Divergence:
    """token: position in the trajectory; layer: None where all layers agree. detail: the two sides, for a person."""

    token: int
    layer: int | None
    cause: Cause
    detail: str


def _packed(model: Transformer, trajectory: Trajectory, config: PostTrainingConfig) -> RolloutBatch:
    """The trajectory alone, with the choices that training keeps."""
    return pack_trajectories(
        [trajectory],
        [0.0],
        model.config.vocab_size,
        keep_routing=config.keep_routing,
        keep_sampling_masks=config.keep_sampling_masks,
        keep_selection=config.keep_selection,
    )


@dataclass
class Trace:
    """What a forward did: hidden_LTC, and by layer and token the keys it selected and the experts it chose."""

    hidden_LTC: torch.Tensor
    selected: list[list[tuple[int, ...]]]
    experts: list[list[tuple[int, ...]]]
    logprob_T: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of sampled tokens, 0 elsewhere


def gaps(model: Transformer, trajectory: Trajectory, config: PostTrainingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the sampled tokens, and what the engine's log-probability of each differs from the learner's, [R].

    The learner keeps the trajectory's choices as it does in training.
    """
    batch = _packed(model, trajectory, config)
    with torch.no_grad():
        learned_R, _ = logprobs(model, batch, keep_routing=config.keep_routing, keep_selection=config.keep_selection)
    return trajectory.sampled.nonzero().flatten(), (batch.old_logprob_R - learned_R).abs()


def diverge(
    engine_model: Transformer, model: Transformer, trajectory: Trajectory, stop_token: int, config: PostTrainingConfig
) -> Divergence | None:
    """The first place where the engine, with `engine_model`, and the learner, with `model`, part; None if nowhere.

    First means the earliest token, and of its layers the lowest: what goes wrong there reaches later tokens and higher
    layers only.
    """
    engine = engine_trace(engine_model, trajectory, stop_token, config.top_p)
    learner = learner_trace(model, trajectory, config)
    scale_LT = learner.hidden_LTC.square().mean(-1).sqrt().clamp(min=1e-12)
    apart_LT = (engine.hidden_LTC - learner.hidden_LTC).abs().amax(-1) / scale_LT
    # negated, so that NaN counts as apart
    beyond = (~(apart_LT <= HIDDEN)).T.nonzero()
    if len(beyond):
        token, layer = beyond[0].tolist()
        keys, experts = (
            (getattr(engine, name)[layer][token], getattr(learner, name)[layer][token])
            for name in ("selected", "experts")
        )
        if keys[0] != keys[1]:
            alone = [sorted(set(keys[side]) - set(keys[1 - side])) for side in (0, 1)]
            told = f"keys that only the engine selected {alone[0]}, only the learner {alone[1]}"
            return Divergence(token, layer, "selection", told)
        if experts[0] != experts[1]:
            told = f"experts of the engine {experts[0]}, of the learner {experts[1]}"
            return Divergence(token, layer, "routing", told)
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in engine_model.parameters()}))
        size = float(apart_LT[layer, token])
        told = f"the same choices, hidden states {size:.1e} apart; weights of the engine: {dtypes}"
        return Divergence(token, layer, "dtype", told)
    places, gap_R = gaps(model, trajectory, config)
    wrong = (~(gap_R <= GAP)).nonzero().flatten()
    if not len(wrong):
        return None
    token, gap = int(places[wrong[0]]), float(gap_R[wrong[0]])
    recorded, now = float(trajectory.logprobs[token]), float(engine.logprob_T[token])
    if abs(recorded - now) <= GAP:
        masks = trajectory.sampling_masks
        kept = f"the record keeps {len(masks[int(wrong[0])])} words" if masks else "the record has no mask"
        return Divergence(token, None, "sampling mask", f"all layers agree, {gap:.1e} nats apart; {kept}")
    told = f"all layers agree now, but {recorded:.6f} nats were recorded and the engine gives {now:.6f}"
    return Divergence(token, None, "record", f"{told}: what happened then does not happen now")


def learner_trace(model: Transformer, trajectory: Trajectory, config: PostTrainingConfig) -> Trace:
    """The learner's forward over the whole sequence, with the choices that training keeps."""
    batch = _packed(model, trajectory, config)
    context = PackedContext.from_lengths(batch.lengths, device=model.lm_head.weight.device)
    context.kept_routing, context.kept_selections = batch.routing, batch.selections
    context.record_selections = True
    with torch.no_grad(), tracing(model, len(trajectory) - 1) as trace:
        model.hidden(batch.inputs_T, context)
    return trace


def engine_trace(model: Transformer, trajectory: Trajectory, stop_token: int, top_p: float) -> Trace:
    """The engine's forwards over the same tokens, in the portions in which the rollout fed them."""
    engine = ForcedEngine(model, trajectory, stop_token, top_p)
    with tracing(model, len(trajectory) - 1) as trace:
        engine.feed()
    trace.logprob_T = engine.logprob_T
    return trace


class ForcedEngine(Engine):
    """Decodes one sequence whose tokens are given: what it would have sampled is replaced by what was."""

    def __init__(self, model: Transformer, trajectory: Trajectory, stop_token: int, top_p: float) -> None:
        tokens = len(trajectory)
        super().__init__(
            model,
            stop_token_id=stop_token,
            max_sequences=1,
            max_sequence_tokens=tokens + 1,
            record_selections=True,
        )
        self.forced = trajectory.token_ids.tolist()
        self.sampled = trajectory.sampled.tolist()
        self.temperature, self.top_p = trajectory.temperature, top_p
        self.logprob_T = torch.zeros(tokens)

    def feed(self) -> None:
        """Feed everything but the last token, which never goes through the network."""
        first = self.sampled.index(True) if True in self.sampled else len(self.forced)
        self.add(self.forced[:first], SamplingParameters(max_new_tokens=len(self.forced)))
        while self.live:
            self.step()

    def _sample(self, sequences: list[Any], logits_BV: torch.Tensor) -> list[Turn]:
        """Append the next token as it was, and the reply behind it, if it ended a turn."""
        (sequence,) = sequences
        at = len(sequence.token_ids)
        scaled_BV = logits_BV.double().cpu() / self.temperature
        logprob_BV = scaled_BV.log_softmax(dim=-1)
        if self.top_p < 1:
            kept_BV = top_p_mask(logprob_BV.exp(), torch.tensor([self.top_p]))
            logprob_BV = scaled_BV.masked_fill(~kept_BV, float("-inf")).log_softmax(dim=-1)
        self.logprob_T[at] = logprob_BV[0, self.forced[at]].item()
        sequence.token_ids.append(self.forced[at])
        while len(sequence.token_ids) < len(self.forced) and not self.sampled[len(sequence.token_ids)]:
            sequence.token_ids.append(self.forced[len(sequence.token_ids)])
        sequence.running = len(sequence.token_ids) < len(self.forced)
        return []


@contextmanager
def tracing(model: Transformer, tokens: int) -> Iterator[Trace]:
    """Collect what every layer of `model` does with one sequence's first `tokens` tokens.

    The forwards inside must record selections.
    """
    layers = list(model.model.layers)
    trace = Trace(
        torch.full((len(layers), tokens, model.config.hidden_size), float("nan")),
        [[()] * tokens for _ in layers],
        [[()] * tokens for _ in layers],
    )
    handles = []
    for index, layer in enumerate(layers):

        def collect(module: Any, arguments: Any, output: Any, index: int = index) -> None:
            context: Context = arguments[3]
            out_TC, experts_TK, _ = output
            places = context.position_T.tolist()
            trace.hidden_LTC[index, context.position_T.cpu()] = out_TC.detach().float().cpu()
            positions = context.positions_of(context.selections[-1]).tolist()
            for place, keys in zip(places, positions, strict=True):
                trace.selected[index][place] = tuple(key for key in keys if key >= 0)
            for place, experts in zip(places, experts_TK.tolist() if experts_TK is not None else (), strict=False):
                trace.experts[index][place] = tuple(sorted(experts))

        handles.append(layer.register_forward_hook(collect))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
