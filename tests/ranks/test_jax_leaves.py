"""What a process with eight devices has of sharded arrays of JAX's: the shards on these devices."""

from __future__ import annotations

import pytest

from tests.ranks.outcomes import run

pytest.importorskip("jax", reason="jax isn't installed")

CHECKS = [
    *("shards", "nothing_is_gathered", "copies_everywhere_are_one_plain_array", "made_anew"),
    *("a_census", "a_save"),
]


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    """What a process with eight devices on the host says of all checks."""
    flags = "--xla_force_host_platform_device_count=8"
    return run("tests.ranks.jax_devices", 1, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")[0]


def test_every_check_was_made(outcome):
    assert list(outcome) == CHECKS


@pytest.mark.parametrize("check", CHECKS)
def test_a_sharded_array_is_its_shards_on_this_processs_devices(outcome, check):
    assert not outcome[check], outcome[check]
