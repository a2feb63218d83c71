"""A reader of format 1, written from docs/FORMAT.md alone; sections are that page's."""

import base64
import hashlib
import hmac
import itertools
import json
import math
import re
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
import zstandard

HEAD = re.compile(rb'\{"gpuckpt":1,"checksum":"([0-9a-f]{32})","manifest":')
MANIFEST = re.compile(r"step-([0-9]{12})\.manifest\.json")
SEGMENT = re.compile(r"step-([0-9]{12})\.([0-9a-f]{8})\.r([0-9]{1,6})\.([0-9]{1,6})\.segment")
PART = re.compile(r"step-([0-9]{12})\.([0-9a-f]{8})\.r([0-9]{1,6})\.part\.json")
FEATURES = {"delta", "sparse", "turned", "derived", "shards", "ranks", "parts", "tiles"}
DTYPE = re.compile(
    r">?(bool|u?int(2|4|8|16|32|64)|b?float(16|32|64|128)|complex(64|128|256)|[SUV][1-9][0-9]*"
    r"|float[468]_e\dm\d\w*|(datetime|timedelta)64(\[[0-9]*(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)"
)


def read(root: Path, step: int | None = None, key: bytes | None = None) -> Any:
    """The state of a root's newest step, or of the one asked for (sections 13 and 19)."""
    found = {
        int(name[1]): file for file in root.iterdir() if (name := MANIFEST.fullmatch(file.name))
    }
    step = max(found) if step is None else step
    body = body_of(found[step].read_bytes(), step, key)
    check("rank" not in body, "a part in the place of a manifest")
    if "parts" in body:
        check(not body["tensors"] and len(body["parts"]) == body["ranks"], "parts")
        every = [part_of(root, body, rank, key) for rank in range(body["ranks"])]
    else:
        every = [body]
    rows: list[tuple[dict[str, Any], list[Path]]] = []
    structures = []
    for one in every:
        files = [root / name for name in one["segments"]]
        check_digests(one, files, key)
        structures.append(renumbered(one["structure"], len(rows), one.get("rank")))
        rows += [(row, files) for row in one["tensors"]]
    tensors = wholes(rows)
    return build(joined(structures, tensors), tensors)


def body_of(data: bytes, step: int, key: bytes | None) -> dict[str, Any]:
    """A manifest's or a part's body, checked (section 9)."""
    head, text = HEAD.match(data), data[70:-2]
    check(head is not None and data.endswith(b"}\n"), "head and tail")
    check(head is not None and head[1].decode() == xxhash.xxh3_128_hexdigest(text), "the body")
    check_seal(text, b"gpuckpt 1 manifest\0", key)
    body: dict[str, Any] = json.loads(text)
    check(
        FEATURES.issuperset(body["requires"])
        and body["step"] == step
        and all(map(SEGMENT.fullmatch, body["segments"])),
        "step, segments",
    )
    return body


def part_of(root: Path, body: dict[str, Any], rank: int, key: bytes | None) -> dict[str, Any]:
    """What a rank contributes (section 9)."""
    name, length, digest, _, _ = body["parts"][rank]
    match = PART.fullmatch(name)
    check(match is not None and (int(match[1]), int(match[3])) == (body["step"], rank), "a name")
    data = (root / name).read_bytes()
    check(len(data) == length and xxhash.xxh3_128_hexdigest(data) == digest, f"the part {name}")
    part = body_of(data, body["step"], key)
    check((part["ranks"], part["rank"]) == (body["ranks"], rank), "whose part it is")
    return part


def renumbered(node: dict[str, Any], first: int, rank: int | None) -> dict[str, Any]:
    """A part's structure, its tensors counted from `first`, what is its rank's own marked."""
    ((kind, inside),) = node.items()
    if kind in {"value", "tensor"}:
        return {kind: inside + first} if kind == "tensor" else node
    if kind == "dict":
        return {kind: [[key, renumbered(child, first, rank)] for key, child in inside]}
    if kind == "rank":
        return {"ranks": [[rank, renumbered(inside, first, rank)]]}
    if kind == "object":
        return {kind: renumbered(inside, first, rank)}
    if kind == "ranks":
        return {kind: [[one, renumbered(child, first, rank)] for one, child in inside]}
    return {kind: [renumbered(child, first, rank) for child in inside]}


def joined(structures: list[dict[str, Any]], tensors: list[np.ndarray]) -> dict[str, Any]:
    """The ranks' structures as one (section 9)."""
    whole, *others = structures
    for other in others:
        whole = join(whole, other, tensors)
    return whole


def join(one: dict[str, Any], other: dict[str, Any], tensors: list[np.ndarray]) -> dict[str, Any]:
    """What is in one place on two ranks."""
    ((kind, a),), ((again, b),) = one.items(), other.items()
    check(kind == again, "what ranks have in one place")
    if kind == "dict":
        found = {json.dumps(key): [key, child] for key, child in a}
        for key, child in b:
            known = found.get(json.dumps(key))
            both = child if known is None else join(known[1], child, tensors)
            found[json.dumps(key)] = [key, both]
        return {kind: list(found.values())}
    if kind == "ranks":
        return {kind: a + b}
    if kind == "object":
        return {kind: join(a, b, tensors)}
    if kind in {"list", "tuple"}:
        return {kind: [join(*pair, tensors) for pair in zip(a, b, strict=True)]}
    check(tensors[a] is tensors[b] if kind == "tensor" else a == b, "one tensor, or one value")
    return one


def wholes(rows: list[tuple[dict[str, Any], list[Path]]]) -> list[np.ndarray]:
    """Each row's tensor: of shards, all of it (section 9)."""
    found: dict[tuple[str, int | None], tuple[np.ndarray, np.ndarray]] = {}
    own = [(row["name"], row.get("rank")) for row, _ in rows]
    for name, (row, files) in zip(own, rows, strict=True):
        shape, array = tuple(row.get("whole", row["shape"])), tensor(row, files)
        if "offset" not in row:
            found[name] = array, np.ones(shape, bool)
            continue
        whole, held = found.setdefault(name, (np.empty(shape, array.dtype), np.zeros(shape, bool)))
        check((whole.shape, whole.dtype) == (shape, array.dtype), f"{name}: shards of one tensor")
        box = tuple(slice(a, a + n) for a, n in zip(row["offset"], row["shape"], strict=True))
        check(whole[box].shape == array.shape, f"{name}: a box in it")
        whole[box], held[box] = array, True
    check(all(held.all() for _, held in found.values()), "shards fill their tensors")
    return [found[name][0] for name in own]


def read_segment(file: Path, key: bytes | None = None) -> dict[str, Any]:
    """The tensors that lie whole in one segment, by name (section 14)."""
    data = file.read_bytes()
    magic, version = struct.unpack("<8sI52x", data[:64])
    at, length, raw_length, digest, again, end = struct.unpack("<QQQ16sI12x8s", data[-64:])
    check(magic == end == b"gpuckpt\0" and version == again == 1, "magic and version")
    check(at + length == len(data) - 64 and raw_length <= 2**28, "the trailer")
    packed = data[at : at + length]
    check(xxhash.xxh3_128_digest(packed) == digest, "the index")
    text = plane(["zstd", length], packed, raw_length)
    check_seal(text, b"gpuckpt 1 index\0", key)
    index = json.loads(text)
    check(key is None or index["segment"] == file.name, "its name")
    rows, bases = index["tensors"], index.get("bases", [])
    check(FEATURES.issuperset(index.get("requires", [])), "features")
    check(all(map(SEGMENT.fullmatch, bases)), "bases")
    check(all(c[2] == 0 for row in rows for c in row["chunks"]), "chunks of this file")
    check_digests(index, [file, *map(file.with_name, bases)], key)
    rows = [row for row in rows if sum(c[1] for c in row["chunks"]) == size(row)]
    return {row["name"]: tensor(row, [file, *map(file.with_name, bases)]) for row in rows}


def check_seal(text: bytes, kind: bytes, key: bytes | None) -> None:
    """See that a text's last field is its seal (section 19)."""
    if key is not None:
        seal = hmac.new(key, kind + text[:-75], "sha256").hexdigest()
        check(text[-75:] == b',"seal":"%s"}' % seal.encode(), "the seal")


def check_digests(body: dict[str, Any], files: list[Path], key: bytes | None) -> None:
    """See that every part of a file that a row names is as it was sealed (section 19)."""
    if key is None:
        return
    for segment, offset, length, digest in body["digests"]:
        data = files[segment].read_bytes()[offset : offset + length]
        check(hashlib.sha256(data).hexdigest() == digest, f"a digest in {files[segment]}")
    listed = {tuple(row[:3]) for row in body["digests"]}
    chunks = [chunk for row in body["tensors"] for chunk in row["chunks"]]
    check(listed.issuperset(part for chunk in chunks for part in parts_of(chunk)), "the digests")


def parts_of(chunk: list[Any]) -> list[tuple[int, int, int]]:
    """What of which files is read for a chunk."""
    rows = chunk[9] if len(chunk) == 10 else [row for row in chunk[8:] if isinstance(row, list)]
    own = [(chunk[2], chunk[3], chunk[4])] if chunk[4] else []
    return own + [part for row in rows for part in parts_of(row)]


def tensor(row: dict[str, Any], files: list[Path]) -> np.ndarray:
    """One tensor's elements, each chunk checked (sections 9 and 13)."""
    raw = bytearray()
    for chunk in row["chunks"]:
        check(chunk[0] == len(raw), "a chunk's place")
        if len(chunk) == 10:
            raw += derived(chunk, row["dtype"], files)
        else:
            raw += raw_of(chunk, width(row["dtype"]), files, dtype(row["dtype"]).itemsize)
    check(len(raw) == size(row), f"{row['name']}: its size")
    array = np.frombuffer(raw, dtype(row["dtype"])).reshape(row["shape"])
    axes = row["axes"] or list(range(array.ndim))
    return np.array(array.transpose(axes), order="C").transpose(np.argsort(axes))


def derived(chunk: list[Any], name: str, files: list[Path]) -> bytes:
    """The raw bytes of a chunk that is others rounded (section 7)."""
    start, nbytes, _, _, length, fingerprint, _, planes, base, sources = chunk
    check(name in {"bfloat16", "float16"} and not length and not planes and base is None, "a row")
    bits = b""
    for source in sources:
        check(len(source) in {8, 9} and source[0] == 2 * start + len(bits), "a source's place")
        bits += raw_of(source, 4, files, 4)
    check(len(bits) == 2 * nbytes, "the sources' length")
    raw = b"".join(struct.pack("<H", rounded(b, name)) for (b,) in struct.iter_unpack("<I", bits))
    check(fingerprint_of(raw) == fingerprint, "a fingerprint of what was rounded")
    return raw


def rounded(bits: int, name: str) -> int:
    """The bits of the nearest narrow value (section 7), by exact fractions."""
    sign, x = bits >> 31 << 15, bits & 0x7FFFFFFF
    fraction, least, top = (7, -133, 0x7F80) if name == "bfloat16" else (10, -24, 0x7C00)
    if x > 0x7F800000:
        return sign | (0x7FC0 if name == "bfloat16" else 0x7E00 | x >> 13 & 0x3FF)
    if x == 0x7F800000:
        return sign | top
    e = max(x >> 23, 1)
    whole = (x & 0x7FFFFF) | (0x800000 if x >> 23 else 0)  # times 2 ** (e - 150)
    unit = max(e - 127 - fraction, least)  # the narrow values near it are multiples of 2 ** unit
    count = round(Fraction(whole) * Fraction(2) ** (e - 150 - unit))  # a tie to the even one
    return sign | min(count + ((unit - least) << fraction), top)


def raw_of(chunk: list[Any], width: int, files: list[Path], item: int, bases: int = 64) -> bytes:
    """A chunk's raw bytes, read with those of its bases (sections 7 and 9)."""
    start, nbytes, segment, offset, length, fingerprint, checksum, planes, *base = chunk
    with files[segment].open("rb") as file:
        file.seek(offset)
        coded = file.read(length)
    check(xxhash.xxh3_64_hexdigest(coded) == checksum, f"a checksum in {files[segment]}")
    tiles = base[0]["tiles"] if base and isinstance(base[0], dict) else []
    turned = base[0]["turned"] if tiles else base == ["turned"]
    check(type(turned) is bool, "turned, or not")
    base = [] if turned or tiles else base
    index = coded[sum(plane[1] for plane in planes) :] if tiles else b""
    coded = coded[: length - len(index)]
    one = set() if base or turned else {1}
    check(len(planes) in {width} | one and not (turned and width == 1), "a number of planes")
    check(
        sum(plane[1] for plane in planes) == len(coded) == length - len(index),
        "planes fill their extent",
    )
    ends = np.cumsum([plane[1] for plane in planes])
    parts = [
        plane(row, coded[end - row[1] : end], nbytes // len(planes))
        for row, end in zip(planes, ends, strict=True)
    ]
    raw = np.frombuffer(b"".join(parts), "u1").reshape(len(planes), -1).T.tobytes()
    if turned:
        t = np.frombuffer(raw, f"<u{width}")
        raw = (t >> 1 | t << 8 * width - 1).tobytes()
    if tiles:
        sizes, raw = untiled(tiles, raw, item)
        check_index(index, planes, parts, sizes, fingerprint)
    if base:
        check(len(base) == 1 and bases > 0 and base[0][:2] == [start, nbytes], "a base")
        before = np.frombuffer(raw_of(base[0], width, files, item, bases - 1), f"<u{width}")
        z = np.frombuffer(raw, f"<u{width}")
        raw = (before + (z >> 1 ^ -(z & 1))).tobytes()
    check(fingerprint_of(raw) == fingerprint, f"a fingerprint in {files[segment]}")
    return raw


def untiled(ends: list[list[int]], raw: bytes, item: int) -> tuple[list[int], bytes]:
    """The elements of each tile, and of all of them the bytes in C order (section 7)."""
    check(math.prod(axis[-1] for axis in ends) * item == len(raw), "tiles")
    whole = np.empty([*(axis[-1] for axis in ends), item], "u1")
    spans = [[slice(a, b) for a, b in zip([0, *axis], axis, strict=False)] for axis in ends]
    sizes, at = [], 0
    for box in itertools.product(*reversed(spans)):
        room = whole[tuple(reversed(box))]
        room[...] = np.frombuffer(raw[at : at + room.size], "u1").reshape(room.shape)
        sizes.append(room.size // item)
        at += room.size
    check(at == len(raw) and max(sizes) * item <= 65536, "tiles")
    return sizes, whole.tobytes()


def check_index(
    index: bytes, planes: list[Any], parts: list[bytes], sizes: list[int], fingerprint: str
) -> None:
    """See that each tile can be read alone (section 7)."""
    coded = sum(row[0] == "blocks" for row in planes)
    check(len(index) == 4 * coded + len(sizes) * (8 + 4 * coded), "an index of tiles")
    check(len(index) <= max(sum(map(len, parts)), 65536), "an index of tiles")
    for tile, end in enumerate(np.cumsum(sizes).tolist()):
        wanted = int(fingerprint[:16], 16)
        for k, part in enumerate(parts):
            each = len(part) // sum(sizes)
            some = part[(end - sizes[tile]) * each : end * each]
            digest = xxhash.xxh3_128_digest(some + bytes(-len(some) % 256))
            wanted += (2 * k + 1) * int.from_bytes(digest[:8], "little")
        at = 4 * coded + tile * (8 + 4 * coded)
        check(int.from_bytes(index[at : at + 8], "little") == wanted % 2**64, "a tile's check")


def plane(row: list[Any], coded: bytes, nbytes: int) -> bytes:
    """The raw bytes of a plane (section 7)."""
    codec, _, *parts = row
    if codec == "sparse":
        return sparse(parts, coded, nbytes)
    if codec in {"zstd", "blocks"}:
        check(zstandard.frame_content_size(coded) == nbytes, "a frame's size")
        coded = zstandard.ZstdDecompressor(max_window_size=2**27).decompress(coded)
    check(codec in {"zstd", "raw", "blocks"} and not parts and len(coded) == nbytes, "a plane")
    return coded


def sparse(parts: list[Any], coded: bytes, nbytes: int) -> bytes:
    """The raw bytes of a plane of which few are not zero (section 7)."""
    bitmap, rest = parts
    check(bitmap[0] != "sparse" != rest[0] and bitmap[1] + rest[1] == len(coded), "parts")
    packed = plane(bitmap, coded[: bitmap[1]], (nbytes + 7) // 8)
    bits = np.unpackbits(np.frombuffer(packed, "u1"), bitorder="little")
    found = plane(rest, coded[bitmap[1] :], int(bits.sum()))
    check(not bits[nbytes:].any() and len(packed) + len(found) <= nbytes, "a bitmap")
    raw = np.zeros(nbytes, "u1")
    raw[bits[:nbytes] == 1] = np.frombuffer(found, "u1")
    return raw.tobytes()


def fingerprint_of(raw: bytes) -> str:
    """Section 5."""
    leaves = [raw[at : at + 65536] for at in range(0, len(raw), 65536)]
    leaves[-1] += bytes(-len(leaves[-1]) % 256)
    tree = b"".join(xxhash.xxh3_128_digest(leaf) for leaf in leaves)
    return xxhash.xxh3_128_hexdigest(tree + struct.pack("<Q", len(raw)))


def dtype(name: str) -> np.dtype:
    """Section 6."""
    check(DTYPE.fullmatch(name) is not None, f"element type {name}")
    plain = name.removeprefix(">")
    found = np.dtype(getattr(ml_dtypes, plain, plain))
    return found.newbyteorder(">") if plain != name else found


def width(name: str) -> int:
    """Section 6, third column."""
    kind = name.removeprefix(">")
    special = {"S": 1, "V": 1, "U": 4, "complex64": 4, "complex128": 8}
    special |= {"float128": 1, "complex256": 1}
    return int(special.get(kind, special.get(kind[0], dtype(name).itemsize)))


def size(row: dict[str, Any]) -> int:
    """Bytes of a tensor."""
    return int(math.prod(row["shape"])) * dtype(row["dtype"]).itemsize


def build(node: dict[str, Any], tensors: list[np.ndarray]) -> Any:
    """Section 10."""
    ((kind, inside),) = node.items()
    if kind == "dict":
        return {value(key): build(child, tensors) for key, child in inside}
    if kind in {"list", "tuple"}:
        return {"list": list, "tuple": tuple}[kind](build(child, tensors) for child in inside)
    if kind == "tensor":
        return tensors[inside]
    if kind == "ranks":
        return {rank: build(child, tensors) for rank, child in inside}
    check(kind in {"object", "value"}, f"a node {kind}")
    return build(inside, tensors) if kind == "object" else value(inside)


def value(data: Any) -> Any:
    """Section 11."""
    if not isinstance(data, dict):
        return data
    ((kind, inside),) = data.items()
    if kind in {"complex", "tuple"}:
        parts = [value(part) for part in inside]
        return complex(*parts) if kind == "complex" else tuple(parts)
    if kind == "int":
        return int(inside, 16)
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(inside))[0]
    if kind == "scalar":
        return np.frombuffer(base64.b64decode(inside[1]), dtype(inside[0]))[0]
    if kind == "str":
        return base64.b64decode(inside).decode("utf-8", "surrogatepass")
    check(kind in {"bytes", "bytearray"}, f"a value {kind}")
    return (bytes if kind == "bytes" else bytearray)(base64.b64decode(inside))


def check(holds: bool, what: str) -> None:
    """Section 16: refuse what isn't as it must be."""
    if not holds:
        raise ValueError(f"{what}: not as docs/FORMAT.md says")
