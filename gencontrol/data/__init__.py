"""Data: the bundled sound, cached latents, readers."""
