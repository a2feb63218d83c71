"""What kind of file system a directory is on, from `/proc/self/mountinfo` (see proc(5))."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpuckpt.selftest.verdicts import Verdict, note, ok

CHECK = "file system"
MOUNTS = Path("/proc/self/mountinfo")

# What is known of some: (types, what a test can't see from here).
_ADVICE = (
    (("tmpfs", "ramfs"), "it lies in memory: nothing in it outlives a reboot"),
    (
        ("nfs", "nfs4"),
        "mount it `hard`; locks hold across machines only with a lock manager (not `nolock`)",
    ),
    (("lustre",), "mount it with `flock`, else two machines can write to one root"),
    (
        ("fuse", "9p", "virtiofs", "ceph", "cifs", "smb3"),
        "whether a sync reaches the disk is up to the server: ask who runs it",
    ),
    (("overlay",), "it goes away with its container: use a volume"),
    (("vfat", "exfat", "msdos"), "it has no journal: use ext4, XFS, Btrfs or ZFS"),
)


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system."""

    point: str
    kind: str
    options: frozenset[str]


def mount_of(directory: Path, table: str) -> Mount | None:
    """The mount in `table`, a `mountinfo`, that `directory` (absolute, resolved) is on."""
    found: Mount | None = None
    for mount in _mounts(table):
        above = os.path.commonpath([mount.point, directory]) == mount.point
        if above and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def judge_mount(directory: Path, table: str | None = None) -> Verdict:
    """What is known of the file system that `directory` is on."""
    if table is None:
        table = MOUNTS.read_text("utf-8", "replace") if MOUNTS.exists() else ""
    mount = mount_of(directory.resolve(), table)
    if mount is None:
        return note(CHECK, "unknown", "the checks below are all that is known")
    found = f"{mount.kind}, mounted at {mount.point}"
    for option, why in (("nobarrier", "loses"), ("barrier=0", "loses")):
        if option in mount.options:
            return note(CHECK, f"{found} with {option}", f"a power failure {why} synced data")
    if "localflock" in mount.options:
        return note(CHECK, f"{found} with localflock", "other machines don't see locks: use flock")
    for kinds, advice in _ADVICE:
        if mount.kind.partition(".")[0] in kinds:
            return note(CHECK, found, advice)
    return ok(CHECK, found)


def _mounts(table: str) -> Iterator[Mount]:
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        first, last = before.split(), after.split()
        if len(first) >= 6 and len(last) >= 3:
            options = frozenset(f"{first[5]},{last[2]}".split(","))
            yield Mount(_unescaped(first[4]), last[0], options)


def _unescaped(path: str) -> str:
    """Spaces and the like are octal in the table."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
