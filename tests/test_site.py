"""The documentation's site, as MkDocs builds it: `make docs` runs this."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpuckpt

pytest.importorskip("mkdocs", reason="the site needs MkDocs: make docs")
ROOT = Path(__file__).parents[1]
FETCHED = re.compile(
    r'<(?:script|img|link rel="(?:stylesheet|preload|icon)")[^>]*(?:src|href)="?([^" >]+)'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    return directory


def test_every_public_name_has_a_place_in_the_reference(site):
    reference = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    for name in gpuckpt.__all__:
        assert f'id="gpuckpt.{name}"' in reference or f"gpuckpt.{name}</code>" in reference, name


def test_every_guide_and_recipe_is_in_the_navigation(site):
    start = (site / "index.html").read_text()
    for folder in ("guides", "cookbook", "reference"):
        for page in (ROOT / "docs" / folder).glob("*.md"):
            assert f'href="{folder}/{page.stem}.html"' in start, page
    decisions = (site / "adr/index.html").read_text()
    for page in (ROOT / "docs/adr").glob("*.md"):
        assert f'href="{page.stem}.html"' in decisions, page


def test_a_page_fetches_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        for source in FETCHED.findall(page.read_text()):
            assert "//" not in source, f"{page}: {source}"


def test_every_link_within_the_site_leads_to_a_file(site):
    for page in site.rglob("*.html"):
        for link in re.findall(r'href="([^"#]+)', page.read_text()):
            if ":" not in link and page.name != "404.html":
                assert (page.parent / link).exists(), f"{page}: {link}"
