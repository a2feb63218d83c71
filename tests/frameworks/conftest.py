"""Keeps frameworks from taking every core: several tests run at once."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _one_thread_each():
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
