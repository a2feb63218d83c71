"""CuPy on the CPU, over a stand-in for CUDA's driver and runtime; README.md says more."""
