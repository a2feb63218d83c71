"""What formats that hold arrays by name, and nothing else, lose of a state."""

from __future__ import annotations

from collections.abc import Container

from gpuckpt.conversion.port import Outline, flat_structure
from gpuckpt.errors import UnsupportedError
from gpuckpt.names import plain_name
from gpuckpt.structure import walk_json


def lost_but_arrays(
    outline: Outline, *, kept: Container[str] = (), text: Container[str] = (), epoch: bool = False
) -> list[str]:
    """Sentences about everything but arrays by name.

    Of leaves and text, those `kept` and of `text` aren't lost; with `epoch`, neither is that.
    """
    lost = [f"{name}: a value, not an array" for name in outline.values if name not in kept]
    names = list(outline.tensors)
    if outline.aliases:
        pairs = ", ".join(f"{name} and {first}" for name, first in outline.aliases.items())
        lost.append(f"that names are of one array; each gets its own: {pairs}")
    elif not lost and outline.structure != flat_structure(names) and not kept:
        lost.append("how the state is nested: names are its paths, joined by dots")
    if outline.epoch is not None and not epoch:
        lost.append(f"the epoch, {outline.epoch}")
    if outline.metrics:
        lost.append(f"metrics: {', '.join(outline.metrics)}")
    others = [key for key in outline.metadata if key not in text]
    return [*lost, *([f"metadata: {', '.join(others)}"] if others else [])]


def lost_but_leaves(outline: Outline) -> list[str]:
    """Sentences about what formats lose that hold a state's leaves, each by itself."""
    lost = []
    if outline.aliases:
        pairs = ", ".join(f"{name} and {first}" for name, first in outline.aliases.items())
        lost.append(f"that names are of one array; each gets its own: {pairs}")
    if outline.step is not None or outline.epoch is not None or outline.metrics:
        lost.append("step, epoch and metrics")
    return [*lost, *([f"metadata: {', '.join(outline.metadata)}"] if outline.metadata else [])]


def check_dotted(outline: Outline, who: str) -> None:
    """See that no two leaves have one path once it is joined by dots, as `who` does.

    Raises:
        UnsupportedError: two have.
    """
    seen: dict[str, str] = {}
    for (path, _), name in zip(walk_json(outline.structure), outline.leaves, strict=True):
        flat = plain_name(path)
        if flat in seen:
            raise UnsupportedError(name, f"for {who} it is {flat}, and so is {seen[flat]}")
        seen[flat] = name


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8, and has no character that ends it early."""
    return "\0" not in name and not any("\ud800" <= one <= "\udfff" for one in name)
