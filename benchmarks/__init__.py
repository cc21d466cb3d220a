"""Benchmarks: run by hand, on one machine, and given as ratios. What they measure is in docs/benchmarks.md."""
