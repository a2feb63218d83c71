"""Which formats there are, and which of them a path is of."""

from __future__ import annotations

from gpuckpt.conversion.checkpoint import CHECKPOINT
from gpuckpt.conversion.dcp import DCP
from gpuckpt.conversion.fluid import FLUID
from gpuckpt.conversion.npz import NPZ
from gpuckpt.conversion.orbax import ORBAX
from gpuckpt.conversion.port import Format
from gpuckpt.conversion.safetensors import SAFETENSORS
from gpuckpt.conversion.singa import SINGA
from gpuckpt.conversion.torch_file import TORCH
from gpuckpt.errors import InvalidError

# The first that recognises a source, or suits a target's name, is taken: a directory that is
# of none of the others may be a new root.
FORMATS: tuple[Format, ...] = (
    SAFETENSORS,
    NPZ,
    DCP,
    ORBAX,
    SINGA,
    FLUID,
    TORCH,
    CHECKPOINT,
)


def source_format(at: str) -> Format:
    """The format of what is at a path or a URL.

    Raises:
        InvalidError: it is of none that is known.
    """
    for one in FORMATS:
        if one.recognises(at):
            return one
    raise InvalidError(
        f"{at}: there is nothing of a format that can be converted: {_names()}; "
        "give a root, or the file or directory itself"
    )


def target_format(at: str, to: str | None = None) -> Format:
    """The format of a target, by its name unless `to` says it.

    Raises:
        InvalidError: no format is called so.
    """
    for one in FORMATS:
        if one.name == to or (to is None and one.suits(at)):
            return one
    if to is not None:
        raise InvalidError(f"to is one of {_names()}; got {to!r}")
    raise InvalidError(f"{at}: its name doesn't tell a format; pass to= (--to), one of {_names()}")


def _names() -> str:
    return ", ".join(one.name for one in FORMATS)
