"""Trained controls while sampling: a new condition on a frozen network, and its files."""
