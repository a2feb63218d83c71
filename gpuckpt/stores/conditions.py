"""Objects that are put on the condition of what is there, though answers may be lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from gpuckpt.errors import NotFoundError, StorageError
from gpuckpt.stores.clients import ClashError, Client, MissingError, Over, Tag, UnableError
from gpuckpt.stores.retrying import Requests


def put_over(
    client: Client,
    requests: Requests,
    name: str,
    content: bytes,
    over: Over,
    *,
    check: Callable[[], object] = lambda: None,
) -> Tag:
    """Put an object if what is there is as `over` says; its tag.

    `check` is called before each try.
    A try may have put it though its answer was lost; the next is then told of a
    clash.  So if what is there is `content`, which nobody else puts, it was put.

    Raises:
        ClashError: what is there is something else.
        StorageError: the storage refused; if it is `maybe`, it may be there all the same.
    """

    def ask() -> Tag:
        check()
        try:
            return client.put(name, content, over)
        except UnableError:
            _compare(client, name, over)
            return client.put(name, content, "anything")
        except MissingError as error:
            if isinstance(over, str):
                raise
            raise ClashError(f"it is gone ({error})") from error

    try:
        return requests.run("write", name, ask)
    except ClashError:
        tag = _tag_of(client, requests, name, content)
        if tag is None:
            raise
        return tag
    except StorageError as error:
        tag = _tag_of(client, requests, name, content) if error.maybe else None
        if tag is None:
            raise
        return tag


def _compare(client: Client, name: str, over: Over) -> None:
    """Look whether what is there is as it must be; another may come between this and the put.

    Raises:
        ClashError: it isn't.
    """
    found: Over = "nothing"
    with contextlib.suppress(MissingError):
        _, found = client.head(name)
    if over not in ("anything", found):
        raise ClashError("there is something else")


def _tag_of(client: Client, requests: Requests, name: str, content: bytes) -> Tag | None:
    """The tag of an object, if that is its content."""
    try:
        found, tag = requests.run("read", name, lambda: client.get(name))
    except StorageError:
        return None
    except NotFoundError:
        return None
    return tag if found == content else None
