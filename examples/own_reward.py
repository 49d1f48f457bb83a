"""A reward of your own: tune the bundled picture model towards blue, and see whether held-out prompts agree.

python examples/own_reward.py [output folder]
"""

import sys

import torch

import gencontrol
from gencontrol.types import RewardContext, RewardOut


class Blue:
    """Mean blue minus the mean of red and green, one number per picture; more is better."""

    name, kind, differentiable = "blue", "item", True

    def __call__(self, samples: torch.Tensor, context: RewardContext) -> RewardOut:
        values = samples[:, 2].mean((1, 2)) - samples[:, :2].mean((1, 2, 3))
        return RewardOut(values, torch.isfinite(values))


if __name__ == "__main__":
    result = gencontrol.finetune(
        "bundled-image",
        Blue(),
        algorithm="draft",  # the reward has a gradient; "crd" needs none
        output=sys.argv[1] if len(sys.argv) > 1 else "runs/blue",
        steps=3,
        lora_rank=4,
        eval_count=4,
        prompts_per_round=4,
        demo_steps=6,
        eval_steps=6,
    )
    before, after = (result.metrics[f"eval/reward/{name}"] for name in ("base_mean", "mean"))
    print(f"blue before {before:.3f}, after {after:.3f}; look at {result.folder}/report.html")
