"""What a save noticed about the state, and tells the user."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from gpuckpt.manifest import Manifest, notable
from gpuckpt.pending import Pending


def remarks_on(manifest: Manifest, previous: Manifest | None) -> list[str]:
    """Sentences about a checkpoint that was just committed; `previous` came before it."""
    found = [notable(manifest.tensors), _unchanged(manifest, previous)]
    return [f"step {manifest.step} holds {phrase}" for phrase in found if phrase]


def conclude(pending: Pending, on_error: str, *, stacklevel: int) -> None:
    """Tell the user how a save ended; by warnings, if it isn't raised.

    Raises:
        BaseException: what made it fail, if it is to be raised.
    """
    failure = pending.failure
    if failure is not None and (on_error == "raise" or not isinstance(failure, Exception)):
        raise failure
    beginning = f"step {pending.step} was not saved: "
    told = [beginning + str(failure).removeprefix(beginning)] if failure else pending.stats.remarks
    remark(told, stacklevel=stacklevel + 1)


def remark(remarks: Iterable[str], *, stacklevel: int) -> None:
    """Tell the user by warnings, which `logging.captureWarnings` brings to the log."""
    for sentence in remarks:
        warnings.warn(sentence, RuntimeWarning, stacklevel=stacklevel)


def _unchanged(manifest: Manifest, previous: Manifest | None) -> str | None:
    """An alarm if the step moved on and every byte stood still."""
    if previous is None or previous.step >= manifest.step or not manifest.raw_nbytes:
        return None
    if any(entry.version == manifest.step for entry in manifest.tensors):
        return None
    return (
        f"the same bytes in every tensor as step {previous.step}: is the state that is "
        "saved the one that is trained?"
    )
