"""What MkDocs does with this repository's pages, which are also read without it.

A link that leads out of `docs/` brings the file that it names into the site, below `project/`; a
folder in the navigation stands for the pages in it; figures stand in their pages, so that they
follow the page's colours; and the reference has every public name.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PROJECT = "project"  # where the site has what lies outside of docs/
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r'<img alt="([^"]*)" src="([^"]*figures/[\w-]+\.svg)" ?/?>')
# Folders whose index is a list of their pages, with what it says before it.
LISTED = {
    "adr": (
        "Decisions",
        "Choices that somebody will ask about. A later one says what it replaces.",
    ),
    "guides": ("Guides", "One page for each framework, tool, and way to come here."),
}
THE_REST = "<!-- the rest of the public names -->"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of a folder where the navigation names the folder."""
    config.nav = [_with_pages(entry, Path(config.docs_dir)) for entry in config.nav or []]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the lists of pages, and each file outside of docs/ that a page links to."""
    docs = Path(config.docs_dir)
    for folder in (one for one in LISTED if not (docs / one / "index.md").exists()):
        files.append(File.generated(config, f"{folder}/index.md", content=_list(docs / folder)))
    waiting = [docs / file.src_uri for file in files.documentation_pages() if not file.generated_by]
    waiting += [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    seen: set[Path] = set()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if not source.is_relative_to(docs):
            files.append(_of_the_project(source, config))
        if source.suffix == ".md":
            waiting += [target for target in _targets(source) if not target.is_relative_to(docs)]
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the repository's links into the site's, and completes the reference."""
    markdown = markdown.replace(THE_REST, "\n\n".join(_missing_names(Path(config.docs_dir))))
    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else _relinked(part, page) for i, part in enumerate(parts))


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts figures into their pages."""
    here = Path(config.docs_dir, page.file.src_uri).parent

    def drawn(match: re.Match[str]) -> str:
        svg = (here / match[2]).read_text()
        return f'<figure class="drawn" role="img" aria-label="{match[1]}">{svg}</figure>'

    return FIGURE.sub(drawn, html)


def _with_pages(entry: Any, docs: Path) -> Any:
    """`{title: "folder/"}` with the folder's pages: the index first, the others by their names."""
    if not isinstance(entry, dict):
        return entry
    ((title, value),) = entry.items()
    if not (isinstance(value, str) and value.endswith("/")):
        return entry
    pages = sorted(path.relative_to(docs).as_posix() for path in (docs / value).glob("*.md"))
    index = [f"{value}index.md"]
    return {title: index + [page for page in pages if page not in index]}


def _list(folder: Path) -> str:
    """The page that lists the pages of a folder, by their headings."""
    title, intro = LISTED[folder.name]
    rows = []
    for path in sorted(folder.glob("*.md")):
        heading = path.read_text().partition("\n")[0].lstrip("# ")
        rows.append(f"- [{heading}]({path.name})")
    return "\n".join([f"# {title}", "", intro, "", *rows, ""])


def _of_the_project(source: Path, config: MkDocsConfig) -> File:
    """A file outside of docs/, as one of the site's."""
    uri = f"{PROJECT}/{source.relative_to(ROOT).as_posix()}"
    return File.generated(config, uri, abs_src_path=str(source))


def _targets(source: Path) -> Iterator[Path]:
    """The repository's files that a page links to."""
    text = FENCE.sub("", source.read_text())
    for match in LINK.finditer(text):
        target = _target(source, match[2])
        if target is not None and target.is_file():
            yield target


def _target(source: Path, link: str) -> Path | None:
    """The path that a page's link names; None where it isn't one of the repository's."""
    path = link.partition("#")[0]
    if not path or "://" in path or path.startswith(("mailto:", "/")):
        return None
    target = Path(os.path.normpath(source.parent / path))
    return target if target.is_relative_to(ROOT) else None


def _relinked(text: str, page: Page) -> str:
    """A page's text with links between the site's files."""
    here = _source(page.file.src_uri)

    def relinked(match: re.Match[str]) -> str:
        target = _target(here, match[2])
        if target is None:
            return match[0]
        uri = os.path.relpath(_uri(target), Path(page.file.src_uri).parent)
        anchor = match[2].partition("#")[1:]
        return f"{match[1]}({uri}{''.join(anchor)})"

    return LINK.sub(relinked, text)


def _source(uri: str) -> Path:
    """Where the repository has one of the site's files."""
    inside, outside = ROOT / "docs" / uri, uri.removeprefix(f"{PROJECT}/")
    return inside if outside == uri else ROOT / outside


def _uri(path: Path) -> str:
    """Where the site has one of the repository's files."""
    if path.is_relative_to(ROOT / "docs"):
        page = path / "index.md" if path.is_dir() else path
        return page.relative_to(ROOT / "docs").as_posix()
    return f"{PROJECT}/{path.relative_to(ROOT).as_posix()}"


def _missing_names(docs: Path) -> list[str]:
    """A line of the reference for each public name that has none yet."""
    there = "\n".join(path.read_text() for path in (docs / "reference").glob("*.md"))
    named = set(re.findall(r"^::: gpuckpt\.(\w+)$", there, re.MULTILINE))
    return [f"::: gpuckpt.{name}" for name in public_names() if name not in named]


def public_names() -> list[str]:
    """`gpuckpt.__all__`, without importing it."""
    tree = ast.parse((ROOT / "gpuckpt/__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if name != "__version__"]
    return []
