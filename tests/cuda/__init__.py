"""Tests that drive CuPy, on a real GPU or on the stand-in."""
