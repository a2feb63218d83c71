"""Every check, one after the other, in a directory that goes away again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpuckpt.errors import CheckpointError, InvalidError, StorageError
from gpuckpt.selftest.checkpoints import check_flips, check_kills, check_speed
from gpuckpt.selftest.files import (
    check_direct,
    check_lock,
    check_rename,
    check_space,
    check_sync,
)
from gpuckpt.selftest.mounts import judge_mount
from gpuckpt.selftest.verdicts import Verdict, failed, recommendation

PREFIX = "gpuckpt-selftest-"

Check = Callable[[Path], Verdict]


@dataclass(frozen=True, slots=True)
class Report:
    """All verdicts, and where the files of a check that failed are."""

    directory: str
    verdicts: tuple[Verdict, ...]
    kept: str | None

    @property
    def fit(self) -> bool:
        """Whether nothing failed."""
        return all(one.outcome != "FAILED" for one in self.verdicts)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        told = recommendation(self.verdicts)
        return {**asdict(self), "fit": self.fit, "recommendation": told}


def run_checks(
    directory: Path, nbytes: int, tell: Callable[[Verdict], None] = lambda _: None
) -> Report:
    """Run every check inside `directory`, which exists; `tell` is given each verdict at once.

    Needs about four times `nbytes` of space.  Removes what it made, unless a check failed.

    Raises:
        InvalidError: it isn't a directory.
        StorageError: nothing can be made there.
    """
    if not directory.is_dir():
        raise InvalidError(f"{directory}: the self-test needs a directory that exists")
    verdicts = []
    with _inside(directory) as place:
        for name, check in _checks(nbytes):
            try:
                verdict = check(place)
            except CheckpointError as error:
                verdict = failed(name, str(error), "see what the system says")
            verdicts.append(verdict)
            tell(verdict)
        whole = all(one.outcome != "FAILED" for one in verdicts)
        if whole:
            shutil.rmtree(place)
    return Report(str(directory), tuple(verdicts), None if whole else str(place))


def _checks(nbytes: int) -> Iterator[tuple[str, Check]]:
    yield "file system", judge_mount
    yield "space", check_space
    yield "rename", check_rename
    yield "sync", check_sync
    yield "direct writes", check_direct
    yield "lock", check_lock
    yield "kill and resume", check_kills
    yield "bit flips", check_flips
    yield "speed", lambda place: check_speed(place, nbytes)


@contextmanager
def _inside(directory: Path) -> Iterator[Path]:
    """A new directory there; removed if the checks were broken off."""
    try:
        place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
    except OSError as error:
        raise StorageError(f"can't make a directory in {directory}: {error.strerror}") from error
    try:
        yield place
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
