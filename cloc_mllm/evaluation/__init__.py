"""Metrics, read-outs and benchmarks."""
