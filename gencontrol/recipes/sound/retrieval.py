"""Retrieval accuracy between captions and clips, from embeddings."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.rng import stream


def retrieval_at_one(
    queries: Float[Tensor, "n d"], answers: Float[Tensor, "n d"], *, candidates: int, seed: int
) -> float:
    """Share of queries whose own answer beats `candidates` - 1 others, drawn at random for each query."""
    similarity = queries.float() @ answers.float().T
    count, hits = len(queries), 0
    for row in range(count):
        draw = torch.randperm(count - 1, generator=stream(seed, "retrieval", row))[: candidates - 1]
        others = draw + (draw >= row)
        hits += bool(similarity[row, row] > similarity[row, others].max())
    return hits / count
