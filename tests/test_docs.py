"""The documentation's pages: what they show runs, and what they link to is there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import gpuckpt
from gpuckpt import errors
from tests import pages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
RUN = ("python", "sh")


def test_the_quickstart_runs_and_the_killed_run_ends_as_the_other(tmp_path):
    shown = [block for block in pages.blocks(DOCS / "quickstart.md") if block.language in RUN]
    printed = pages.run(shown, tmp_path)
    digests = re.findall(r"^digest (\w+)$", printed, re.MULTILINE)
    assert len(digests) >= 2  # three, if it ended before it was killed
    assert len(set(digests)) == 1


def test_the_front_pages_loop_runs(tmp_path):
    pages.run(pages.blocks(DOCS / "index.md"), tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_links_to_is_there(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path = link.partition("#")[0]
        if path and "://" not in link:
            assert (page.parent / path).exists(), link


def test_the_reference_names_what_there_is_and_nothing_twice():
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: gpuckpt\.(\w+)$", text, re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) <= set(gpuckpt.__all__)


def public_of(source: Path) -> list[str]:
    """A module's `__all__`, without importing it."""
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def test_the_reference_has_every_public_name_of_the_adapters_and_the_exporters():
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    there = set(re.findall(r"^::: (gpuckpt\.[\w.]+)$", text, re.MULTILINE))
    sources = [*(ROOT / "gpuckpt/adapters").rglob("*.py"), ROOT / "gpuckpt/metrics/__init__.py"]
    named = {
        ".".join([*(source.relative_to(ROOT).with_suffix("").parts), name]).replace(".__init__", "")
        for source in sources
        for name in public_of(source)
    }
    named.discard("gpuckpt.adapters.transformers.AcceleratorState")  # of `accelerate`
    assert len(named) > 35
    assert named - there == set()
    for short in ("torch", "jax"):
        assert public_of(ROOT / f"gpuckpt/{short}.py") == public_of(
            ROOT / f"gpuckpt/adapters/{short}/__init__.py"
        )


def test_the_page_of_functions_has_what_they_return():
    text = (DOCS / "reference/functions.md").read_text()
    for name in ("open", "opening.Reader", "convert", "Conversion", "conversion.Moved"):
        assert f"::: gpuckpt.{name}\n" in text


def test_the_page_of_errors_has_the_tree_as_it_is():
    tree = (inspect.getdoc(errors) or "").partition("\n\n")[2]
    assert [block.text.strip() for block in pages.blocks(DOCS / "reference/errors.md")] == [tree]


@pytest.mark.parametrize("name", [n for n in gpuckpt.__all__ if n != "__version__"])
def test_every_field_and_property_of_a_public_class_is_documented(name):
    value = getattr(gpuckpt, name)
    if not inspect.isclass(value):
        return
    text = inspect.getdoc(value) or ""
    if dataclasses.is_dataclass(value):
        fields = [one.name for one in dataclasses.fields(value) if one.repr and one.name[0] != "_"]
        spans = " ".join(re.findall(r"`([^`]+)`", text))
        assert [field for field in fields if not re.search(rf"\b{field}\b", spans)] == []
    for attribute, member in vars(value).items():
        if isinstance(member, property) and not attribute.startswith("_"):
            assert inspect.getdoc(member), attribute


@pytest.mark.parametrize("page", sorted(DOCS.glob("guides/*.md")), ids=lambda page: page.stem)
def test_the_python_of_a_guide_can_be_pasted(page):
    for language, program in re.findall(
        r"^```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL
    ):
        if language == "python":
            compile(program, str(page), "exec")


def test_nothing_is_to_be_installed_from_an_index_nor_with_brackets_that_a_shell_takes():
    for page in (*PAGES, *ROOT.glob("examples/*.py")):
        assert not re.findall(r"pip install '?gpuckpt", page.read_text()), page
    for source in (ROOT / "gpuckpt").rglob("*.py"):
        assert not re.findall(r"pip install gpuckpt\[", source.read_text()), source
