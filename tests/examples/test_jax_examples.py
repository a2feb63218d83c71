"""The examples for JAX: killed, they end with the bits of a run that never was."""

from __future__ import annotations

import pytest

from tests.examples.drive import check_kill_and_resume

pytest.importorskip("jax", reason="jax isn't installed")
pytest.importorskip("optax", reason="optax isn't installed")


def test_a_loop_of_jaxs_goes_on_bit_for_bit_after_two_kills(wheel, tmp_path):
    check_kill_and_resume("jax_loop", wheel, tmp_path, steps=120, kills=(12, 31))


def test_a_loop_of_orbaxs_goes_on_bit_for_bit(wheel, tmp_path):
    check_kill_and_resume("orbax_manager", wheel, tmp_path, steps=60, kills=(31,))


def test_a_module_of_flaxs_goes_on_bit_for_bit(wheel, tmp_path):
    pytest.importorskip("flax", reason="flax isn't installed")
    check_kill_and_resume("flax_nnx", wheel, tmp_path, steps=60, kills=(31,))


def test_a_module_of_equinoxs_goes_on_bit_for_bit(wheel, tmp_path):
    pytest.importorskip("equinox", reason="equinox isn't installed")
    check_kill_and_resume("equinox_loop", wheel, tmp_path, steps=60, kills=(31,))
