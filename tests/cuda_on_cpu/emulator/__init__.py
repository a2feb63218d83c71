"""Runs unmodified CUDA kernels on the CPU."""
