"""Particle samplers: best-of-n, importance sampling, SMC and its guided forms, beam search."""
