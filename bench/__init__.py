"""Benchmarks: `python -m bench`.  Every figure stands beside a limit measured in the same run."""
