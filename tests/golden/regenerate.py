"""Write the golden files of a new format version: `python -m tests.golden.regenerate`.

Files are written once, by the code that introduced what they hold, and stay
as they are for ever; this refuses to touch a directory that is there.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gpuckpt import layout
from gpuckpt.census import Census
from gpuckpt.inventory import Snapshot
from gpuckpt.manifest import Manifest
from gpuckpt.resources import Resources
from gpuckpt.save import DELTA, Header, save_snapshot
from gpuckpt.seal import make_seal
from gpuckpt.snapshot import Planner, capture
from gpuckpt.stats import Stats
from gpuckpt.stores.local import LocalStore
from tests.golden.describe import describe
from tests.golden.states import CASES, DERIVED, INCREMENTS, SEALED, TURNED, Case, Save

HERE = Path(__file__).parent
SUMS = "SHA256SUMS"
CREATED = 1700000000.25
WRITER = "gpuckpt 0.1.0"


def main() -> int:
    """Write those directories that aren't there; 1 if all are."""
    version, new = f"v{layout.VERSION}", 0
    every = {
        version: CASES,
        f"{version}.increments": INCREMENTS,
        f"{version}.turned": TURNED,
        f"{version}.derived": DERIVED,
        f"{version}.sealed": SEALED,
    }
    for name, cases in every.items():
        if (HERE / name).exists():
            print(f"{HERE / name} is there, and golden files are never written again")
            continue
        write_directory(HERE / name, cases)
        new += 1
    return 0 if new else 1


def write_directory(directory: Path, cases: Sequence[Case]) -> None:
    for case in cases:
        write_case(directory / case.name, case)
        expected = {save.step: describe(save.state) for save in case.saves()}
        text = json.dumps(expected, separators=(",", ":"))
        (directory / f"{case.family}.json").write_text(text + "\n")
    (directory / SUMS).write_text(sums(directory))


def write_case(root: Path, case: Case) -> None:
    """Write a case with the code as it is now."""
    root.mkdir(parents=True, exist_ok=True)
    resources = Resources("64 MiB", chunk_nbytes=case.chunk_nbytes)
    planner = Planner(case.chunk_nbytes, split=case.codec != "raw")
    census, previous = Census(), None
    for save in case.saves():
        inventory = census.take(save.state)
        plans = planner.plans(inventory.roster)
        if case.codec == DELTA:
            resources.bases.prepare(plans, resources.host_room_nbytes)
        snapshot = capture(inventory, plans, resources.devices, mode="hold", host_room_nbytes=0)
        previous = write_step(root, save, case, resources, snapshot, previous)


def write_step(  # noqa: PLR0917 - all that a save has
    root: Path,
    save: Save,
    case: Case,
    resources: Resources,
    snapshot: Snapshot,
    previous: Manifest | None,
) -> Manifest:
    header = Header(save.step, save.epoch, save.metrics, CREATED, WRITER)
    return save_snapshot(
        snapshot,
        header,
        LocalStore(root),
        resources,
        codec=case.codec,
        previous=previous,
        stats=Stats(save.step),
        full_every=case.full_every,
        segment_nbytes=case.segment_nbytes,
        seal=make_seal(case.key),
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
