"""Rewards of sound."""
