"""Methods that train on files instead of own samples: Diffusion-DPO and classifier-free fine-tuning."""
