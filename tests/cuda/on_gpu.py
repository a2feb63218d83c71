"""Runs the CUDA tests on this machine's GPU: ``python -m tests.cuda.on_gpu [PYTEST_ARGUMENTS]``.

Exits with 3, and says why, where there is none: then nothing was tested.
"""

from __future__ import annotations

import sys

import pytest

from bench.device import NoGpuError, describe, open_gpu

NO_GPU = 3


def main() -> int:
    try:
        facts = describe(open_gpu())
    except NoGpuError as error:
        print(f"nothing was tested: {error}", file=sys.stderr)
        return NO_GPU
    for name, value in facts.items():
        print(f"{name}: {value}")
    return pytest.main(sys.argv[1:] or ["tests/cuda", "tests/examples/test_cupy_loop.py"])


if __name__ == "__main__":
    sys.exit(main())
