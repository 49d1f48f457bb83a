"""Your own diffusers pipeline and a function as reward: tune a LoRA, save it, draw with the tuned pipeline.

    python examples/finetune_own_pipeline.py MODEL [output folder]

MODEL is a folder of, or a downloaded hub id for, Stable Diffusion, SDXL, SD3, FLUX, PixArt, Stable Audio or AudioLDM2.
"""

import sys

import torch
from diffusers import DiffusionPipeline

import gencontrol


def dark(samples: torch.Tensor, context: object) -> torch.Tensor:
    """One number per sample, more is better: here how dark a picture [b 3 h w] in [0, 1] is."""
    return -samples.flatten(1).mean(1)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    pipe = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
    result = gencontrol.finetune(
        pipe,  # stays as it is: a copy of its network is trained
        dark,
        algorithm="crd",
        prompts=["a house", "a tree", "a boat", "a dog"],
        output=sys.argv[2] if len(sys.argv) > 2 else "runs/dark",
        steps=2,
        lora_rank=4,
        prompts_per_round=2,
        generations=2,
        demo_steps=2,
        eval_steps=2,
    )
    print("reward of the last round:", round(result.metrics["reward/mean"], 3))
    print("LoRA for diffusers:", result.folder / "final" / "lora")
    print("a picture:", result.pipeline("a house", num_inference_steps=2, seed=0).images[0])
