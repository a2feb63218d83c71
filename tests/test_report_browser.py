"""The report as a browser shows it: wide and narrow, light and dark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gpuckpt
from gpuckpt.report.gather import gather
from gpuckpt.report.page import page
from tests.chromium import Browser, found, opened
from tests.test_report import NASTY, long_log, made

pytestmark = pytest.mark.skipif(found() is None, reason="needs Chromium: apt-get install chromium")
SCREENS = [(width, scheme) for width in (390, 1440) for scheme in ("light", "dark")]

# Elements that reach beyond the window; what scrolls by itself may be wider inside.
OVERFLOWING = """
[...document.querySelectorAll("body *")]
  .filter(one => !one.parentElement.closest(".scroll, svg"))
  .filter(one => {
    const box = one.getBoundingClientRect();
    return box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5);
  })
  .map(one => one.outerHTML.slice(0, 120))
"""
# Labels of a chart that its picture cuts off.
CUT_OFF = """
[...document.querySelectorAll("svg text")]
  .filter(one => {
    const box = one.getBoundingClientRect(), frame = one.closest("svg").getBoundingClientRect();
    return box.width > 0 && (box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 2 || box.bottom > frame.bottom + 2);
  })
  .map(one => one.textContent)
"""
# Texts whose contrast is less than WCAG's 4.5 to 1.
FAINT = """
(() => {
  const parts = told => told.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(one => one / 255)
    .map(one => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = parts(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("p, h1, h2, h3, li, th, td, span, a, summary, svg text")]
    .filter(one => one.textContent.trim() && one.getBoundingClientRect().width > 0)
    .filter(one => {
      const style = getComputedStyle(one);
      const ink = parts(one.closest("svg") ? style.fill : style.color);
      const [a, b] = [light(ink), light(behind(one))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05) < 4.5;
    })
    .map(one => one.outerHTML.slice(0, 120));
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with opened(tmp_path_factory.mktemp("profile")) as one:
        yield one


def written(root: Path, path: Path) -> Path:
    path.write_bytes(page(gather(root, tiers=[str(root)])).encode())
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Reports of a plain run, a long one, one with hostile names, and a root without a log."""
    where = tmp_path_factory.mktemp("pages")
    long_log(made(where / "long"), 2000)
    nasty = {name: np.array([1.0, np.nan]) for name in NASTY if name != "\ud800"}
    with gpuckpt.Checkpointer(where / "nasty", log=True, trace=True) as ckpt:
        ckpt.save(1, nasty, metrics={"<img src=x onerror=alert(2)>": 1.0, "y" * 300: 1.0})
    gpuckpt.save(where / "bare", nasty)
    made(where / "plain", 9, keep=gpuckpt.Keep(last=3))
    names = ("plain", "long", "nasty", "bare")
    return {name: written(where / name, where / f"{name}.html") for name in names}


@pytest.mark.parametrize("name", ["plain", "long", "nasty", "bare"])
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_nothing_overflows_is_cut_off_faint_or_complained_of(browser, pages, name, width, scheme):
    browser.show(pages[name], width, scheme)
    assert browser.evaluate("innerWidth") == width
    for opens in (False, True):
        browser.evaluate(f"document.querySelectorAll('details').forEach(d => d.open = {opens:d})")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(OVERFLOWING) == []
        assert browser.evaluate(CUT_OFF) == []
        assert browser.evaluate(FAINT) == []
    assert browser.complaints() == []
    if folder := os.environ.get("GPUCKPT_PICTURES"):
        browser.show(pages[name], width, scheme)
        browser.picture(Path(folder) / f"report-{name}-{width}-{scheme}.png")


def test_dark_is_dark_and_light_is_light(browser, pages):
    colours = {}
    for scheme in ("light", "dark"):
        browser.show(pages["plain"], 390, scheme)
        colours[scheme] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours["light"] == "rgb(255, 255, 255)"
    assert colours["dark"] != colours["light"]


@pytest.mark.parametrize(("width", "seen"), [(390, "narrow"), (1440, "wide")])
def test_a_timeline_is_drawn_for_the_width_that_there_is(browser, pages, width, seen):
    browser.show(pages["plain"], width, "light")
    drawn = browser.evaluate(
        "[...document.querySelectorAll('.timeline > svg')]"
        ".filter(one => one.getBoundingClientRect().width > 0)"
        ".map(one => one.getAttribute('class'))"
    )
    assert set(drawn) == {seen}


def test_no_hostile_name_has_run_or_become_an_element(browser, pages):
    browser.show(pages["nasty"], 1440, "light")
    assert browser.evaluate("document.scripts.length + document.images.length") == 0
    shown = browser.evaluate("document.body.textContent")
    assert "<script>alert(1)</script>" in shown
