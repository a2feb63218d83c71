"""What an adapter says where its framework isn't installed."""

from __future__ import annotations

from gpuckpt.errors import UnsupportedError


class MissingError(UnsupportedError, ImportError):  # type: ignore[misc]  # both have a name
    """A framework isn't installed; also an ImportError, for those who try imports."""


def missing(framework: str, error: ImportError) -> MissingError:
    """The error for an adapter whose framework can't be imported, for the reason `error`."""
    return MissingError(
        f"gpuckpt.adapters.{framework}",
        f"{framework} can't be imported ({error}); pip install 'gpuckpt[{framework}]'",
    )
