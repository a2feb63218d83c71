"""Tests of real processes; each skips where what its processes need isn't installed."""

from __future__ import annotations

import importlib.util

import pytest

from tests.launch import PACKAGES, mpirun


@pytest.fixture
def needs():
    """Skips unless ranks of a kind can be started."""

    def check(kind: str) -> None:
        for package in PACKAGES[kind]:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} isn't installed (make test-ranks)")
        if kind == "mpi" and mpirun() is None:
            pytest.skip("there is no mpirun (make test-ranks)")

    return check
