"""What a prompted pipeline needs of a model, whoever made it: ours and diffusers' ones."""
