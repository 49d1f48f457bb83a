"""Recipes: what made the bundled weights, a package per model with its data, training and quality measures."""
