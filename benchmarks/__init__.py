"""Benchmarks of K-SAM, run as ``python -m benchmarks <command>``."""
