"""What an object store is asked for: the small port that each client library has an adapter to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

from gpuckpt.stores import Buffer, Bytes

# By what a service tells one content of an object from another.  Only it knows how to read this.
Tag = Mapping[str, str | None]
# What may be there when an object is put.
Over = Literal["anything", "nothing"] | Tag


class ClientError(Exception):
    """Why a request wasn't answered as it should be."""


class MissingError(ClientError):
    """There is no such object, or no such bucket."""


class ClashError(ClientError):
    """What is there isn't what the request said must be there; nothing was put by this one."""


class UnableError(ClientError):
    """The service, or its client, can't make a request depend on that."""


class PassingError(ClientError):
    """It may go well next time; what was asked for may have been done all the same."""


class RefusedError(ClientError):
    """It won't go well next time, either."""


class Client(Protocol):
    """Objects under one prefix, by flat names.

    One method call is one try, which takes a bounded time; all but `put_parts`
    leave it to the caller to try again.  Every method may be called by several
    threads at once, and raises nothing but a `ClientError`.
    """

    @property
    def whole(self) -> bool:
        """Whether an object that is put in parts appears whole, or else not at all."""
        ...

    def put(self, name: str, data: Buffer, over: Over) -> Tag:
        """Put a whole object, in one step, if what is there is as `over` says; its tag.

        Raises `UnableError`, and does nothing, if that can't be made to depend on it.
        """
        ...

    def put_parts(self, name: str, parts: Iterator[Bytes]) -> None:
        """Put an object in parts, several of them in flight; it appears when all are there.

        All but the last have one length.  If `parts` raises an error, the upload
        is undone, and the error raised.  Each part is tried again by itself.
        """
        ...

    def get(self, name: str) -> tuple[bytes, Tag]:
        """A whole (small) object."""
        ...

    def get_range(self, name: str, offset: int, nbytes: int) -> Buffer:
        """Some bytes of an object; fewer, or `RefusedError`, if it ends before."""
        ...

    def head(self, name: str) -> tuple[int, Tag]:
        """Bytes in an object, and its tag."""
        ...

    def list(self) -> dict[str, int]:
        """All objects and their bytes, on however many pages; none below a further slash."""
        ...

    def delete(self, name: str) -> None:
        """Delete an object; nothing happens if it isn't there."""
        ...
