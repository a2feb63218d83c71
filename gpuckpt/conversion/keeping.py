"""What formats of flat arrays can't hold, kept in a text beside them: for gpuckpt to read back.

`{"structure": …, "tensors": [names], "step": …, "epoch": …, "metrics": {…}, "metadata": {…}}`:
the structure as in a manifest, whose tensors are positions in the list of names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gpuckpt.conversion.port import Outline, flat_structure
from gpuckpt.errors import FormatError
from gpuckpt.manifest import NOT_AS_EXPECTED
from gpuckpt.spec import Spec
from gpuckpt.structure import numbered
from gpuckpt.tensors import as_number
from gpuckpt.values import Json, encode_value, parse_json

KEY = "gpuckpt"
_NOT_OURS = (
    "a structure that gpuckpt had noted, which doesn't fit the tensors any more; they are a flat "
    "dict now"
)


def pack_kept(outline: Outline, *, always: bool = False) -> str | None:
    """The text; None where flat arrays hold all there is, unless it is asked for `always`."""
    counts = outline.step, outline.epoch
    if outline.is_flat and counts == (None, None) and not outline.metrics and not always:
        return None
    body = {
        "structure": outline.structure,
        "tensors": [spec.name for spec in outline.specs],
        "step": outline.step,
        "epoch": outline.epoch,
        "metrics": {name: as_number(value) for name, value in outline.metrics.items()},
        "metadata": dict(outline.metadata),
    }
    return json.dumps(body, separators=(",", ":"))


def unpack_kept(
    text: str | None,
    specs: Sequence[Spec],
    metadata: Mapping[str, str],
    aliases: Mapping[str, str],
) -> Outline:
    """The outline that a text was made of, of tensors in any order: undoes `pack_kept`.

    Without a text, or with one that doesn't fit the tensors, they are a flat
    dict; `aliases` are then further names of some, each with the name of the tensor.
    """
    positions = {spec.name: at for at, spec in enumerate(specs)}
    plain = Outline(_flat(positions, aliases), tuple(specs), metadata=metadata)
    if text is None:
        return plain
    try:
        return _unpacked(parse_json(text.encode()), positions, plain)
    except (*NOT_AS_EXPECTED, FormatError):
        return replace(plain, left_out=(_NOT_OURS,))


def _flat(positions: Mapping[str, int], aliases: Mapping[str, str]) -> Json:
    rows = flat_structure(list(positions))["dict"]
    further = [[encode_value(name), {"tensor": positions[a]}] for name, a in aliases.items()]
    return {"dict": [*rows, *further]}


def _unpacked(body: Json, positions: Mapping[str, int], plain: Outline) -> Outline:
    names = body["tensors"]
    found = replace(
        plain,
        structure=numbered(body["structure"], {at: positions[n] for at, n in enumerate(names)}),
        step=_count(body["step"]),
        epoch=_count(body["epoch"]),
        metrics={str(name): float(value) for name, value in body["metrics"].items()},
        metadata={str(key): str(value) for key, value in body["metadata"].items()},
    )
    if set(found.tensors.values()) != set(positions.values()):
        raise ValueError("a structure of other tensors")
    return found.named()


def _count(value: Json) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{value!r} isn't a count")
    return value
