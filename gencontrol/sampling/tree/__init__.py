"""Diffusion Tree Sampling and Search: a tree over sampler steps with soft value backup."""

from gencontrol.sampling.tree.tree import DiffusionTree

__all__ = ["DiffusionTree"]
