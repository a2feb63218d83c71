"""The report: one page that says what there is of a root, whatever is missing or damaged."""

from __future__ import annotations

import errno
import html.parser
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.cli.reporting import _write
from gpuckpt.journal import Journal, read_journal
from gpuckpt.layout import LOG
from gpuckpt.pruning import parse_keep
from gpuckpt.report.checkpoints import spread
from gpuckpt.report.gather import Facts, gather
from gpuckpt.report.layers import FEW, GROUPS_MAX, Layers
from gpuckpt.report.markup import Html, el, text
from gpuckpt.report.page import page
from gpuckpt.report.scale import NBYTES, POINTS_MAX, RATIO, SECONDS, thin
from gpuckpt.report.timeline import BARS_MAX
from gpuckpt.stats import Stats
from tests.failing_disks import Fault, System
from tests.test_cli import run

VOID = {"meta", "link"}


class Outline(html.parser.HTMLParser):
    """What a page consists of; fails where tags don't nest."""

    def __init__(self, told: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(told)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in {"href", "src"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def outline(facts: Facts) -> Outline:
    found = Outline(page(facts))
    assert len(set(found.ids)) == len(found.ids)
    anchors = {link[1:] for link in found.links if link.startswith("#")}
    assert anchors <= set(found.ids)
    assert {link for link in found.links if not link.startswith("#")} == {"data:,"}
    return found


def state(step: int, names: int = 6) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    layers = {f"layer{at}": {"weight": rng.standard_normal(500)} for at in range(names)}
    return {"model": layers, "step": step}


def made(root: Path, steps: int = 3, **options: Any) -> Path:
    with gpuckpt.Checkpointer(root, log=True, trace=True, **options) as ckpt:
        for step in range(1, steps + 1):
            ckpt.save(step, state(step), metrics={"loss": 1 / step}).result()
    return root


def long_log(root: Path, saves: int) -> None:
    """A log of many saves, as a run of days has one: a line that was written, again and again."""
    line = json.loads((root / LOG).read_text().splitlines()[-1])
    del line["spans"]
    with (root / LOG).open("a", encoding="ascii") as file:
        for at in range(saves):
            line["stats"]["step"] = 100 + at
            line["ended"] += 60
            file.write(json.dumps(line) + "\n")


def test_a_run_is_told_of_with_its_charts_timeline_norms_and_steps(tmp_path):
    found = outline(gather(made(tmp_path)))
    for told in (
        *("Until a save is durable", "What saves cost the loop", "Ratio", "Bytes"),
        *("step 3: ", "When each stage of step 3 ran", "model.layer0", "loss", "the newest"),
        *("Disk use", "manifests", "snapshot", "gpuckpt-work-0"),
    ):
        assert told in found.words, told
    assert "script" not in found.tags
    assert not {name for name in found.attributes if name.startswith("on")}


def test_each_chart_has_a_title_a_description_axes_with_units_and_its_numbers(tmp_path):
    told = page(gather(made(tmp_path)))
    charts = re.findall(r'<figure class="chart">.*?</figure>', told, re.DOTALL)
    assert len(charts) == 6
    for chart in charts:
        assert '<svg viewBox="0 0 420 230" role="img" aria-labelledby=' in chart
        assert "<desc" in chart
        assert "<table aria-label=" in chart
        assert re.search(r'class="end">[0-9.]+( ?(s|ms|µs|B|KiB|MiB))?<', chart)
    assert re.search(r"<title>step 3\nstall: [0-9.]+ (?:s|ms|µs)\nslow-down: 0 s</title>", told)


def test_a_root_without_a_log_has_a_report_that_says_so(tmp_path):
    gpuckpt.save(tmp_path, state(1))
    found = outline(gather(tmp_path))
    assert "There is no log of saves" in found.words
    assert "model.layer0" in found.words


def test_one_save_is_enough(tmp_path):
    found = outline(gather(made(tmp_path, 1)))
    assert "step 1: " in found.words


def test_a_log_without_committed_steps_is_enough(tmp_path):
    made(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / LOG).rename(tmp_path / "b" / LOG)
    found = outline(gather(tmp_path / "b"))
    assert "step 3: " in found.words
    assert "committed steps" not in found.words


@pytest.mark.parametrize("name", ["", "no"])
def test_a_root_with_nothing_in_it_is_refused(tmp_path, name):
    with pytest.raises(gpuckpt.CheckpointError):
        gather(tmp_path / name)


def test_ten_thousand_saves_make_a_page_of_less_than_2_mb_that_says_what_it_left_out(tmp_path):
    long_log(made(tmp_path), 10_000)
    facts = gather(tmp_path)
    told = page(facts)
    assert len(told.encode()) < 2_000_000
    assert len(facts.saves.records) == 10_003
    found = outline(facts)
    assert "10,003" in found.words
    assert "Each point stands for 84 saves: median, in a band from least to most." in found.words


def test_five_thousand_tensors_are_grouped_by_layer(tmp_path):
    layers = [
        {f"{kind}{at}": np.ones(2, np.float32) for at in range(25) for kind in "wb"}
        for _ in range(50)
    ]
    moments = [{name: array * 2 for name, array in one.items()} for one in layers]
    every = {"model": {"blocks": layers}, "optimizer": {"state": moments}}
    gpuckpt.save(tmp_path, every)
    facts = gather(tmp_path)
    assert sum(facts.checkpoints.counts.values()) == 5000
    assert len(facts.checkpoints.norms) <= GROUPS_MAX
    assert "model.blocks.7" in facts.checkpoints.norms
    assert facts.checkpoints.norms["model.blocks.7"][0] == pytest.approx(10.0)
    told = page(facts)
    assert len(told.encode()) < 2_000_000
    assert "(50 tensors)" in Outline(told).words


NASTY = [
    *("<script>alert(1)</script>", "</title></style><img src=x onerror=alert(1)>"),
    *('"onload="alert(1)', "a&amp;b", "\x1b[31mred", "\u202eevil", "&#x3c;script&#x3e;"),
    *("x" * 5000, "`${alert(1)}`", "\ud800"),
]


def test_names_that_are_markup_are_shown_and_never_run(tmp_path):
    nasty = {name: np.array([1.0, np.nan]) for name in NASTY if name != "\ud800"}
    with gpuckpt.Checkpointer(tmp_path / "<b>&root", log=True, trace=True) as ckpt:
        ckpt.save(1, nasty, metrics={"<img src=x>": 1.0})
    facts = gather(tmp_path / "<b>&root", tiers=["<i>tier</i>"])
    bad = Stats(2, remarks=["<script>remark()</script>"])
    facts.saves.records.append(replace(facts.saves.records[0], stats=bad, error="<u>why</u>"))
    found = outline(facts)
    assert not found.tags & {"script", "img", "b", "i", "u"} - {"b"}
    assert not {name for name in found.attributes if name.startswith("on")}
    for told in (NASTY[0], "a&amp;b", "\\x1b[31mred", "\\u202eevil", "<u>why</u>"):
        assert told in found.words
    assert "\x1b" not in page(facts)
    assert page(facts).encode()


@given(st.text())
@settings(deadline=None)
def test_text_is_read_back_as_it_was_but_for_what_cannot_be_seen(told):
    class Reader(html.parser.HTMLParser):
        words = ""

        def handle_data(self, data: str) -> None:
            self.words += data

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag == "p"
            (attribute,) = attrs
            assert attribute[0] == "title"

    reader = Reader(convert_charrefs=True)
    reader.feed(el("p", told, title=told))
    reader.close()
    if all(one.isprintable() or one == "\n" for one in told):
        assert reader.words == told
    assert text(told).isprintable() or "\n" in told


def test_markup_is_put_in_as_it_is_and_text_is_not():
    assert el("p", Html("<b>x</b>"), "<i>") == "<p><b>x</b>&lt;i&gt;</p>"
    assert el("p", aria_label='"', class_="a", id=None) == '<p aria-label="&quot;" class="a"></p>'


def test_lines_of_the_log_that_are_damaged_are_skipped_and_counted(tmp_path):
    made(tmp_path)
    with (tmp_path / LOG).open("ab") as file:
        file.write(b'{"gpuckpt_log":1,"stats":\n\xff\xfe\n{"gpuckpt_log":9}\n\n')
    facts = gather(tmp_path)
    assert (facts.saves.skipped, facts.saves.newer) == (3, 1)
    assert len(facts.saves.records) == 3
    told = "3 lines of the log could not be read, 1 of them of a newer gpuckpt"
    assert told in outline(facts).words


def test_a_damaged_manifest_is_told_of_and_the_others_are_read(tmp_path):
    made(tmp_path)
    (tmp_path / "step-000000000002.manifest.json").write_text("{")
    facts = gather(tmp_path)
    assert [row.step for row in facts.checkpoints.rows] == [1, 3]
    assert "damaged: " in outline(facts).words


def test_values_that_are_not_finite_are_named_with_the_steps_that_hold_them(tmp_path):
    with gpuckpt.Checkpointer(tmp_path, log=True) as ckpt:
        for step in (1, 2, 3):
            now = state(step)
            now["model"]["layer2"]["weight"][:step] = np.nan if step > 1 else 0.0
            ckpt.save(step, now)
    found = outline(gather(tmp_path))
    expected = "model.layer2.weight has 3 NaN at step 3, and in 1 steps before, from 2 on"
    assert expected in found.words


def test_a_save_that_failed_is_told_of(tmp_path):
    made(tmp_path)
    Journal(tmp_path / LOG).append(Stats(4), gpuckpt.StorageError("the disk is full"))
    found = outline(gather(tmp_path))
    assert "step 4 was not saved: StorageError: the disk is full" in found.words
    assert "1 failed" in found.words


def test_the_norms_are_those_of_the_tensors(tmp_path):
    root = made(tmp_path)
    norms = gather(root).checkpoints.norms
    for layer in ("model.layer0.weight", "model.layer5.weight"):
        at = layer.split(".")[1]
        for step in (1, 2, 3):
            exact = np.linalg.norm(gpuckpt.load(root, step)["model"][at]["weight"])
            assert norms[layer][step] == pytest.approx(exact, rel=1e-5)


def test_why_each_step_is_kept_is_what_keep_keeps(tmp_path):
    made(tmp_path, 7)
    rule = "last=2, every=3, best=loss:max:1"
    facts = gather(tmp_path, keep=parse_keep(rule))
    assert facts.kept == {
        1: ["among the 1 with the maximum of loss"],
        2: [],
        3: ["each 3th step"],
        4: [],
        5: [],
        6: ["among the last 2", "each 3th step"],
        7: ["the newest", "among the last 2"],
    }
    words = outline(facts).words
    assert words.count("would be deleted") == 4
    with gpuckpt.Checkpointer(tmp_path, keep=parse_keep(rule)) as ckpt:
        ckpt.save(8, state(8)).result()
        ckpt.wait()
        assert set(ckpt.steps()) - {8} <= {step for step, told in facts.kept.items() if told}


@pytest.mark.parametrize(
    "rule", ["", "last", "last=x", "best=loss", "best=loss:min:x", "most=3", "last=0"]
)
def test_a_rule_that_is_none_is_refused_with_an_example(rule):
    with pytest.raises(gpuckpt.InvalidError):
        parse_keep(rule)


def test_files_of_older_steps_that_a_step_needs_are_told(tmp_path):
    now = state(1)
    with gpuckpt.Checkpointer(tmp_path, log=True, keep=gpuckpt.Keep(last=1)) as ckpt:
        for step in (1, 2):
            now["model"]["layer0"]["weight"] += 1.0
            ckpt.save(step, now)
    facts = gather(tmp_path)
    (row,) = facts.checkpoints.rows
    assert row.step == 2
    assert set(row.older) == {1}
    assert set(facts.disk.only_older) == {1}
    assert "data of steps that are gone, which others need" in outline(facts).words
    files = [path.stat().st_size for path in tmp_path.iterdir()]
    assert facts.disk.nbytes == sum(files)


def test_ranks_and_other_roots_are_told_of(tmp_path):
    made(tmp_path / "near")
    gpuckpt.save(tmp_path / "far", state(1), step=2)
    (tmp_path / "near" / "saves.r1.jsonl").write_bytes((tmp_path / "near" / LOG).read_bytes())
    facts = gather(tmp_path / "near", tiers=[str(tmp_path / "far"), str(tmp_path / "none")])
    assert facts.tiers[str(tmp_path / "far")] == [2]
    assert set(facts.ranks) == {0, 1}
    words = outline(facts).words
    assert "1 steps: 3" in words
    assert "waited for ranks" in words


def test_steps_that_go_back_are_shown_save_by_save(tmp_path):
    made(tmp_path)
    made(tmp_path)
    facts = gather(tmp_path)
    assert [one.stats.step for one in facts.saves.records] == [1, 2, 3, 1, 2, 3]
    assert "save 4 (step 1)" in page(facts)


def test_the_command_writes_the_page_and_prints_its_data(tmp_path):
    made(tmp_path / "run")
    out = tmp_path / "page.html"
    assert run("report", tmp_path / "run", "--out", out).returncode == 0
    assert out.read_text("utf-8").startswith("<!doctype html>")
    facts = json.loads(run("report", tmp_path / "run", "--json", "--keep", "last=1").stdout)
    assert [one["step"] for one in facts["saves"]] == [1, 2, 3]
    assert [one["step"] for one in facts["checkpoints"]] == [1, 2, 3]
    assert facts["why_slow"].startswith("step 3: ")
    assert facts["timelines"][0]["spans"]
    assert [one["step"] for one in facts["kept"] if one["reasons"]] == [3]
    wrong = run("report", tmp_path / "run", "--out", tmp_path)
    assert wrong.returncode == 2
    assert "can't write" in wrong.stderr


def test_a_log_elsewhere_is_taken(tmp_path):
    made(tmp_path / "run")
    (tmp_path / "run" / LOG).rename(tmp_path / "elsewhere.jsonl")
    assert not gather(tmp_path / "run").saves.records
    facts = gather(tmp_path / "run", log=tmp_path / "elsewhere.jsonl")
    assert len(facts.saves.records) == len(read_journal(tmp_path / "elsewhere.jsonl"))


@given(
    st.sampled_from([SECONDS, NBYTES, RATIO]),
    st.floats(min_value=1e-6, max_value=1e15, allow_nan=False),
)
def test_ticks_begin_at_zero_are_few_and_reach_the_largest_value(unit, most):
    ticks = unit.ticks(most)
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= 6
    assert ticks[-1] >= most * (1 - 1e-6)
    assert all(a < b for a, b in pairwise(ticks))


@settings(deadline=None)
@given(st.lists(st.floats(min_value=0, max_value=1e9), min_size=1, max_size=1000))
@example([float(at % 7) for at in range(1000)])
def test_thinning_leaves_out_no_extreme_and_counts_every_save(values):
    points = thin(range(len(values)), values, [str(at) for at in range(len(values))])
    assert len(points) <= POINTS_MAX
    assert sum(point.count for point in points) == len(values)
    assert min(point.least for point in points) == min(values)
    assert max(point.most for point in points) == max(values)
    assert all(point.least <= point.median <= point.most for point in points)


@given(st.lists(st.integers(), unique=True).map(sorted), st.integers(min_value=2, max_value=50))
def test_numbers_that_are_spread_keep_the_first_and_the_last(numbers, most):
    found = spread(numbers, most)
    assert len(found) == min(len(numbers), most)
    assert found == sorted(set(found))
    assert set(found) <= set(numbers)
    assert not numbers or {found[0], found[-1]} == {numbers[0], numbers[-1]}


@settings(deadline=None)
@given(st.lists(st.text("ab./01", max_size=12), unique=True))
def test_every_tensor_has_a_layer_and_layers_are_few(names):
    layers = Layers(names)
    found = {layers.of(name) for name in names}
    assert len(found) <= GROUPS_MAX + 1
    assert all(name.startswith(layers.of(name)) for name in names) or len(found) > GROUPS_MAX
    if len(names) <= FEW:
        assert found == set(names)


NUMBERS = st.one_of(
    st.floats(), st.integers(), st.sampled_from([0, -1, 1e300, 2**70, float("nan"), 1e-300])
)

DRAWN = ("step", "stall_seconds", "background_seconds", "write_seconds", "raw_nbytes")


@given(st.data())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_numbers_in_a_log_leave_a_page_that_can_be_drawn(line_of_a_log, data):
    line = json.loads(line_of_a_log.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(DRAWN))
        line["stats"][name] = data.draw(NUMBERS)
    line["ended"] = data.draw(st.one_of(st.just(line["ended"]), NUMBERS))
    root = line_of_a_log.parent / "made"
    root.mkdir(exist_ok=True)
    (root / LOG).write_text((json.dumps(line) + "\n") * 2 + line_of_a_log.read_text())
    told = page(gather(root))
    Outline(told)
    assert not re.search(r'["ML ]-?(?:nan|inf)(?![a-z])', told)


@pytest.fixture(scope="module")
def line_of_a_log(tmp_path_factory) -> Path:
    root = made(tmp_path_factory.mktemp("log"), 1)
    line = root / "line"
    line.write_text((root / LOG).read_text())
    return line


def test_a_timeline_of_many_threads_and_laps_is_drawn_as_far_as_it_can_be_seen(tmp_path):
    facts = gather(made(tmp_path, 1))
    assert facts.saves.last is not None
    (first, *_) = facts.saves.last.spans
    spans = [
        first._replace(stage=stage, thread=f"t{lane}", start=1e9 + at, end=1e9 + at + 0.5)
        for lane in range(600)
        for at, stage in enumerate(("filter", "encode") * 5)
    ]
    facts.saves.last = facts.saves.slowest = replace(facts.saves.last, spans=spans)
    told = page(facts)
    assert "in 600 threads, of which 40 are drawn" in outline(facts).words
    assert told.count('class="f-') < 2 * (BARS_MAX + 40)


def test_a_page_that_cant_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    gpuckpt.save(tmp_path / "run", {"w": np.zeros(4)})
    out = tmp_path / "page.html"
    out.write_bytes(b"the page before")
    (tmp_path / "link.html").symlink_to(out)
    system, failed = System(tmp_path, monkeypatch), 0
    for at in range(100):
        system.fault = Fault(at, errno.ENOSPC)
        try:
            _write(tmp_path / "link.html", b"the page")
        except gpuckpt.StorageError:
            failed += 1
        struck, system.fault = system.fault.struck, Fault(-1)
        assert out.read_bytes() in (b"the page before", b"the page")
        assert sorted(one.name for one in tmp_path.iterdir()) == ["link.html", "page.html", "run"]
        if not struck:
            break
    assert failed > 1
    assert (tmp_path / "link.html").is_symlink()
    assert out.read_bytes() == b"the page"
