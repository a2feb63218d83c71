"""The demonstration as a whole, at a small size."""

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpuckpt.demo.child import Event, Killed, Record, committed_steps, uncommitted_nbytes
from gpuckpt.demo.drive import EQUAL, FAILED, run_demo
from gpuckpt.demo.report import Report, steps_beside_saves, verdict
from gpuckpt.demo.settings import Settings

TINY = Settings(steps=24, every=4, batch=2, context=16, width=128, depth=2, corpus_nbytes=100_000)


def demonstrate(directory: Path | None, **options: Any) -> tuple[int, str]:
    text = io.StringIO()
    code = run_demo(directory, Console(file=text, width=120), **options)
    return code, text.getvalue()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def facts(directory):
    code, text = demonstrate(directory, as_json=True, settings=TINY, arrays="numpy")
    assert code == EQUAL, text
    return json.loads(text)


def test_a_run_killed_in_mid_save_ends_in_the_same_bits(facts):
    assert facts["equal"]
    assert facts["losses_equal"]
    assert facts["differences"] == []
    assert facts["compared"] > 3 * 30  # parameters and both moments, generators


def test_the_killed_save_had_begun_and_the_one_before_it_is_what_came_back(facts):
    assert facts["killed_nbytes"] > 0
    assert facts["killed_step"] >= TINY.steps // 2
    assert facts["resumed_from"] == facts["killed_step"] - TINY.every


def test_every_save_is_reported_with_what_it_cost(facts):
    assert [save["step"] for save in facts["saves"]] == [4, 8, 12, 16, 20, 24]
    for save in facts["saves"]:
        assert save["raw_nbytes"] > 3 * 4 * facts["parameters"]
        assert save["encoded_nbytes"] > 0
        assert 0 <= save["stall_seconds"] < 10
        assert 0 < save["background_seconds"] < 10


def test_the_checkpoints_stay_in_a_directory_that_was_given(facts, directory):
    for name in ("saving", "crashing"):
        assert committed_steps(directory / name)[-1] == TINY.steps
    assert not (directory / "plain").exists()


def test_a_directory_in_use_is_refused(facts, directory):
    code, text = demonstrate(directory, settings=TINY)
    assert code == FAILED
    assert "isn't empty" in text


def test_a_training_that_fails_is_quoted():
    code, text = demonstrate(None, settings=dataclasses.replace(TINY, context=200_000))
    assert code == FAILED
    assert "ValueError" in text


def record(
    *,
    begin: int = 0,
    steps: Sequence[int] = (),
    killed: Killed | None = None,
    saves: Sequence[int] = (),
) -> Record:
    """The record of a made-up process, whose loss at a step is the step."""
    events: list[Event] = [{"event": "begin", "step": begin, "arrays": "numpy", "parameters": 1}]
    for step in steps:
        events.append({"event": "step", "step": step, "loss": float(step), "seconds": step})
        events += [{"event": "saving", "step": step}] if step in saves else []
        events += [{"event": "saved", "step": step - 2}] if step - 2 in saves else []
    return Record(events, killed)


def report(**changes: Any) -> Report:
    """A report of a run of four steps, killed in the save of step 3."""
    parts: dict[str, Any] = {
        "plain": record(steps=(1, 2, 3, 4)),
        "saving": record(steps=(1, 2, 3, 4)),
        "crashed": record(steps=(1, 2, 3), killed=Killed(3, 100, newest=2)),
        "resumed": record(begin=2, steps=(3, 4)),
        "digests": [{"w": "a"}, {"w": "a"}, {"w": "a"}],
    }
    return Report(**(parts | changes))


def test_equal_bits_are_equal():
    assert report().equal
    assert "equal" in verdict(report())


@pytest.mark.parametrize("third", [{"w": "b"}, {}, {"w": "a", "v": "a"}])
def test_another_digest_a_missing_and_an_additional_one_are_differences(third):
    different = report(digests=[{"w": "a"}, {"w": "a"}, third])
    assert not different.equal
    assert different.differences == ["v" if "v" in third else "w"]
    assert different.differences[0] in verdict(different)


def test_a_run_that_begins_anew_instead_of_resuming_is_not_equal():
    anew = report(resumed=record(begin=0, steps=(1, 2, 3, 4)))
    assert not anew.equal
    assert "resumed from 0" in verdict(anew)


def test_a_loss_that_differs_after_the_resume_is_told():
    other = record(begin=2, steps=(3, 4))
    other.events[-1]["loss"] += 1e-7
    assert not report(resumed=other).equal
    assert "losses" in verdict(report(resumed=other))


def test_steps_beside_a_save_are_those_between_its_begin_and_its_commit():
    run = record(steps=(1, 2, 3, 4, 5, 6, 7, 8), saves=(2, 5))
    assert steps_beside_saves(run) == [3, 4, 6, 7]


def test_a_committed_step_has_no_uncommitted_bytes(tmp_path):
    (tmp_path / "step-000000000007.x.0.segment").write_bytes(b"12345")
    assert uncommitted_nbytes(tmp_path, 7) == 5
    assert uncommitted_nbytes(tmp_path, 70) == 0
    (tmp_path / "step-000000000007.manifest.json").write_bytes(b"{}")
    assert uncommitted_nbytes(tmp_path, 7) is None
    assert committed_steps(tmp_path) == [7]
