"""The examples of frameworks that have a loop of their own."""

from __future__ import annotations

import importlib.util

import pytest

from tests.examples.drive import check_kill_and_resume

pytestmark = pytest.mark.slow


def test_lightnings_fit_goes_on_bit_for_bit_after_kills(wheel, tmp_path):
    pytest.importorskip("lightning", reason="lightning isn't installed")
    # Epochs are 16 steps long: in the first, at the end of one, and in the third.
    check_kill_and_resume("lightning_loop", wheel, tmp_path, steps=60, kills=(7, 16, 41))


def test_transformers_trainer_goes_on_bit_for_bit_after_kills(wheel, tmp_path):
    pytest.importorskip("transformers", reason="transformers isn't installed")
    # Epochs are 8 steps long.
    check_kill_and_resume("transformers_trainer", wheel, tmp_path, steps=22, kills=(5, 16))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_keras_fit_goes_on_bit_for_bit_after_kills(wheel, tmp_path, monkeypatch, backend):
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras isn't installed")
    pytest.importorskip(backend, reason=f"{backend} isn't installed")
    monkeypatch.setenv("KERAS_BACKEND", backend)
    # Epochs are 16 steps long: in the first, at the end of one, and in the third.
    check_kill_and_resume("keras_fit", wheel, tmp_path, steps=60, kills=(7, 16, 41))
