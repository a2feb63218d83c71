"""The documentation's site, as MkDocs builds it: `make docs` runs this."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
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


# In frames of a phone's and a desktop's width; each page says what is wider than its frame.
FRAMES = """<!doctype html><title>frames</title><body><script>
const pages = PAGES, widths = [390, 1440], found = [];
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px"; frame.style.height = "900px"; frame.src = page;
  const loaded = new Promise(resolve => { frame.onload = resolve; });
  document.body.append(frame);
  await loaded;
  frame.contentWindow.addEventListener("error", one => found.push([page, width, one.message]));
  const root = frame.contentDocument.documentElement;
  const images = [...frame.contentDocument.images].filter(one => !one.complete);
  if (root.scrollWidth > width) found.push([page, width, "is " + root.scrollWidth + " wide"]);
  if (images.length) found.push([page, width, "lacks an image"]);
  frame.remove();
}
(async () => {
  for (const page of pages) for (const width of widths) await look(page, width);
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


class Serves(http.server.SimpleHTTPRequestHandler):
    """The site's files; what is posted is put into the queue."""

    posted: queue.Queue[bytes]

    def do_POST(self) -> None:
        self.posted.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def browsing(browser: str, site: Path, page: str, profile: Path) -> Iterator[queue.Queue[bytes]]:
    """A browser that shows a page of the site; what the page posts."""
    handler = type("Handler", (Serves,), {"posted": queue.Queue()})
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(site))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{page}"
        process = subprocess.Popen(
            [browser, *options, "--remote-debugging-port=0", url],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield handler.posted  # type: ignore[attr-defined]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            server.shutdown()


def test_no_page_is_wider_than_a_phone_or_a_desktop(site, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium")
    pages = [page.relative_to(site).as_posix() for page in sorted(site.rglob("*.html"))]
    shown = [page for page in pages if not page.startswith(("adr/0", "404", "project/"))]
    assert len(shown) > 20
    (site / "frames.html").write_text(FRAMES.replace("PAGES", json.dumps(shown)))
    with browsing(browser, site, "frames.html", tmp_path / "profile") as posted:
        found = json.loads(posted.get(timeout=200))
    assert found == []


def test_figures_stand_in_their_pages(site):
    page = (ROOT / "docs/how-it-works.md").read_text()
    assert (site / "how-it-works.html").read_text().count('<figure class="drawn"') == page.count(
        "](figures/"
    )
