"""Which keys the queries select: three seeded generators, indices [T, K] int32 ascending, -1 tail.

The T queries stand at the end of S keys: query t may select keys up to S - T + t.
"""

import torch


def _top(scores_CS: torch.Tensor, position_C: torch.Tensor, keep: int) -> torch.Tensor:
    keys = scores_CS.shape[1]
    scores_CS.masked_fill_(torch.arange(keys, device=scores_CS.device) > position_C.unsqueeze(1), -torch.inf)
    values, indices = scores_CS.topk(min(keep, keys))
    indices = indices.masked_fill(torch.isneginf(values), keys).sort(-1).values
    return torch.where(indices == keys, -1, indices).int()


def uniform(tokens: int, keys: int, keep: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Every key alike: the worst case for the cache."""
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for start in range(0, tokens, 256):
        position = keys - tokens + torch.arange(start, min(start + 256, tokens), device=device)
        parts.append(_top(torch.rand(len(position), keys, device=device, generator=generator), position, keep))
    return torch.cat(parts)


def shared(tokens: int, keys: int, keep: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Blocks of 64 neighbouring queries draw from one pool of 1.25 x K keys."""
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for start in range(0, tokens, 64):
        position = keys - tokens + torch.arange(start, min(start + 64, tokens), device=device)
        pool = torch.rand(keys, device=device, generator=generator)
        outside = pool < pool.topk(min(keys, keep * 5 // 4)).values[-1]
        scores = torch.rand(len(position), keys, device=device, generator=generator)
        parts.append(_top(scores.masked_fill_(outside, -1.0), position, keep))
    return torch.cat(parts)


def realistic(tokens: int, keys: int, keep: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Recency, sinks and clusters: the first 16 keys, a bias to near keys, and bumps around 64 places that drift slowly
    from query to query; the rest is noise."""
    generator = torch.Generator(device).manual_seed(seed)
    place = torch.arange(keys, device=device, dtype=torch.float32)
    centres = torch.rand(64, device=device, generator=generator) * keys
    heights = 0.5 + 2 * torch.rand(64, device=device, generator=generator)
    parts = []
    for start in range(0, tokens, 64):
        position = keys - tokens + torch.arange(start, min(start + 64, tokens), device=device)
        clusters = torch.zeros(keys, device=device)
        for centre, height in zip(centres, heights, strict=True):
            clusters = torch.maximum(clusters, height * torch.exp(-(((place - centre) / 24) ** 2)))
        centres = (centres + 3 * torch.randn(64, device=device, generator=generator)) % keys
        recency = 1.5 * torch.exp((place - position.unsqueeze(1)) / 1024)
        noise = torch.rand(len(position), keys, device=device, generator=generator)
        scores = noise + clusters + recency
        scores[:, :16] += 10.0
        parts.append(_top(scores, position, keep))
    return torch.cat(parts)


GENERATORS = {"uniform": uniform, "shared": shared, "realistic": realistic}
