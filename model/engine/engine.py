"""Batched incremental decoding over cached latents and indexer keys, with continuous batching.

A sequence is added, sampled until a stop token or its limit ends the turn, then extended with a reply (a tool result)
and sampled on, or released. Every step feeds all live sequences at once: prompts, replies and single tokens alike.
Pages for a sequence's longest possible length are reserved when it enters, so that a running one never waits.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from model.context import PagedContext
from model.engine.sampling import SamplingParameters, sample, uniform
from model.engine.trajectory import Trajectory
from model.transformer import Transformer


class EngineFull(RuntimeError):
    """The sequence can never fit: it is longer than the cache or than `max_sequence_tokens`."""


@dataclass(frozen=True)
class Turn:
    """A turn that ended: its sampled tokens (stop token included) and why it ended ("stop" or "length")."""

    handle: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass
class _Sequence:
    handle: int
    sampling: SamplingParameters
    limit: int
    token_ids: list[int]
    fed: int = 0
    turn_start: int = 0
    running: bool = True
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    finish_reason: str = ""


class Engine:
    """max_sequences run at once, each at most max_sequence_tokens long; more are queued.

    cache_tokens bounds the cache (default: room for max_sequences full sequences); step_tokens bounds what one forward
    is fed, so that a long prompt is prefilled in pieces between other sequences' tokens. record_selections keeps what
    the lightning indexer selected for every token, 4 bytes per token, layer and key.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        stop_token_id: int,
        max_sequences: int = 256,
        max_sequence_tokens: int = 512,
        page_size: int = 32,
        cache_tokens: int | None = None,
        step_tokens: int = 8192,
        record: bool = True,
        record_selections: bool = False,
        weight_version: int = 0,
    ) -> None:
        self.model, self.stop_token_id, self.page_size = model, stop_token_id, page_size
        self.max_sequences, self.max_sequence_tokens = max_sequences, max_sequence_tokens
        self.step_tokens, self.record, self.weight_version = step_tokens, record, weight_version
        self.tie_generator: torch.Generator | None = None  # see PagedContext
        config, weight = model.config, model.lm_head.weight
        self.device, dtype = weight.device, weight.dtype
        pages_each = -(-max_sequence_tokens // page_size)
        pages = max_sequences * pages_each if cache_tokens is None else -(-cache_tokens // page_size)
        latent_width = config.kv_lora_rank + config.qk_rope_head_dim
        layers = range(config.num_hidden_layers)

        def rows(width: int) -> torch.Tensor:
            return torch.zeros(pages, page_size, width, dtype=dtype, device=self.device)

        self.latent_cache = [rows(latent_width) for _ in layers]
        self.index_k_cache = [rows(config.index_head_dim) for _ in layers]
        self._free_pages = list(range(pages - 1, -1, -1))
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self._page_table = torch.zeros(max_sequences, pages_each, dtype=torch.int32)
        # records by (slot, position)
        size = (max_sequences, max_sequence_tokens)
        self._sampled = torch.zeros(size, dtype=torch.bool)
        self._logprobs = torch.zeros(size, dtype=torch.float32)
        self._versions = torch.full(size, -1, dtype=torch.int64)
        moe_layers = len(model.routers())
        self._routing = torch.zeros(*size, moe_layers, config.num_experts_per_tok, dtype=torch.int16)
        self._selections: torch.Tensor | None = None
        if record_selections:
            self._selections = torch.full((*size, config.num_hidden_layers, config.index_topk), -1, dtype=torch.int32)
        self._sequences: dict[int, _Sequence] = {}
        self._queue: deque[int] = deque()
        self._handles = itertools.count()

    # -- sequences ---------------------------------------------------------------------------------------------------

    def add(
        self, prompt_ids: Sequence[int], sampling: SamplingParameters, *, max_total_tokens: int | None = None
    ) -> int:
        """Queue a sequence; returns its handle.

        max_total_tokens bounds prompt, replies and sampled tokens together. Raises ValueError for an empty prompt or an
        id outside the vocabulary, EngineFull for a sequence that can never fit.
        """
        limit = min(max_total_tokens or self.max_sequence_tokens, self.max_sequence_tokens)
        self._check_ids(prompt_ids)
        if len(prompt_ids) >= limit:
            raise EngineFull(f"a prompt of {len(prompt_ids)} tokens leaves no room in a sequence of {limit}")
        if -(-limit // self.page_size) > self.latent_cache[0].shape[0]:
            raise EngineFull(f"a sequence of {limit} tokens does not fit the cache; raise cache_tokens")
        handle = next(self._handles)
        ids = list(prompt_ids)
        self._sequences[handle] = _Sequence(handle, sampling, limit, ids, turn_start=len(ids))
        self._queue.append(handle)
        return handle

    def extend(self, handle: int, token_ids: Sequence[int], *, max_new_tokens: int | None = None) -> bool:
        """Append a reply and let the model write on. False (and nothing is done) when the limit leaves no room."""
        sequence = self._sequences[handle]
        if sequence.running:
            raise ValueError(f"sequence {handle} is still writing its turn")
        self._check_ids(token_ids)
        if len(sequence.token_ids) + len(token_ids) >= sequence.limit:
            sequence.finish_reason = "length"
            return False
        sequence.token_ids.extend(token_ids)
        sequence.turn_start = len(sequence.token_ids)
        if max_new_tokens is not None:
            sequence.sampling = replace(sequence.sampling, max_new_tokens=max_new_tokens)
        sequence.running = True
        return True

    def release(self, handle: int) -> Trajectory:
        """End a sequence (running or not), free its pages, return what it produced."""
        sequence = self._sequences.pop(handle)
        length, slot = len(sequence.token_ids), sequence.slot
        selections = None
        if slot < 0:
            self._queue.remove(handle)
            slot_records = slice(0, 0)
            sampled = torch.zeros(length, dtype=torch.bool)
            logprobs, versions = torch.zeros(length), torch.full((length,), -1)
            routing = self._routing[0, slot_records].permute(1, 0, 2).clone()
        else:
            sampled = self._sampled[slot, :length].clone()
            logprobs, versions = self._logprobs[slot, :length].clone(), self._versions[slot, :length].clone()
            # clone, as contiguous() would give a view of one layer's record, which the slot's next sequence overwrites
            routing = self._routing[slot, : sequence.fed].permute(1, 0, 2).clone()
            if self._selections is not None:
                selections = self._selections[slot, : sequence.fed].permute(1, 0, 2).clone()
            self._free_pages.extend(reversed(sequence.pages))
            self._free_slots.append(slot)
        return Trajectory(
            token_ids=torch.tensor(sequence.token_ids),
            sampled=sampled,
            logprobs=logprobs,
            weight_versions=versions,
            routing=routing,
            sampling_masks=sequence.masks or None,
            temperature=sequence.sampling.temperature,
            finish_reason=sequence.finish_reason,
            selections=selections,
        )

    def written(self, handle: int) -> tuple[list[int], list[float], str | None]:
        """The current turn so far: sampled ids, their log-probabilities, why it ended (None while it goes on)."""
        sequence = self._sequences[handle]
        ids = sequence.token_ids[sequence.turn_start :]
        logprobs = self._logprobs[sequence.slot, sequence.turn_start : len(sequence.token_ids)].tolist() if ids else []
        return ids, logprobs, None if sequence.running else sequence.finish_reason

    @property
    def live(self) -> int:
        """Sequences that are queued or writing."""
        return sum(s.running for s in self._sequences.values())

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        vocabulary = self.model.config.vocab_size
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= vocabulary:
            raise ValueError(f"token ids must be a non-empty sequence in [0, {vocabulary})")

    def _admit(self) -> None:
        while self._queue and self._free_slots:
            sequence = self._sequences[self._queue[0]]
            needed = -(-sequence.limit // self.page_size)
            if needed > len(self._free_pages):
                return
            self._queue.popleft()
            sequence.slot = self._free_slots.pop()
            sequence.pages = [self._free_pages.pop() for _ in range(needed)]
            self._page_table[sequence.slot, :needed] = torch.tensor(sequence.pages, dtype=torch.int32)
            self._sampled[sequence.slot] = False
            self._logprobs[sequence.slot] = 0.0
            self._versions[sequence.slot] = -1

    # -- decoding ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Turn]:
        """Feed every live sequence once; returns the turns that ended with this step.

        Raises RuntimeError when sequences are queued and every slot or page is held by one that waits for its reply.
        """
        self._admit()
        budget, fed = self.step_tokens, []
        for sequence in self._sequences.values():
            if sequence.running and sequence.slot >= 0 and budget > 0:
                count = min(len(sequence.token_ids) - sequence.fed, budget)
                budget -= count
                fed.append((sequence, count))
        if not fed:
            if self._queue:
                queued, held = len(self._queue), len(self._sequences) - len(self._queue)
                raise RuntimeError(f"{queued} sequences are queued behind {held} ended ones: release or extend")
            return []
        logits_BV, complete = self._forward(fed)
        return self._sample(complete, logits_BV) if complete else []

    def _forward(self, fed: list[tuple[_Sequence, int]]) -> tuple[torch.Tensor, list[_Sequence]]:
        """Logits at the last position of every sequence that was fed to its end, and those sequences."""
        counts = torch.tensor([count for _, count in fed])
        starts = torch.tensor([sequence.fed for sequence, _ in fed])
        ids_T = torch.tensor(
            [token for s, count in fed for token in s.token_ids[s.fed : s.fed + count]], device=self.device
        )
        sequence_T = torch.arange(len(fed)).repeat_interleave(counts)
        first_row = (counts.cumsum(0) - counts).repeat_interleave(counts)
        position_T = torch.arange(ids_T.shape[0]) - first_row + starts.repeat_interleave(counts)
        slots = torch.tensor([sequence.slot for sequence, _ in fed])
        pages_in_use = -(-int((starts + counts).max()) // self.page_size)
        context = PagedContext(
            position_T=position_T.to(self.device),
            latent_cache=self.latent_cache,
            index_k_cache=self.index_k_cache,
            page_table_NP=self._page_table[slots, :pages_in_use].to(self.device),
            sequence_T=sequence_T.to(self.device),
            record_routing=self.record,
            record_selections=self._selections is not None,
            tie_generator=self.tie_generator,
        )
        hidden_TC = self.model.hidden(ids_T, context)
        if self.record and context.routing:
            experts = torch.stack(context.routing, dim=1).to("cpu", torch.int16)
            self._routing[slots[sequence_T], position_T] = experts
        if self._selections is not None:
            # a step of short sequences selects fewer keys than index_topk
            self._selections[slots[sequence_T], position_T] = -1
            for layer, rows_TK in enumerate(context.selections):
                positions_TK = context.positions_of(rows_TK).cpu()
                self._selections[slots[sequence_T], position_T, layer, : positions_TK.shape[1]] = positions_TK
        complete, last_rows = [], []
        for (sequence, count), end in zip(fed, counts.cumsum(0).tolist(), strict=True):
            sequence.fed += count
            if sequence.fed == len(sequence.token_ids):
                complete.append(sequence)
                last_rows.append(end - 1)
        return self.model.lm_head(hidden_TC[last_rows]).float() if complete else hidden_TC[:0], complete

    def _sample(self, sequences: list[_Sequence], logits_BV: torch.Tensor) -> list[Turn]:
        for row, sequence in enumerate(sequences):
            if sequence.sampling.logit_mask is not None:
                allowed = sequence.sampling.logit_mask.allowed(sequence.token_ids).to(logits_BV.device)
                logits_BV[row] = logits_BV[row].masked_fill(~allowed, float("-inf"))
        position = np.array([len(s.token_ids) for s in sequences])
        number_B = torch.from_numpy(uniform(np.array([s.sampling.seed for s in sequences]), position))
        temperature_B = torch.tensor([s.sampling.temperature for s in sequences], dtype=torch.float64)
        top_p_B = torch.tensor([s.sampling.top_p for s in sequences], dtype=torch.float64)
        device = logits_BV.device
        token_B, logprob_B, mask_BV = sample(
            logits_BV, temperature_B.to(device), top_p_B.to(device), number_B.to(device)
        )
        slots = torch.tensor([s.slot for s in sequences])
        at = torch.from_numpy(position)
        self._sampled[slots, at] = True
        self._logprobs[slots, at] = logprob_B.cpu()
        self._versions[slots, at] = self.weight_version
        ended = []
        for row, (sequence, token) in enumerate(zip(sequences, token_B.tolist(), strict=True)):
            sequence.token_ids.append(token)
            if mask_BV is not None and sequence.sampling.top_p < 1:
                sequence.masks.append(mask_BV[row].nonzero().flatten().to("cpu", torch.int32))
            written = len(sequence.token_ids) - sequence.turn_start
            if token == self.stop_token_id:
                sequence.finish_reason = "stop"
            elif written >= sequence.sampling.max_new_tokens or len(sequence.token_ids) >= sequence.limit:
                sequence.finish_reason = "length"
            else:
                continue
            sequence.running = False
            turn_ids, logprobs, _ = self.written(sequence.handle)
            ended.append(Turn(sequence.handle, turn_ids, logprobs, sequence.finish_reason))
        return ended
