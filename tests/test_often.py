"""What a run tries of what there is to try."""

from __future__ import annotations

from tests import often


def test_a_third_is_drawn_in_its_order_and_all_in_a_long_run(monkeypatch):
    monkeypatch.setattr(often, "LONG", False)
    drawn = [often.some(range(20)) for _ in range(50)]
    assert {len(one) for one in drawn} == {7}
    assert all(one == sorted(set(one)) for one in drawn)
    assert set().union(*drawn) == set(range(20))
    monkeypatch.setattr(often, "LONG", True)
    assert often.some(range(20)) == list(range(20))


def test_all_workers_of_a_run_have_the_same_tests_and_other_runs_others(monkeypatch):
    monkeypatch.setattr(often, "LONG", False)
    drawn = []
    for run in map(str, range(50)):
        monkeypatch.setattr(often, "RUN", run)
        drawn.append(often.of_this_run("abcdefgh"))
        assert often.of_this_run("abcdefgh") == drawn[-1]
    assert {len(one) for one in drawn} == {3}
    assert set().union(*drawn) == set("abcdefgh")
    monkeypatch.setattr(often, "RUN", None)
    assert often.of_this_run("abcdefgh") == list("abcdefgh")
