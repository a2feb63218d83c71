"""The house: modules import only from rows above their own, stay small, and say what they are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gpuckpt

PACKAGE = Path(gpuckpt.__file__).parent

# A module imports only from rows above its own; so the five layers (row 8) don't import each other.
ROWS: list[set[str]] = [
    {"errors", "_version", "__main__", "native", "hostmemory", "boxes", "record"},
    {
        "spreading",
        "dtypes",
        "layout",
        "sizes",
        "ordered",
        "planes",
        "sparse",
        "squares",
        "meter",
        "cores",
        "effort",
        "apart",
        "balance",
        "seal",
        "spans",
        "switching",
        "runs",
        "slabs",
    },
    {
        *("moves", "spec", "fingerprint", "statistics", "values", "deltas", "copying", "rounding"),
        *("schedule", "notice", "sharded"),
    },
    {"tiling"},
    {"tileindex"},
    {"entries", "look", "cutting"},
    {"names", "plan", "stats", "tierstats", "arrays", "stores", "structure"},
    {"tree", "arena", "groups"},
    {"gathering"},
    {"devices", "tensors", "outline"},
    {"manifest", "outlining"},
    {"parts"},
    {"inventory", "pending", "journal", "derived", "filled", "watch", "deadline", "shards"},
    {"holdings", "observers"},
    {"sharing", "census", "snapshot", "staging", "coding", "segments", "commit", "remaking"},
    {"tilecoding"},
    {"bases", "deltacoding", "matching", "rows", "increments"},
    {"resources", "encoder", "reading", "contents"},
    {"portions", "overlaps", "tilereading"},
    {"save", "restore"},
    {
        "verify",
        "loading",
        "retention",
        "options",
        "sources",
        "governor",
        "background",
        "rng",
        "perrank",
        "remarks",
        "diagnosis",
        "decoded",
    },
    {
        "comparing",
        "overview",
        "counting",
        "pruning",
        "space",
        "entering",
        "answers",
        "pace",
        "tiers",
        "shipping",
        "lane",
        "replicas",
    },
    {"spares", "differing"},
    {"convoy"},
    {"uploader"},
    {"carrier"},
    {"tiered"},
    {"concluding"},
    {"deciding"},
    {"joint"},
    {"saving", "fallback", "rebuilding"},
    {"preemption", "nearest", "merging"},
    {"concord"},
    {"restoring", "lifetime", "crew"},
    {"checkpointer", "warm", "salvage"},
    {"api", "repair"},
    {"adapters"},
    {"torch"},
    {"jax"},
    {"conversion", "opening"},
    {"__init__"},
    {"demo", "limits", "metrics", "report", "selftest"},
    {"cli"},
]


def module_of(path: Path) -> str:
    """The module or package directly below gpuckpt that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def row_of(module: str) -> int | None:
    return next((at for at, row in enumerate(ROWS) if module in row), None)


def imports(path: Path) -> set[str]:
    """The gpuckpt modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gpuckpt"):
            below = (node.module or "").split(".")[1:2]
            found |= set(below) if below else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("gpuckpt.")]
            found |= {name.split(".")[1] for name in names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rows_above_its_own(path):
    module = module_of(path)
    row = row_of(module)
    assert row is not None, f"give {module} a row"

    for other in imports(path) - {module}:
        other_row = row_of(other)
        if module == "__main__":
            continue  # it is the command line by another name
        assert other_row is not None, f"{module} imports {other}, which has no row"
        assert other_row < row, f"{module} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_is_at_most_350_lines_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(ast.parse(text)), "a docstring"


def test_only_the_local_store_talks_to_the_file_system_and_only_cuda_gives_a_gpu_work():
    for path in FILES:
        name, text = str(path.relative_to(PACKAGE)), path.read_text()
        if not name.startswith(("demo/", "stores/local.py")):
            assert "os.fsync" not in text, name
            assert "os.open" not in text or name == "stores/regular.py", name
        if not name.startswith(("demo/", "devices/stream.py")):
            assert "memcpyAsync" not in text, name
