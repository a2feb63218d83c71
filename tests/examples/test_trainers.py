"""The examples of frameworks that have a loop of their own."""

from __future__ import annotations

import importlib.util

import pytest

from tests.examples.drive import check_kill_and_resume

pytestmark = pytest.mark.slow


def test_lightnings_fit_goes_on_bit_for_bit_after_kills(wheel, tmp_path):
    pytest.importorskip("lightning", reason="lightning isn't installed")
    # Epochs are 16 steps long: at the end of one, and in the third.
    check_kill_and_resume("lightning_loop", wheel, tmp_path, steps=60, kills=(16, 41))


def test_transformers_trainer_goes_on_bit_for_bit_after_a_kill(wheel, tmp_path):
    pytest.importorskip("transformers", reason="transformers isn't installed")
    # Epochs are 8 steps long: in the second.
    check_kill_and_resume("transformers_trainer", wheel, tmp_path, steps=22, kills=(13,))


def test_a_loop_of_accelerates_goes_on_bit_for_bit_after_a_kill(wheel, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate isn't installed")
    # Epochs are 16 steps long: in the second.
    check_kill_and_resume("accelerate_loop", wheel, tmp_path, steps=40, kills=(21,))


# Epochs are 16 steps long: at the end of one, and in the third.
@pytest.mark.parametrize(("backend", "kills"), [("torch", (16, 41)), ("jax", (41,))])
def test_keras_fit_goes_on_bit_for_bit_after_kills(wheel, tmp_path, monkeypatch, backend, kills):
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras isn't installed")
    pytest.importorskip(backend, reason=f"{backend} isn't installed")
    monkeypatch.setenv("KERAS_BACKEND", backend)
    check_kill_and_resume("keras_fit", wheel, tmp_path, steps=60, kills=kills)
