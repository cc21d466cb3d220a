"""Benchmarks: run manually, on one machine, reported as ratios. docs/benchmarks.md describes what they measure."""
