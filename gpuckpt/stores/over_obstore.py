"""S3, Google Cloud Storage and Azure through obstore, which is Rust's object_store."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, urlsplit

from gpuckpt.errors import InvalidError
from gpuckpt.stores import Buffer, Bytes
from gpuckpt.stores.clients import (
    ClashError,
    MissingError,
    Over,
    PassingError,
    RefusedError,
    Tag,
    UnableError,
)
from gpuckpt.stores.retrying import Retries

if TYPE_CHECKING:
    from obstore.store import MemoryStore, ObjectStore

SCHEMES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "memory")
# Parts of one object that are being sent at the same time.
PARTS_IN_FLIGHT = 4
# Another try is worth it after these; no other answer that begins with a 4 changes by itself.
_PASSING = {408, 409, 425, 429}
_NOT_IMPLEMENTED = 501
_STATUS = re.compile(r"status(?: code)?:? (\d{3})")
_RANGE = re.compile(r"[Rr]ange (?:starting|was invalid|not satisfiable)|InvalidRange")
_XML = re.compile(r"(?s)<\?xml.*?<Code>(.*?)</Code>.*?<Message>(.*?)</Message>.*")
_PLAIN_HTTP = "if its URL begins with http://, allow that: AWS_ALLOW_HTTP=true, ?allow_http=true"
_MODES = {"anything": "overwrite", "nothing": "create"}
_SECRETS = re.compile(
    r"secret|password|token|sas|credential|access_?key|account_?key", re.IGNORECASE
)
# What a URL may say of the connection; all other options are the service's.
_OF_CONNECTIONS = {
    *("allow_http", "allow_invalid_certificates", "connect_timeout", "http1_only", "http2_only"),
    *("pool_idle_timeout", "pool_max_idle_per_host", "proxy_url", "read_timeout", "timeout"),
    "user_agent",
}


class ObstoreClient:
    """A `Client` through obstore."""

    whole = True

    def __init__(
        self, store: ObjectStore, prefix: str = "", *, many: ObjectStore | None = None
    ) -> None:
        """`store` shouldn't try again by itself; `many`, which sends parts, should."""
        self._store, self._many = store, many if many is not None else store
        self._prefix = "".join(f"{part}/" for part in prefix.split("/") if part)

    def put(self, name: str, data: Buffer, over: Over) -> Tag:
        """Put a whole object in one step."""
        import obstore

        mode = _MODES[over] if isinstance(over, str) else _known(over)
        with _told():
            put = obstore.put(self._store, self._at(name), data, mode=mode, use_multipart=False)
        return cast(Tag, put)

    def put_parts(self, name: str, parts: Iterator[Bytes]) -> None:
        """Put an object in parts, at most `PARTS_IN_FLIGHT` at a time; their memory is sent."""
        import obstore

        first = next(parts)
        with _told():
            obstore.put(
                *(self._many, self._at(name), _with(first, parts)),
                use_multipart=True,
                chunk_size=first.nbytes,
                max_concurrency=PARTS_IN_FLIGHT,
            )

    def get(self, name: str) -> tuple[bytes, Tag]:
        """A whole object."""
        import obstore

        with _told():
            found = obstore.get(self._store, self._at(name))
            return bytes(found.bytes()), _tag(found.meta)

    def get_range(self, name: str, offset: int, nbytes: int) -> Buffer:
        """Some bytes of an object."""
        import obstore

        with _told():
            found = obstore.get_range(self._store, self._at(name), start=offset, length=nbytes)
        return memoryview(found)

    def head(self, name: str) -> tuple[int, Tag]:
        """Bytes in an object, and its tag."""
        import obstore

        with _told():
            found = obstore.head(self._store, self._at(name))
        return found["size"], _tag(found)

    def list(self) -> dict[str, int]:
        """All objects directly below the prefix, from all pages."""
        import obstore

        with _told():
            found = obstore.list_with_delimiter(self._store, self._prefix or None)
        return {one["path"].rpartition("/")[2]: one["size"] for one in found["objects"]}

    def delete(self, name: str) -> None:
        """Delete an object."""
        import obstore

        with _told(), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, self._at(name))

    def _at(self, name: str) -> str:
        return self._prefix + name


def open_client(url: str, retries: Retries) -> ObstoreClient:
    """A client for a URL; what follows a `?` in it are options as obstore calls them.

    Raises:
        InvalidError: obstore isn't installed, or knows no such option, or it is a secret.
    """
    try:
        from obstore.store import from_url
    except ImportError as error:
        advice = "pip install 'gpuckpt[s3]' (or [gcs], [azure])"
        raise InvalidError(f"{url} needs obstore, which isn't installed: {advice}") from error
    parts = urlsplit(url)
    if parts.scheme == "memory":
        return ObstoreClient(_memory(), f"{parts.netloc}/{parts.path}")
    place = url.partition("?")[0]
    config, connection = _options(url)
    backoff = {
        "init_backoff": timedelta(seconds=retries.first_seconds),
        "max_backoff": timedelta(seconds=retries.most_seconds),
    }
    try:
        one, many = (
            from_url(
                place,
                config=config,
                client_options=connection or None,
                retry_config={"max_retries": tries, "backoff": backoff},
            )
            for tries in (0, retries.tries - 1)
        )
    except Exception as error:
        raise InvalidError(f"{place}: {_line(error)}") from error
    return ObstoreClient(one, many=many)


def _options(url: str) -> tuple[dict[str, str], dict[str, str]]:
    """A URL's options: those of the service, and those of the connection.

    Where there are any of the connection, obstore looks for none in the
    environment; but one that allows plain HTTP is taken from there all the same.

    Raises:
        InvalidError: one is a secret.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    secret = next((key for key in options if _SECRETS.search(key)), None)
    if secret is not None or parts.password:
        what = f"the option {secret}" if secret is not None else "a password"
        raise InvalidError(
            f"{parts.scheme}://{parts.hostname}: {what} doesn't belong into a URL, which logs and "
            "error messages show; give it by the environment or a file, as docs/STORES.md says"
        )
    connection = {key: options.pop(key) for key in list(options) if key in _OF_CONNECTIONS}
    for service in ("AWS", "AZURE", "GOOGLE") if connection else ():
        if allowed := os.environ.get(f"{service}_ALLOW_HTTP"):
            connection.setdefault("allow_http", allowed)
    return options, connection


@functools.cache
def _memory() -> MemoryStore:
    """The one memory that all `memory://` URLs of this process mean."""
    from obstore.store import MemoryStore

    return MemoryStore()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Translate obstore's errors, here and nowhere else."""
    from obstore import exceptions

    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(_line(error)) from error
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
        raise ClashError(_line(error)) from error
    except (NotImplementedError, exceptions.NotSupportedError) as error:
        raise UnableError(_line(error)) from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise RefusedError(
            f"{_line(error)}; see whether there are credentials, and whether they allow it"
        ) from error
    except exceptions.BaseError as error:
        status = _STATUS.search(str(error))
        code = int(status[1]) if status is not None else 0
        passing = code not in range(400, 500) or code in _PASSING
        kind = RefusedError if not passing or _RANGE.search(str(error)) else PassingError
        if code == _NOT_IMPLEMENTED:
            raise UnableError(_line(error)) from error
        if "HTTP error: builder error" in str(error):
            raise RefusedError(f"{_line(error)}; {_PLAIN_HTTP}") from error
        raise kind(_line(error)) from error
    except (OSError, ValueError) as error:
        raise RefusedError(_line(error)) from error


def _line(error: BaseException, most: int = 400) -> str:
    """What an error says first; obstore adds what is of use to its makers, services XML."""
    text = str(error).partition("\n\nDebug source")[0]
    text = _XML.sub(lambda found: f"{found[1]} ({found[2]})", text)
    return " ".join(text.split())[:most]


def _known(tag: Tag) -> dict[str, str]:
    return {key: value for key, value in tag.items() if value is not None}


def _tag(found: Any) -> Tag:
    return {"e_tag": found["e_tag"], "version": found["version"]}


def _with(first: Bytes, others: Iterator[Bytes]) -> Iterator[Bytes]:
    yield first
    yield from others
