"""Evaluation of policies: rollouts, statistics, files, videos, the page."""
