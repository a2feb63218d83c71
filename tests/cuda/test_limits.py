"""What `gpuckpt bench` measures of a GPU."""

from __future__ import annotations

import pytest

from gpuckpt.limits.rates import bus_rates, has_gpu
from gpuckpt.limits.saves import make_state, save_cost

cupy = pytest.importorskip("cupy")


def test_the_bus_is_measured_both_ways():
    assert has_gpu()
    rates = bus_rates(1 << 20, rounds=1)
    assert [one.what for one in rates] == ["from the GPU", "to the GPU"]
    assert all(one.best > 0 for one in rates)


def test_saves_of_a_state_on_a_gpu_are_measured(tmp_path):
    state = make_state(1 << 20, cupy)
    found = save_cost(tmp_path, state, "raw", busy=False, overhead=0.5, rounds=1)
    assert all(isinstance(one, cupy.ndarray) for one in state.values())
    assert found.written_nbytes >= 1 << 20
