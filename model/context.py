"""What a forward attends over: packed sequences (training, evaluation) or a paged cache (decoding).

The network's forward is the same for both. A context answers two questions for a layer: which key rows exist after
this step's tokens are added, and which of them each query attends to. It also collects what the forward is asked to
record (selections, routing) or made to keep (routing), and the lightning indexer's loss.
Shape suffixes: T new tokens (all sequences, packed), S key rows, H heads, D dim, K selected, N sequences, P pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from kernels.indexer_topk import indexer_topk
from kernels.paged_indexer_topk import paged_indexer_topk
from model.random_ties import random_tie_positions

Selection = Literal["sparse", "dense", "window", "random"]
IndexerLoss = Literal["none", "dense", "sparse"]


@dataclass
class Context:
    """Base of both contexts.

    position_T: int64, position of each new token in its sequence.
    indexer_loss: which loss of the lightning indexer the forward computes ("dense": Eq. 3, "sparse": Eq. 4).
    kept_routing: per MoE layer the expert ids [T, K] to use (Keep Routing), or None to let the router choose.
    kept_selections: per layer the positions [T, K] to attend to, -1 for none, or None to let the indexer select.
    """

    position_T: torch.Tensor
    indexer_loss: IndexerLoss = "none"
    record_selections: bool = False
    record_routing: bool = False
    kept_routing: list[torch.Tensor] | None = None
    kept_selections: list[torch.Tensor] | None = None
    checkpoint_layers: bool = False
    random_seed: int = 0
    selections: list[torch.Tensor] = field(default_factory=list)
    routing: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)

    def add_keys(
        self, layer: int, latent_TD: torch.Tensor, index_k_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the new tokens' latent KV and indexer keys (None where nothing reads them); returns all rows."""
        raise NotImplementedError

    def select(
        self, layer: int, q_THD: torch.Tensor, k_SD: torch.Tensor, weight_TH: torch.Tensor, k: int
    ) -> torch.Tensor:
        raise NotImplementedError

    def chosen_or_all(self, k: int, choose: Callable[[torch.Tensor | slice], torch.Tensor]) -> torch.Tensor:
        """Rows [T, k]: every key of a query that has no more than k, and `choose(queries)` [queries, k] of the others.

        On a GPU, which would have to wait to know which those are, `choose` has the say for all queries.
        """
        if self.position_T.is_cuda:
            return choose(slice(None))
        beyond_U = (self.position_T >= k).nonzero().flatten()
        if len(beyond_U) == len(self.position_T):
            return choose(slice(None))
        columns = torch.arange(k)
        rows_TK = self.rows_of(torch.where(columns <= self.position_T[:, None], columns, -1))
        if len(beyond_U):
            rows_TK[beyond_U] = choose(beyond_U)
        return rows_TK

    def rows_of(self, positions_TK: torch.Tensor) -> torch.Tensor:
        """Key rows (int32) of positions of the query's own sequence; -1 stays -1."""
        raise NotImplementedError

    def positions_of(self, rows_TK: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows_of`: positions (int32) of selected key rows; -1 stays -1."""
        raise NotImplementedError

    def fixed_rows(self, kind: Selection, layer: int, k: int) -> torch.Tensor:
        """A selection that does not look at the content: every key, a recency window, or k random keys."""
        position = self.position_T[:, None]
        longest = int(self.position_T.max()) + 1 if self.position_T.numel() else 0
        if kind == "dense":
            offsets = torch.arange(longest, device=position.device)
            return self.rows_of(torch.where(offsets <= position, offsets, -1))
        if kind == "window":
            offsets = torch.arange(k - 1, -1, -1, device=position.device)
            columns = position - offsets
            # short rows keep their valid entries in front and the -1 tail behind
            columns = torch.where(columns >= 0, columns, torch.iinfo(torch.int64).max).sort(dim=-1).values
            return self.rows_of(torch.where(columns <= position, columns, -1))
        generator = torch.Generator(device="cpu").manual_seed(self.random_seed * 1009 + layer)
        noise = torch.rand(position.shape[0], longest, generator=generator).to(position.device)
        noise = noise.masked_fill(torch.arange(longest, device=position.device) > position, -1.0)
        best = noise.topk(min(k, longest), dim=-1)
        columns = torch.where(best.values >= 0, best.indices, torch.iinfo(torch.int64).max).sort(dim=-1).values
        return self.rows_of(torch.where(columns <= position, columns, -1))


@dataclass
class PackedContext(Context):
    """Whole sequences, one behind the other; keys are this batch's own rows."""

    key_start_T: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    key_end_T: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def from_lengths(cls, lengths: list[int] | torch.Tensor, device: torch.device | str = "cpu") -> PackedContext:
        """Context of sequences of these lengths (tokens). Raises ValueError for a length below 1."""
        lengths_N = torch.as_tensor(lengths, dtype=torch.int64)
        if lengths_N.numel() == 0 or int(lengths_N.min()) < 1:
            raise ValueError(f"sequence lengths must be at least 1, got {lengths_N.tolist()}")
        ends_N = lengths_N.cumsum(0)
        start_T = (ends_N - lengths_N).repeat_interleave(lengths_N).to(device)
        row_T = torch.arange(int(ends_N[-1]), device=device)
        return cls(position_T=row_T - start_T, key_start_T=start_T, key_end_T=row_T + 1)

    def add_keys(
        self, layer: int, latent_TD: torch.Tensor, index_k_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return latent_TD, index_k_TD

    def select(
        self, layer: int, q_THD: torch.Tensor, k_SD: torch.Tensor, weight_TH: torch.Tensor, k: int
    ) -> torch.Tensor:
        def choose(u: torch.Tensor | slice) -> torch.Tensor:
            return indexer_topk(q_THD[u], k_SD, weight_TH[u], self.key_start_T[u], self.key_end_T[u], k)[0]

        return self.chosen_or_all(k, choose)

    def rows_of(self, positions_TK: torch.Tensor) -> torch.Tensor:
        return torch.where(positions_TK >= 0, positions_TK + self.key_start_T[:, None], -1).to(torch.int32)

    def positions_of(self, rows_TK: torch.Tensor) -> torch.Tensor:
        return torch.where(rows_TK >= 0, rows_TK - self.key_start_T[:, None], -1).to(torch.int32)


@dataclass
class PagedContext(Context):
    """New tokens of running sequences over a paged cache: prefill, extension and decoding alike.

    latent_cache[layer]: [pages, page size, kv_lora_rank + rope]; index_k_cache[layer]: [pages, page size, D].
    page_table_NP: int32, the pages of each sequence in order; sequence_T: int64, row of page_table_NP of each token.
    tie_generator: gives ties of the indexer's scores to a random key; for an ablation only.
    """

    latent_cache: list[torch.Tensor] = field(default_factory=list)
    index_k_cache: list[torch.Tensor] = field(default_factory=list)
    page_table_NP: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    sequence_T: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    tie_generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self.page_size = self.latent_cache[0].shape[1]
        self.new_rows_T = self.rows_of(self.position_T[:, None]).flatten().long()

    def add_keys(
        self, layer: int, latent_TD: torch.Tensor, index_k_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        latent_SD, index_k_SD = self.latent_cache[layer].flatten(0, 1), self.index_k_cache[layer].flatten(0, 1)
        latent_SD[self.new_rows_T] = latent_TD.to(latent_SD.dtype)
        if index_k_TD is not None:
            index_k_SD[self.new_rows_T] = index_k_TD.to(index_k_SD.dtype)
        return latent_SD, index_k_SD

    def select(
        self, layer: int, q_THD: torch.Tensor, k_SD: torch.Tensor, weight_TH: torch.Tensor, k: int
    ) -> torch.Tensor:
        if int(self.position_T.max()) < k:  # every key of every query is selected
            return self.fixed_rows("dense", layer, k)
        if self.tie_generator is not None:
            cache, end_T = self.index_k_cache[layer], self.position_T + 1
            arguments = (q_THD, cache, weight_TH, self.page_table_NP, self.sequence_T, end_T, k, self.tie_generator)
            return self.rows_of(random_tie_positions(*arguments))
        cache = self.index_k_cache[layer]

        def choose(u: torch.Tensor | slice) -> torch.Tensor:
            queries = (self.page_table_NP, self.sequence_T[u], self.position_T[u] + 1)
            return paged_indexer_topk(q_THD[u], cache, weight_TH[u], *queries, k)[0]

        return self.chosen_or_all(k, choose)

    def rows_of(self, positions_TK: torch.Tensor) -> torch.Tensor:
        page_TK = positions_TK.clamp(min=0) // self.page_size
        rows_TK = self.page_table_NP[self.sequence_T[:, None], page_TK].long() * self.page_size
        return torch.where(positions_TK >= 0, rows_TK + positions_TK % self.page_size, -1).to(torch.int32)

    def positions_of(self, rows_TK: torch.Tensor) -> torch.Tensor:
        table_TP = self.page_table_NP[self.sequence_T]
        page_TK = rows_TK.clamp(min=0) // self.page_size
        # the first column that names the page: behind a sequence's own pages the table may name any
        column_TK = (table_TP[:, None, :] == page_TK[:, :, None]).int().argmax(dim=-1)
        return torch.where(rows_TK >= 0, column_TK * self.page_size + rows_TK % self.page_size, -1).to(torch.int32)
