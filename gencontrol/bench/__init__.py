"""Benchmarks: one file per claim, with peers at equal compute, seeds and intervals; see `gencontrol bench --help`."""
