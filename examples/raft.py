"""RAFT (arXiv 2304.06767), an own method: denoising on the best share of each prompt's group, the rest left out.

gencontrol finetune --algorithm raft:Raft --set algorithm.keep=0.25    (with this folder on PYTHONPATH)
"""

import torch

from gencontrol.algorithms.matching.weighted import WeightedDenoising
from gencontrol.algorithms.online.base import OnPolicyConfig
from gencontrol.config import Share, options


@options
class RaftConfig(OnPolicyConfig):
    """Options of `Raft`.

    Args:
        keep: share of a group that is trained on, at least one sample.
    """

    generations: int = 8
    keep: Share = 0.125


class Raft(WeightedDenoising):
    """Weight 1 on the winners; NaN leaves the others out."""

    Config = RaftConfig
    name, title, paper = "raft", "RAFT, reward-ranked fine-tuning (Dong et al. 2023)", "arXiv:2304.06767"
    summary = "Denoising regression on the best share of each prompt's own samples."

    def weights(self, values: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Keep the best of each group."""
        groups = values.masked_fill(~valid, -torch.inf).view(-1, self.config.generations)
        count = max(1, int(self.config.keep * self.config.generations))
        best = torch.zeros_like(groups, dtype=torch.bool).scatter(1, groups.topk(count, 1).indices, True).flatten()
        return torch.where(best & valid, 1.0, torch.nan), {"reward/best_mean": float(values[best & valid].mean())}
