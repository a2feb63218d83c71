"""Each scenario in which a missing wait, order or reference would do harm is right as it is.

That each of them is needed is what `test_mutants` proves: there they are taken away, one at a time.
"""

from __future__ import annotations

import pytest

from tests.cuda.scenarios import SCENARIOS, why_not


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_missing(name, standin_settings):
    scenario = SCENARIOS[name]
    reason = why_not(scenario.needs, standin_settings)
    if reason is not None:
        pytest.skip(reason)
    assert scenario.run()
