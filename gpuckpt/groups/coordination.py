"""Ranks of jax.distributed, which meet in the key-value store of its coordination service."""

from __future__ import annotations

from typing import Any

from gpuckpt.errors import InvalidError
from gpuckpt.groups.meeting import Meeting

_ABSENT = ("DEADLINE_EXCEEDED", "NOT_FOUND")


class CoordinationBoard:
    """Values in the coordination service."""

    for_threads = True

    def __init__(self, client: Any) -> None:
        """`client` is JAX's own, which any thread may use."""
        self._client = client

    def put(self, key: str, value: bytes) -> None:
        """Put a value there, in the place of any that is."""
        self._asked(lambda: self._client.key_value_set_bytes(key, value, True))

    def wait(self, key: str, timeout: float) -> bytes | None:
        """The value, once it is there; None if it isn't in time."""
        client = self._client
        if timeout > 0:
            seconds = max(int(timeout * 1000), 1)
            found = self._asked(lambda: client.blocking_key_value_get_bytes(key, seconds))
        else:
            found = self._asked(lambda: client.key_value_try_get_bytes(key))
        return None if found is None else bytes(found)

    def remove(self, key: str) -> None:
        """Take a value away, if it is there."""
        self._asked(lambda: self._client.key_value_delete(key))

    def sweep(self, run: str, session: str) -> None:
        """Nothing: the service lives as long as the job."""

    def _asked(self, request: Any) -> Any:
        """What a request brings; None if there is no such value."""
        try:
            return request()
        except RuntimeError as error:  # JAX's errors are told apart by their texts alone
            if any(word in str(error) for word in _ABSENT):
                return None
            raise ConnectionError(str(error).partition("\n")[0]) from error


def jax_ranks(name: str = "gpuckpt") -> Meeting:
    """The processes of `jax.distributed`.

    Raises:
        InvalidError: it isn't initialised.
    """
    # JAX has no public way to the service; Orbax takes this one, too.
    from jax._src import distributed

    state: Any = distributed.global_state
    if state.client is None:
        raise InvalidError(
            "jax.distributed isn't initialised; call jax.distributed.initialize first, or pass "
            "group='store'"
        )
    return Meeting(CoordinationBoard(state.client), state.process_id, state.num_processes, name)
