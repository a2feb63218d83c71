"""Generators as a leaf of the state: a restored run draws what the saved one would have drawn."""

from __future__ import annotations

import random
import sys
import types

import numpy as np
import pytest

import gpuckpt


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), *np.random.standard_normal(3)]


def test_pythons_and_numpys_generators_go_on_from_where_they_were(tmp_path):
    random.gauss(0, 1)  # leaves half of a pair behind, which is state too
    np.random.standard_normal()
    state = {"rng": gpuckpt.RNG()}
    gpuckpt.save(tmp_path, state)
    expected = draw()
    random.seed(5)
    np.random.seed(5)

    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.resume(state)

    assert draw() == expected


class Device:
    """As much of CuPy's device and generators as RNG uses, over numpy's generators."""

    current = 0

    def __init__(self, ordinal: int) -> None:
        self.ordinal, self.before = ordinal, 0

    def __enter__(self) -> None:
        self.before, Device.current = Device.current, self.ordinal

    def __exit__(self, *_: object) -> None:
        Device.current = self.before


@pytest.fixture
def generators(monkeypatch) -> dict[int, np.random.Generator]:
    """A CuPy with two devices whose generators can only be seeded, as the real one's."""
    states: dict[int, np.random.Generator] = {}

    def seed(value: int) -> None:
        states[Device.current] = np.random.default_rng(value)

    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(Device=Device)  # type: ignore[attr-defined]
    own = types.SimpleNamespace(_random_states=states)
    cupy.random = types.SimpleNamespace(seed=seed, _generator=own)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return states


def test_generators_that_can_only_be_seeded_draw_the_same_after_a_save_and_a_restore(generators):
    rng = gpuckpt.RNG()
    assert "cupy" not in rng.state_dict(), "nobody has drawn from them"
    generators[0], generators[1] = np.random.default_rng(1), np.random.default_rng(2)

    saved = rng.state_dict()
    expected = {device: own.random() for device, own in generators.items()}
    for own in generators.values():
        own.random(7)
    rng.load_state_dict(saved)

    assert {device: own.random() for device, own in generators.items()} == expected
    assert expected[0] != expected[1], "devices draw different numbers"
