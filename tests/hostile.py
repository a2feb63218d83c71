"""Checkpoints that a stranger has changed, and everything that a reader does with one.

Changes are made below the checksums, which are then made to fit: what is tested
is not that damage is found, but that the parsers trust nothing.  `choose(n)` is
any source of numbers below n: hypothesis, a fuzzer, a generator.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from rich.console import Console

import gpuckpt
from gpuckpt import layout
from gpuckpt.cli.listing import list_steps
from gpuckpt.cli.showing import show_step
from gpuckpt.commit import steps, sweep
from gpuckpt.fingerprint import checksum, checksum128
from gpuckpt.resources import Resources
from gpuckpt.sources import open_source
from gpuckpt.stores.local import LocalStore
from gpuckpt.verify import verify_step

Choose = Callable[[int], int]
Files = dict[str, bytes]

GOLDEN = Path(__file__).parent / "golden"
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**53 + 1, 2**62, 2**63, 2**64, 10**4000),
    *(0.5, -0.0, 1e308, 5e-324, "", "a", "\ud800", "\0", "../../etc/passwd", "/dev/zero"),
    *("raw", "zstd", "sparse", "float32", "bfloat16", "U999999999", "V65536", "O", "M8[ns]"),
    *("cpu", "cuda:99999999999999999999", "numpy", "cupy", "torch", "os", "inf", "nan"),
    *([], {}, [[]], [None], [0, 0], {"tensor": 0}, {"value": {"bytes": "AA=="}}, {"dict": []}),
    *({"value": {"int": "0x" + "f" * 5000}}, {"object": {"list": []}}, {"tuple": [[[[]]]]}),
)
RAW_JSON = ('"HERE":0,"HERE":1', "NaN", "-Infinity", "1e999", "-1e999", "9" * 5000, "[" * 5000)


@dataclass(frozen=True, slots=True)
class Golden:
    """One golden root's files."""

    name: str
    files: Files


def golden_roots() -> list[Golden]:
    """Every golden checkpoint directory."""
    roots = sorted({path.parent for path in GOLDEN.glob("v1*/*/*.manifest.json")})
    return [Golden(root.name, {f.name: f.read_bytes() for f in root.iterdir()}) for root in roots]


def changed(files: Files, choose: Choose) -> Files:
    """The same files with a few changes in one of them, and checksums that fit."""
    name = sorted(files)[choose(len(files))]
    if layout.manifest_step(name) is not None:
        if choose(2) == 0:
            return change_chunk(files, name, choose)
        body = body_of(files[name])
        return files | {name: sealed_manifest(change(body, choose))}
    if layout.segment_step(name) is not None:
        return files | {name: change_segment(files[name], choose)}
    return files


def body_of(data: bytes) -> Any:
    """What a manifest's file says."""
    return json.loads(data[layout.MANIFEST_HEAD_NBYTES : -len(layout.MANIFEST_TAIL)])


def sealed_manifest(text: bytes) -> bytes:
    """A manifest's file with this text."""
    head = layout.MANIFEST_HEAD % (layout.VERSION, checksum128(text))
    return head.encode() + text + layout.MANIFEST_TAIL


def change_chunk(files: Files, name: str, choose: Choose) -> Files:
    """Other encoded bytes for one chunk that a manifest names; row and checksum fit them."""
    body = body_of(files[name])
    chunks = [chunk for tensor in body["tensors"] for chunk in tensor["chunks"]]
    rows = [link for chunk in chunks for link in links_of(chunk) if link[4]]
    if not rows:
        return files
    row = rows[choose(len(rows))]
    segment = body["segments"][row[2]]
    data, planes = files[segment], row[7]
    coded, made = data[row[3] : row[3] + row[4]], b""
    leaves = [leaf for plane in planes for leaf in (plane[2:] or [plane])]
    chosen = choose(len(leaves))
    for at, leaf in enumerate(leaves):
        part, coded = coded[: leaf[1]], coded[leaf[1] :]
        if at == chosen:
            part = _change_part(part, row[1] // len(planes), choose)
            leaf[:] = [("raw", "zstd", leaf[0], leaf[0])[choose(4)], len(part)]
        made += part
    for plane in planes:
        plane[1] = sum(leaf[1] for leaf in plane[2:]) if plane[2:] else plane[1]
    row[3], row[4], row[6] = len(data), len(made), checksum([made])
    return files | {segment: data + made, name: sealed_manifest(json.dumps(body).encode())}


def links_of(chunk: list[Any]) -> Iterator[list[Any]]:
    """A chunk's row, and those of its bases and sources."""
    yield chunk
    rows = chunk[9] if len(chunk) == 10 else [row for row in chunk[8:] if row != "turned"]
    for row in rows:
        yield from links_of(row)


def _change_part(part: bytes, nbytes: int, choose: Choose) -> bytes:
    how = choose(6)
    if how == 0 or not part:
        frames = odd_frames(nbytes)
        return frames[sorted(frames)[choose(len(frames))]]
    if how == 1:
        return part[: choose(len(part))]
    if how == 2:
        return part + part[choose(len(part)) :]
    changed = bytearray(part)
    for _ in range(1 + choose(3)):
        changed[choose(len(changed))] ^= 1 << choose(8)
    return bytes(changed)


def frame(
    claimed: int | None, made: int, *, window: int | None = None, dictionary: bool = False
) -> bytes:
    """A zstd frame that claims a size and a window, and decodes to `made` zeros.

    `window` is the byte that stands for it; without one the claim is the window.
    """
    single = window is None
    flags = (0 if claimed is None else 3) << 6 | single << 5 | dictionary
    head = b"\x28\xb5\x2f\xfd" + bytes([flags])
    head += b"" if window is None else bytes([window])
    head += b"\1" if dictionary else b""
    head += b"" if claimed is None else claimed.to_bytes(8, "little")
    sizes = [128 << 10] * (made >> 17) + [made & 0x1FFFF]
    blocks = [(at == len(sizes) - 1) | 1 << 1 | size << 3 for at, size in enumerate(sizes)]
    return head + b"".join(block.to_bytes(3, "little") + b"\0" for block in blocks)


def odd_frames(nbytes: int) -> Files:
    """Frames that no writer makes of a plane of `nbytes` zeros, by what is odd about them."""
    whole = frame(nbytes, nbytes)
    skippable = b"\x50\x2a\x4d\x18\4\0\0\0gone"
    return {
        "a claim of 2**63 bytes": frame(2**63, nbytes),
        "a claim of one byte more": frame(nbytes + 1, nbytes + 1),
        "no claim": frame(None, nbytes, window=0x38),
        "less than it claims": frame(nbytes, nbytes - 1),
        "more than it claims": frame(nbytes, nbytes + 1),
        "much more than it claims": frame(nbytes, 16 << 20),
        "a window of 2 GiB": frame(nbytes, nbytes, window=0xA8),
        "the largest window": frame(nbytes, nbytes, window=0xFF),
        "a dictionary": frame(nbytes, nbytes, dictionary=True),
        "skippable": skippable,
        "skippable, then whole": skippable + whole,
        "two frames, together as long": frame(nbytes // 2, nbytes // 2) * 2,
        "two whole frames": whole * 2,
        "whole, then anything": whole + b"anything",
        "the magic alone": whole[:4],
        "nothing": b"",
    }


def change_segment(data: bytes, choose: Choose) -> bytes:
    """A segment with another index, or other bytes of chunks."""
    end = len(data) - layout.TRAILER.size
    trailer = layout.unpack_trailer(data[end:], "a golden segment")
    if choose(4) == 0:
        flipped = bytearray(data)
        flipped[choose(len(data))] ^= 1 << choose(8)
        return bytes(flipped)
    body = json.loads(zstandard.decompress(data[trailer.offset : end]))
    return sealed_segment(data[: trailer.offset], change(body, choose))


def sealed_segment(chunks: bytes, text: bytes) -> bytes:
    """A segment of these chunks (with the header) and an index of this text."""
    packed = zstandard.compress(text)
    digest = bytes.fromhex(checksum128(packed))
    trailer = layout.SegmentTrailer(len(chunks), len(packed), len(text), digest)
    return chunks + packed + layout.pack_trailer(trailer)


def change(body: Any, choose: Choose) -> bytes:
    """JSON with some of its nodes replaced, dropped, doubled or swapped; as text."""
    body = copy.deepcopy(body)
    for _ in range(1 + choose(3)):
        _change_node(body, choose)
    text = json.dumps(body)
    if choose(8) == 0:
        what = RAW_JSON[choose(len(RAW_JSON))]
        at = choose(len(text))
        text = text[:at] + what + text[at + choose(9) :]
    return text.encode("utf-8", "surrogatepass")


def _change_node(body: Any, choose: Choose) -> None:
    places = list(_places(body))
    if not places:
        return
    node, key = places[choose(len(places))]
    how = choose(6)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif how == 2:
        other, place = places[choose(len(places))]
        node[key] = copy.deepcopy(other[place])
    elif how == 3 and type(node[key]) is int:
        node[key] += (-1, 1, 2 ** choose(70), -(2 ** choose(70)))[choose(4)]
    else:
        node[key] = copy.deepcopy(ODD[choose(len(ODD))])


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    keys = (
        list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    )
    for key in keys:
        yield node, key
        yield from _places(node[key])


def write(root: Path, files: Files) -> None:
    """The files of a root, and no others."""
    root.mkdir(exist_ok=True)
    for path in root.iterdir():
        path.unlink()
    for name, data in files.items():
        (root / name).write_bytes(data)


def use(root: Path) -> int:
    """Do with a root all that a reader can, and sweep it; how many times it was refused.

    Raises whatever isn't a `CheckpointError`.
    """
    console, refused = Console(file=io.StringIO()), 0
    store, resources = LocalStore(root), Resources("64 MiB")
    every: list[Callable[[], object]] = [
        lambda: gpuckpt.load(root, device="cpu", like="numpy", memory="64 MiB"),
        lambda: gpuckpt.load(root, names="*", device="cpu", like="numpy", memory="64 MiB"),
        lambda: gpuckpt.load(root, memory="64 MiB"),
        lambda: list_steps(root, console, as_json=False),
        lambda: show_step(root, None, None, console, as_json=False),
        lambda: list_steps(root, console, as_json=True),
        lambda: show_step(root, None, None, console, as_json=True),
    ]
    for step in steps(store):
        every.append(lambda step=step: verify_step(store, step, resources))  # type: ignore[misc]
    for path in sorted(root.glob("*.segment")):
        every.append(lambda path=path: gpuckpt.load(path, device="cpu", like="numpy"))  # type: ignore[misc]
        every.append(lambda path=path: open_source(path))  # type: ignore[misc]
    every.append(lambda: gpuckpt.warm_start({"w": np.zeros(3, "float32")}, root, memory="64 MiB"))
    every.append(lambda: sweep(store))
    for one in every:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                one()
        except gpuckpt.CheckpointError:
            refused += 1
    return refused
