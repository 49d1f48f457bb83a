"""Kernels behind one dispatch: each has a plain reference that is its specification."""

from __future__ import annotations

from gencontrol.kernels.attention import BACKENDS, attention

__all__ = ["BACKENDS", "attention"]
