"""Packed sequences as a few padded batches: rows that share a key_start belong to one sequence, and sequences of
similar length are computed together, so that 64 sequences of about 100 tokens are a handful of large products and not
64 small ones."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """One padded batch of N sequences (or pieces of one): what to gather, and what of it counts."""

    rows_NQ: torch.Tensor  # int64 query rows; padding repeats the last one
    real_NQ: torch.Tensor  # bool: not padding
    keys_NL: torch.Tensor  # int64 key rows; padding repeats the last one
    valid_NQL: torch.Tensor  # bool: this query may see this key


def plan_tiles(key_start_T: torch.Tensor, key_end_T: torch.Tensor, elements_per_pair: int, budget: int) -> list[Tile]:
    """Cuts the (query, key) pairs into tiles of about `budget` elements, where a padded pair costs `elements_per_pair`.

    key_start_T, key_end_T: [T] integers, the key rows that each query sees. Every query row is real in exactly one
    tile.
    """
    if key_start_T.numel() == 0:
        return []
    starts, counts = torch.unique_consecutive(key_start_T, return_counts=True)
    run_of_row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    ends = torch.zeros_like(starts).scatter_reduce(
        0, run_of_row, key_end_T.to(starts.dtype), "amax", include_self=False
    )
    first_rows = counts.cumsum(0) - counts
    runs = list(
        zip(first_rows.tolist(), counts.tolist(), starts.tolist(), (ends - starts).clamp(min=1).tolist(), strict=True)
    )

    pieces: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for row, count, key, length in runs:
        step = max(1, min(count, budget // max(1, elements_per_pair * length)))
        for offset in range(0, count, step):
            piece = (row + offset, min(step, count - offset), key, length)
            # padding wastes at most a factor 2 on each side
            pieces.setdefault((piece[1].bit_length(), length.bit_length()), []).append(piece)

    tiles = []
    for (rows_bits, keys_bits), group in sorted(pieces.items()):
        together = max(1, budget // max(1, elements_per_pair << (rows_bits + keys_bits)))
        for offset in range(0, len(group), together):
            tiles.append(_tile(group[offset : offset + together], key_start_T, key_end_T))
    return tiles


def _tile(pieces: list[tuple[int, int, int, int]], key_start_T: torch.Tensor, key_end_T: torch.Tensor) -> Tile:
    table = torch.tensor(pieces, dtype=torch.int64, device=key_start_T.device)
    row, count, key, length = (column.unsqueeze(1) for column in table.unbind(1))
    steps_Q = torch.arange(int(count.max()), device=table.device)
    rows_NQ, real_NQ = row + torch.minimum(steps_Q, count - 1), steps_Q < count
    # a piece of a causal sequence needs no key behind its last row's range
    length = torch.minimum(length, (key_end_T[rows_NQ].amax(1, keepdim=True) - key).clamp(min=1))
    steps_L = torch.arange(int(length.max()), device=table.device)
    keys_NL = key + torch.minimum(steps_L, length - 1)
    end_NQ = torch.where(real_NQ, key_end_T[rows_NQ], key)
    valid_NQL = (steps_L < length).unsqueeze(1) & (keys_NL.unsqueeze(1) < end_NQ.unsqueeze(2))
    return Tile(rows_NQ, real_NQ, keys_NL, valid_NQL)


def unpack(parts: list[torch.Tensor], tiles: list[Tile]) -> torch.Tensor:
    """[N, Q, ...] of each tile -> [T, ...] in row order, padding dropped."""
    rows = torch.cat([tile.rows_NQ[tile.real_NQ] for tile in tiles])
    values = torch.cat([part[tile.real_NQ] for part, tile in zip(parts, tiles, strict=True)])
    if bool((rows[1:] > rows[:-1]).all()):
        return values
    return values.index_select(0, torch.argsort(rows))
