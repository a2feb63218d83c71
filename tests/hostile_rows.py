"""Files of a stranger, one by one: each with checksums that fit, and one thing that no writer does.

`python -m tests.hostile_rows` reads all of them, in one process, and prints how
many bytes of memory that took beside what Python had before.
"""

from __future__ import annotations

import json
import math
import resource
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

import gpuckpt
from gpuckpt import layout
from gpuckpt.fingerprint import checksum, checksum128
from tests import hostile
from tests.hostile import Files

NBYTES = 16 << 10
Change = Callable[[Any], object]


def base() -> Files:
    """A checkpoint of one chunk, one frame, and one plain value."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        gpuckpt.save(name, {"w": np.zeros(NBYTES, np.uint8), "lr": 0.5}, codec="zstd")
        return {f.name: f.read_bytes() for f in Path(name).iterdir()}


def rows() -> dict[str, Files]:
    """Every row, by what is odd about it; a reader refuses to load any."""
    files = base()
    found = {name: changed(files, change) for name, change in {**FIELDS, **CHUNKS}.items()}
    found |= {f"a frame: {what}": framed(files, data) for what, data in FRAMES.items()}
    found |= {f"text: {what}": texted(files, text) for what, text in TEXTS.items()}
    return found


def index_rows() -> dict[str, Files]:
    """Segments whose own index is odd; a reader refuses to load the segment alone."""
    files = base()
    (name,) = [one for one in files if layout.segment_step(one) is not None]
    data = files[name]
    end = len(data) - layout.TRAILER.size
    trailer = layout.unpack_trailer(data[end:], name)
    body = json.loads(zstandard.decompress(data[trailer.offset : end]))
    chunks, packed = data[: trailer.offset], data[trailer.offset : end]
    texts = {what: json.dumps(body | change).encode() for what, change in INDICES.items()}
    texts |= {"deep": b"[" * (8 << 20), "wide": b"[" + b"0," * (1 << 20) + b"0]"}
    found = {what: files | {name: hostile.sealed_segment(chunks, t)} for what, t in texts.items()}
    for what, (at, nbytes, raw) in {
        "an index behind the end": (len(data), len(packed), trailer.raw_length),
        "an index of 2**63 bytes": (trailer.offset, len(packed), 2**63),
        "an index that decodes to less": (trailer.offset, len(packed), trailer.raw_length + 1),
        "an index of no bytes": (end, 0, 0),
    }.items():
        digest = bytes.fromhex(checksum128(data[at : at + nbytes]))
        odd = layout.pack_trailer(layout.SegmentTrailer(at, nbytes, raw, digest))
        found[what] = files | {name: data[:end] + odd}
    return found


def changed(files: Files, change: Change) -> Files:
    """The files, their manifest's body changed in place."""
    name = manifest_of(files)
    body = hostile.body_of(files[name])
    change(body)
    return files | {name: hostile.sealed_manifest(json.dumps(body).encode())}


def framed(files: Files, data: bytes) -> Files:
    """The files, with other bytes for the one chunk, as a zstd frame."""
    name = manifest_of(files)
    body = hostile.body_of(files[name])
    (row,), (segment,) = body["tensors"][0]["chunks"], body["segments"]
    row[3], row[4], row[6] = len(files[segment]), len(data), checksum([data])
    row[7] = [["zstd", len(data)]]
    text = json.dumps(body).encode()
    return files | {segment: files[segment] + data, name: hostile.sealed_manifest(text)}


def texted(files: Files, text: bytes) -> Files:
    """The files, with this text in the place of the manifest's body, `{` and all behind it."""
    name = manifest_of(files)
    old = files[name][layout.MANIFEST_HEAD_NBYTES : -len(layout.MANIFEST_TAIL)]
    return files | {name: hostile.sealed_manifest(text + old[1:])}


def manifest_of(files: Files) -> str:
    (name,) = [one for one in files if layout.manifest_step(one) is not None]
    return name


def _tensor(**fields: Any) -> Change:
    return lambda body: body["tensors"][0].update(fields)


def _body(**fields: Any) -> Change:
    return lambda body: body.update(fields)


def _chunk(at: int, value: Any) -> Change:
    return lambda body: body["tensors"][0]["chunks"][0].__setitem__(at, value)


def _chained(count: int) -> Change:
    """A chunk with so many bases, each itself."""

    def change(body: Any) -> None:
        row = body["tensors"][0]["chunks"][0]
        inner = list(row)
        for _ in range(count):
            inner = [*row, inner]
        body["tensors"][0]["chunks"] = [inner]
        body["requires"] = ["delta"]

    return change


def _tiled(shape: list[int], nbytes: int, tiles: list[list[int]]) -> Change:
    """A tensor of `shape` and its raw chunk of `nbytes`, in tiles that end so."""

    def change(body: Any) -> None:
        (tensor,) = body["tensors"]
        row = tensor["chunks"][0]
        length = nbytes + 8 * math.prod(map(len, tiles))
        about = {"tiles": tiles, "turned": False}
        tensor["chunks"] = [[0, nbytes, *row[2:4], length, *row[5:7], [["raw", nbytes]], about]]
        tensor["shape"] = shape
        body["requires"] = ["tiles"]

    return change


def _deep(count: int) -> Any:
    node: Any = {"value": 0}
    for _ in range(count):
        node = {"list": [node]}
    return node


ODD_CHECKS: tuple[Any, ...] = ("", "0" * 16, "0" * 32, 7, None)
ODD_PLANES: tuple[Any, ...] = (
    *([], [["zstd", 0]] * 2, [["lzma", 9]], [["raw", 9]], [["zstd", -1]], [["zstd"]]),
    *(None, "ab", {}, [[None, 9]], [["zstd", 9, ["raw", 9]]]),
)
ODD_REQUIRES: tuple[Any, ...] = ("delta", ["magic"], {}, None, [[]])
ODD_METRICS: tuple[Any, ...] = ([], {"a": "b"}, {"a": None}, {"a": []})
ODD_SEGMENTS: tuple[Any, ...] = (
    *(["../lock"], ["/etc/passwd"], ["lock"], [".."], [None], [], {}, None),
)
ODD_SHAPES: tuple[Any, ...] = (
    *([-1], [2**63], [2**40, 2**40], [NBYTES + 1], [0.5], "ab", [1] * 65, [True]),
)
FRAMES = hostile.odd_frames(NBYTES)
TEXTS = {
    "a field twice": b'{"step":0,',
    "NaN": b'{"more":NaN,',
    "infinity": b'{"more":[-Infinity],',
    "5000 digits": b'{"more":' + b"9" * 5000 + b",",
    "deep": b'{"more":' + b"[" * (8 << 20),
    "deep objects": b'{"more":' + b'{"a":' * (1 << 20),
    "not ASCII": b'{"more":"\xff",',
    "nothing": b"",
}
FIELDS: dict[str, Change] = {
    **{f"step {step!r}": _body(step=step) for step in (True, -1, 1, 0.0, "0", 10**12, None)},
    **{f"created {at!r}": _body(created=at) for at in (1e300, -1, True, "nan", "inf", None)},
    **{f"epoch {at!r}": _body(epoch=at) for at in (0.5, True, "1")},
    **{f"requires {at!r}": _body(requires=at) for at in ODD_REQUIRES},
    **{f"segments {at!r}": _body(segments=at) for at in ODD_SEGMENTS},
    **{f"metrics {at!r}": _body(metrics=at) for at in ODD_METRICS},
    **{f"shape {str(at)[:20]}": _tensor(shape=at) for at in ODD_SHAPES},
    **{
        f"dtype {at}": _tensor(dtype=at)
        for at in ("O", "U99999", "V0", "float32", "M8[ns]", "(2)u1", "u1,u1", "uint8 ", 7, "")
    },
    **{f"axes {at}": _tensor(axes=at) for at in ([1], [0, 0], [-1], "0", [0.0])},
    **{
        f"statistics {at}": _tensor(statistics=at) for at in ([0], [-1, 0, 0], [0, 0, -1], [2, 2e9])
    },
    **{f"{at} of no text": _tensor(**{at: 7}) for at in ("name", "kind", "device")},
    "a version that isn't a count": _tensor(version=-1),
    "no chunks": _tensor(chunks=[]),
    "no list of chunks": _tensor(chunks=7),
    "a tensor twice": lambda body: body["tensors"].append(body["tensors"][0]),
    "a node of no tensor": _body(structure={"tensor": 1}),
    "a node of tensor -1": _body(structure={"tensor": -1}),
    "a node of two kinds": _body(structure={"tensor": 0, "value": 0}),
    "an unknown node": _body(structure={"class": "os.system"}),
    "nodes that are deep": _body(structure=_deep(450)),
    "a key that is a list": _body(structure={"dict": [[[], {"value": 0}]]}),
    "a key twice": _body(structure={"dict": [[1, {"value": 0}], [True, {"value": 0}]]}),
    "an unknown value": _body(structure={"value": {"pickle": "gASVAAAA"}}),
    "a scalar of objects": _body(structure={"value": {"scalar": ["O", "AAAAAAAAAAA="]}}),
    "a scalar too short": _body(structure={"value": {"scalar": ["int64", "AAAA"]}}),
}
CHUNKS: dict[str, Change] = {
    **{f"start {at!r}": _chunk(0, at) for at in (1, -1, 2**63, True, 0.0, None)},
    **{f"length {at!r}": _chunk(1, at) for at in (0, NBYTES - 1, NBYTES + 1, 2**31, -1, True)},
    **{f"segment {at!r}": _chunk(2, at) for at in (1, -1, True, 2**64, "0")},
    **{f"offset {at!r}": _chunk(3, at) for at in (-1, 2**40, 2**63 - 1, 2**63, 1.0, False)},
    **{f"encoded length {at!r}": _chunk(4, at) for at in (0, 2**40, -1, 2**64)},
    **{f"fingerprint {str(at)[:9]!r}": _chunk(5, at) for at in ODD_CHECKS},
    **{f"checksum {str(at)[:9]!r}": _chunk(6, at) for at in ODD_CHECKS},
    **{f"planes {at!r}": _chunk(7, at) for at in ODD_PLANES},
    "a sparse plane of itself": _chunk(7, [["sparse", 9, ["sparse", 4], ["raw", 5]]]),
    "a sparse plane of three": _chunk(7, [["sparse", 9, ["raw", 4], ["raw", 5], ["raw", 0]]]),
    "turned, and one plane": lambda body: body["tensors"][0]["chunks"][0].append("turned"),
    "sources of uint8": lambda body: body["tensors"][0]["chunks"][0].extend([None, [[]]]),
    "tiles of a tensor without elements": _tiled([5, 0], 1, [[1], [1]]),
    "an index of tiles of 128 MiB": _tiled([4096] * 2, 1 << 24, [[*range(1, 4097)]] * 2),
    "65 bases": _chained(65),
    "900 bases": _chained(900),
}
INDICES: dict[str, dict[str, Any]] = {
    "requires magic": {"requires": ["magic"]},
    "a base's path": {"bases": ["../../etc/passwd"]},
    "no step": {"step": None},
    "no tensors": {"tensors": None},
    "a tensor of no chunks' place": {"tensors": [7]},
}


def main() -> None:
    """Read every row, and print the peak."""
    warnings.simplefilter("ignore")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        for files in [*rows().values(), *index_rows().values()]:
            hostile.write(Path(name) / "root", files)
            hostile.use(Path(name) / "root")
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)


if __name__ == "__main__":
    main()
