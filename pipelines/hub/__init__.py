"""Where pipelines and adapters come from and go to: folders, hub ids, bundled weights, LoRA files."""
