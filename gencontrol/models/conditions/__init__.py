"""Conditions: what a network is told beside x_t and t."""
