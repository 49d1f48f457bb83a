"""Composition of policies: operators, weights and their search, files."""
