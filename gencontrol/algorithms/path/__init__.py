"""Methods on the sampler's own path: policy gradients (Flow-GRPO, DDPO) and the reward's gradient (DRaFT)."""
