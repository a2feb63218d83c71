"""SIGKILL of real processes, at random moments and in named places of a real run.

`python -m bench.durability kills` kills thousands; here are some of them.
"""

from __future__ import annotations

import pytest

import gpuckpt
from bench.durability.child import SETTINGS, Setting
from bench.durability.deaths import PLACES
from bench.durability.kills import CLOCK, RACE, STEPS, Campaign
from gpuckpt.commit import open_step
from gpuckpt.stores.local import LocalStore
from tests.versions import state_at

KILLS = 25
DELTA, DIRECT, ALONE = SETTINGS[1], SETTINGS[4], SETTINGS[6]
RAW = Setting("raw", last=None)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("kills"), seed=7, settings=(DELTA, DIRECT, ALONE))


def test_killed_runs_go_on_from_what_was_said_to_be_durable_bit_for_bit(campaign):
    campaign.run(KILLS)
    tally = campaign.tally
    assert tally.failures == []
    assert sum(tally.kills.values()) >= KILLS
    assert tally.kills[CLOCK] > 3
    assert tally.kills[RACE] > 1
    assert len(tally.kills) > 5, "in some of the places"
    assert tally.checks["opened"] > 3


def test_every_place_in_which_a_run_may_die_is_met_by_some_run(campaign):
    moments = [campaign.moments(setting, STEPS) for setting in (DELTA, DIRECT)]
    assert [place for place in PLACES if not any(one[place] for one in moments)] == []


@pytest.fixture
def root(tmp_path):
    for step in (1, 2):
        gpuckpt.save(tmp_path / "root", state_at(step), step)
    return tmp_path / "root"


def test_a_step_that_is_lost_is_noticed(root, tmp_path):
    campaign = Campaign(tmp_path, seed=1)
    assert campaign.check(root, RAW, 2, opened=True) == 3
    with pytest.raises(AssertionError, match="step 4 was announced, 3 is the newest"):
        campaign.check(root, RAW, 4, opened=False)


def test_a_damaged_older_step_is_noticed(root, tmp_path):
    (segment,) = open_step(LocalStore(root), 1).segments
    data = bytearray((root / segment).read_bytes())
    data[100] ^= 1
    (root / segment).write_bytes(data)
    with pytest.raises(AssertionError, match="checksum"):
        Campaign(tmp_path, seed=1).check(root, RAW, 2, opened=False)


def test_the_state_of_another_step_is_noticed(root, tmp_path):
    gpuckpt.save(root, state_at(2), 3)
    with pytest.raises(AssertionError, match="step 3 has the state of step 2"):
        Campaign(tmp_path, seed=1).check(root, RAW, 3, opened=False)
