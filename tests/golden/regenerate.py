"""Write the golden files of a new format version: `python -m tests.golden.regenerate`.

Files of a version are written once, by the code that introduced it, and stay
as they are for ever; this refuses to touch a version that is there.
"""

import hashlib
import json
import sys
from pathlib import Path

from gpuckpt import layout
from gpuckpt.census import take_inventory
from gpuckpt.manifest import Manifest
from gpuckpt.resources import Resources
from gpuckpt.save import Header, save_snapshot
from gpuckpt.snapshot import Planner, capture
from gpuckpt.stats import Stats
from gpuckpt.stores.local import LocalStore
from tests.golden.describe import describe
from tests.golden.states import CASES, Case, Save

HERE = Path(__file__).parent
SUMS = "SHA256SUMS"
CREATED = 1700000000.25
WRITER = "gpuckpt 0.1.0"


def main() -> int:
    directory = HERE / f"v{layout.VERSION}"
    if directory.exists():
        print(f"{directory} is there, and golden files are never written again")
        return 1
    for case in CASES:
        write_case(directory / case.name, case)
        expected = {save.step: describe(save.state) for save in case.saves()}
        text = json.dumps(expected, separators=(",", ":"))
        (directory / f"{case.family}.json").write_text(text + "\n")
    (directory / SUMS).write_text(sums(directory))
    return 0


def write_case(root: Path, case: Case) -> None:
    """Write a case with the code as it is now."""
    previous = None
    for save in case.saves():
        previous = write_step(root, save, case, previous)


def write_step(root: Path, save: Save, case: Case, previous: Manifest | None = None) -> Manifest:
    resources = Resources("64 MiB", chunk_nbytes=case.chunk_nbytes)
    header = Header(save.step, save.epoch, save.metrics, CREATED, WRITER)
    inventory = take_inventory(save.state)
    plans = Planner(case.chunk_nbytes, split=case.codec != "raw").plans(inventory.roster)
    snapshot = capture(inventory, plans, resources.devices, mode="hold", host_room_nbytes=0)
    root.mkdir(parents=True, exist_ok=True)
    return save_snapshot(
        snapshot,
        header,
        LocalStore(root),
        resources,
        codec=case.codec,
        previous=previous,
        stats=Stats(save.step),
        segment_nbytes=case.segment_nbytes,
    )


def sums(directory: Path) -> str:
    """The sums of all files below, as `sha256sum` writes them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SUMS)
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(directory)}\n"
        for path in files
    )


if __name__ == "__main__":
    sys.exit(main())
