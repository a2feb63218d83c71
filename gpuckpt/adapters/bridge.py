"""A framework's whole state as one stateful object, which is asked only when it is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpuckpt.adapters.plain import NOTES, Form, join, split
from gpuckpt.errors import InvalidError
from gpuckpt.perrank import PerRank

# Where each rank's own things are, beside what the ranks have together.
OWN = "gpuckpt.own"


def pack(tree: Mapping[str, Any], forms: Mapping[type, Form]) -> dict[str, Any]:
    """A framework's dict as a state, with the notes in it.

    Raises:
        UnsupportedError: it names the path of what can't be saved.
        InvalidError: a key is one that is used here.
    """
    if taken := {NOTES, OWN} & tree.keys():
        raise InvalidError(f"the key {min(taken)!r} is gpuckpt's own; use another")
    plain, notes = split(dict(tree), forms)
    return {**plain, NOTES: notes}


def unpack(state: Mapping[str, Any], forms: Mapping[type, Form]) -> dict[str, Any]:
    """Undo `pack`."""
    tree = {key: node for key, node in state.items() if key not in (NOTES, OWN)}
    made: dict[str, Any] = join(tree, state.get(NOTES, ()), forms)
    return made


class Bridge:
    """What a `Checkpointer` saves and restores for a framework.

    `dump` gives the framework's state as a dict, and `own` what each rank has of
    its own.  A restore fills the tensors of `live`, which are at the same names,
    in place, and leaves all that was saved in `loaded` and `loaded_own`, for the
    framework to take.
    """

    def __init__(
        self,
        dump: Callable[[], Mapping[str, Any]],
        own: Callable[[], Mapping[str, Any]],
        live: Callable[[], Mapping[str, Any]],
        forms: Mapping[type, Form],
    ) -> None:
        self._dump, self._own, self._live, self._forms = dump, own, live, forms
        self._restoring = False
        self.loaded: dict[str, Any] = {}
        self.loaded_own: dict[str, Any] = {}

    def restored_by(self, restore: Callable[[Bridge], int]) -> int:
        """Restore it by a checkpointer's method; the step."""
        self._restoring = True
        try:
            return restore(self)
        finally:
            self._restoring = False

    def state_dict(self) -> dict[str, Any]:
        """The framework's state at this moment; for a restore, what is to be filled in place."""
        if self._restoring:
            return dict(self._live())
        return {**pack(self._dump(), self._forms), OWN: PerRank(dict(self._own()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what was saved until the framework takes it."""
        self.loaded = unpack(state, self._forms)
        self.loaded_own = dict(state.get(OWN, {}))

    def forget(self) -> None:
        """Let go of what was restored, once the framework has taken it."""
        self.loaded, self.loaded_own = {}, {}
