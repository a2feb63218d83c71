"""A sample of `python -m tests.unlucky_ranks`, which goes on for as long as one likes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.often import often
from tests.relay import GathersOnly
from tests.unlucky_ranks import Trial

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("wrap", [lambda group: group, GathersOnly], ids=["own", "gathers only"])
@pytest.mark.parametrize("seed", range(often(12)))
def test_whatever_fails_nothing_that_was_committed_loses_a_file(seed: int, wrap: Any):
    trial = Trial(seed, 0.01, wrap)
    trial.run()
    assert not trial.torn
    assert trial.saves[True]
