"""Benchmarks of a GPU: `python -m bench.gpu`.  Each figure beside that GPU's own limit."""
