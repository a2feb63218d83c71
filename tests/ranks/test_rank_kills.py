"""SIGKILL of one of four real processes that save together, in named places.

`python -m bench.durability ranks` kills hundreds; here are some of them.
"""

from __future__ import annotations

import pytest

from bench.durability.deaths import OF_RANKS
from bench.durability.ranks import Campaign
from tests.often import LONG

KILLS = 10 if LONG else 5  # of four processes; a chain of runs tries ten


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_all_go_on_from_what_was_durable(tmp_path):
    campaign = Campaign(tmp_path, seed=3)
    campaign.run(KILLS)
    tally = campaign.tally
    assert tally.failures == []
    assert tally.kills.total() >= KILLS
    assert tally.checks["named"] > tally.checks["others named"]
    assert tally.checks["went on to the end"] >= 1
    met = {place for one in campaign.moments("raw") for place, count in one.items() if count}
    assert met >= set(OF_RANKS)
