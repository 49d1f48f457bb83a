"""Training: one loop for every algorithm (`trainer`), atomic checkpoints, health, signals, tracking, processes.

Import what you need from the modules; this package itself imports nothing, so that reports start without torch.
"""
