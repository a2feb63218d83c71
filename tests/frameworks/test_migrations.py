"""The page for those who come from another checkpointer: each of its sections is a program."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests import pages

PAGE = pages.ROOT / "docs/guides/migrate.md"
# Its sections, each with what it needs.
MIGRATIONS = {
    "torch.save": ("torch",),
    "torch.distributed.checkpoint": ("torch",),
    "Orbax": ("jax", "orbax.checkpoint"),
}


@pytest.mark.parametrize("title", MIGRATIONS)
def test_a_section_about_another_checkpointer_is_a_program_that_runs(title, tmp_path):
    for package in MIGRATIONS[title]:
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            pytest.skip(f"{package} isn't installed")
    text = PAGE.read_text()
    section = tmp_path / "section.md"
    section.write_text(text.partition(f"\n## {title}\n")[2].partition("\n## ")[0])
    programs = [block.text for block in pages.blocks(section) if block.language == "python"]
    assert len(programs) > 1
    program = pages.Block("python", None, "\n".join(programs))
    pages.run([program], tmp_path, warnings="default")


def test_every_section_about_another_checkpointer_is_tried():
    text = PAGE.read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(MIGRATIONS)
