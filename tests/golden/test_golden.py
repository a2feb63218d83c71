"""The format on disk is what docs/FORMAT.md says, and stays so."""

import json
import random
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gpuckpt
from gpuckpt import layout
from gpuckpt.arena import Slot
from gpuckpt.deltacoding import decode_delta
from gpuckpt.deltas import delta_split
from gpuckpt.fingerprint import checksum
from gpuckpt.planes import split
from gpuckpt.rounding import round_to
from gpuckpt.sparse import pack_sparse
from gpuckpt.spec import Plane
from tests.golden import reader
from tests.golden.describe import describe
from tests.golden.regenerate import SUMS, main, sums, write_case
from tests.golden.states import (
    CASES,
    DELTA_NBYTES,
    DERIVED,
    INCREMENTS,
    NBYTES,
    SEALED,
    TURNED,
    Case,
    Save,
    coarse,
    moved,
    narrow,
)

HERE = Path(__file__).parent
V1, V1_INCREMENTS = HERE / "v1", HERE / "v1.increments"
V1_TURNED, V1_DERIVED = HERE / "v1.turned", HERE / "v1.derived"
V1_SEALED = HERE / "v1.sealed"
FORMAT = (HERE.parent.parent / "docs" / "FORMAT.md").read_text()
TOKEN = re.compile(rb"\.[0-9a-f]{8}\.r")
ENDING = struct.pack("<I12x8s", 1, b"gpuckpt\0")
SEAL = re.compile(rb',"seal":"[0-9a-f]{64}"')
STATISTICS = re.compile(rb',"statistics":\[[^]]*\]')

EVERY_CASE = [*CASES, *INCREMENTS, *TURNED, *DERIVED, *SEALED]
of_every_case = pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)


def home(case: Case) -> Path:
    """The directory of a case's root."""
    if case in TURNED:
        return V1_TURNED
    if case in SEALED:
        return V1_SEALED
    if case in DERIVED:
        return V1_DERIVED
    return V1 if case in CASES else V1_INCREMENTS


def expected(case: Case) -> dict[int, object]:
    text = (home(case) / f"{case.family}.json").read_text()
    return {int(step): described for step, described in json.loads(text).items()}


@of_every_case
def test_gpuckpt_loads_every_golden_checkpoint_to_the_last_bit(case):
    for step, contents in expected(case).items():
        assert describe(gpuckpt.load(home(case) / case.name, step, key=case.key)) == contents
        assert describe(gpuckpt.load(home(case) / case.name, step)) == contents


@of_every_case
def test_a_reader_written_from_the_specification_reads_the_same(case):
    for step, contents in expected(case).items():
        assert describe(reader.read(home(case) / case.name, step, case.key)) == contents
    assert describe(reader.read(home(case) / case.name)) == expected(case)[max(expected(case))]


@of_every_case
def test_a_segment_alone_gives_the_tensors_that_lie_whole_in_it(case):
    root = home(case) / case.name
    for step, whole in tensors_by_name(root).items():
        facts = body(root / f"step-{step:012d}.manifest.json")
        for at, name in enumerate(facts["segments"]):
            if not name.startswith(f"step-{step:012d}."):
                continue  # written for an older step, of which it tells
            found = reader.read_segment(root / name, case.key)
            rows = (
                (row["name"], {chunk[2] for chunk in row["chunks"]}) for row in facts["tensors"]
            )
            assert found.keys() == {tensor for tensor, where in rows if where == {at}}
            assert all(describe(found[name]) == describe(whole[name]) for name in found)


@pytest.mark.parametrize("version", sorted(path.name for path in HERE.glob("v[0-9]*")))
def test_golden_files_have_not_changed(version):
    """Files of a version are never written again: an old checkpoint must stay readable."""
    assert sums(HERE / version) == (HERE / version / SUMS).read_text()


def test_golden_files_stay_small():
    most_of = {V1: 200_000, V1_INCREMENTS: 300_000, V1_TURNED: 250_000, V1_DERIVED: 600_000}
    most_of |= {V1_SEALED: 500_000}
    for directory, most in most_of.items():
        files = [path for path in directory.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= most


def test_golden_files_are_not_written_twice(capsys):
    before = sums(HERE)
    assert main() == 1
    assert capsys.readouterr().out.count("never written again") == 5
    assert sums(HERE) == before


def test_golden_files_that_are_missing_are_written_beside_those_that_are_there(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tests.golden.regenerate.HERE", tmp_path)
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1.derived").mkdir()
    monkeypatch.setattr("tests.golden.regenerate.INCREMENTS", INCREMENTS[-1:])
    monkeypatch.setattr("tests.golden.regenerate.TURNED", TURNED[:1])
    monkeypatch.setattr("tests.golden.regenerate.SEALED", SEALED[:1])
    assert main() == 0
    assert capsys.readouterr().out.count("never written again") == 2
    assert not list((tmp_path / "v1").iterdir())
    written = tmp_path / "v1.increments"
    assert sums(written) == (written / SUMS).read_text() != ""


def test_golden_files_cover_what_a_format_has():
    rows = [row for path in V1.rglob("*.manifest.json") for row in tensors_of(path)]
    chunks = [chunk for row in rows for chunk in row["chunks"]]
    planes = {(len(c[7]), codec) for c in chunks for codec, _ in c[7]}
    nodes = {kind for path in V1.rglob("*.manifest.json") for kind in kinds(body(path))}

    assert planes >= {(width, codec) for width in (1, 2, 4, 8) for codec in ("raw", "zstd")}
    assert nodes >= {"dict", "list", "tuple", "object", "tensor", "value"}
    assert nodes >= {"int", "float", "complex", "bytes", "bytearray", "scalar", "str"}
    named = {name for line in element_types() for name in line}
    missing = named - {row["dtype"] for row in rows}
    assert missing == {"float128", "complex256", *(n for n in missing if re.search(r"[<\[]", n))}


def test_golden_files_cover_what_increments_have():
    roots = {path.parent for path in V1_INCREMENTS.rglob("*.manifest.json")}
    found = [
        (body(path), row)
        for root in roots
        for path in root.glob("*.manifest.json")
        for row in tensors_of(path)
    ]
    chains = [(row["dtype"], chain_of(chunk)) for _, row in found for chunk in row["chunks"]]
    links = [(reader.width(dtype), link) for dtype, chain in chains for link in chain]
    deltas = [(width, link[7]) for width, link in links if len(link) == 9]
    kinds = {(plane[0], *(part[0] for part in plane[2:])) for _, row in deltas for plane in row}
    older = [
        row
        for facts, row in found
        for chunk in row["chunks"]
        if not facts["segments"][chunk[2]].startswith(f"step-{facts['step']:012d}.")
    ]

    assert {len(chain) for _, chain in chains} == {1, 2, 3}
    assert {width for width, _ in deltas} == {1, 2, 4, 8}
    assert {
        width for width, chain in ((reader.width(d), c) for d, c in chains) if len(chain) == 3
    } == {1, 2, 4, 8}
    assert kinds >= {("raw",), ("zstd",), ("sparse", "zstd", "zstd"), ("sparse", "zstd", "raw")}
    assert any(len(c) == 2 and len(c[1][7]) == 1 < len(c[0][7]) for _, c in chains)
    assert older
    features = {tuple(facts["requires"]) for facts, _ in found}
    assert features == {(), ("delta", "sparse")}


def test_golden_files_cover_what_is_sealed():
    paths = sorted(V1_SEALED.rglob("*.manifest.json"))
    chains = [chain_of(c) for path in paths for row in tensors_of(path) for c in row["chunks"]]
    shapes = {(len(chain[0]), len(chain) > 1) for chain in chains}
    assert shapes >= {(8, False), (9, True), (10, True)}
    for path in paths:
        facts = body(path)
        links = [link for row in facts["tensors"] for c in row["chunks"] for link in chain_of(c)]
        listed = {tuple(row[:3]) for row in facts["digests"]}
        assert listed == {tuple(link[2:5]) for link in links if link[4]}
        assert len(listed) == len(facts["digests"])
        assert list(facts)[-1] == "seal"
    assert any(len({row[0] for row in body(path)["digests"]}) > 1 for path in paths)


def test_golden_files_cover_what_is_turned():
    rows = [row for path in V1_TURNED.rglob("*.manifest.json") for row in tensors_of(path)]
    links = [(row["dtype"], link) for row in rows for c in row["chunks"] for link in chain_of(c)]
    turned = {(dtype, len(link[7])) for dtype, link in links if link[8:] == ["turned"]}
    whole = {dtype for dtype, link in links if len(link) == 8 and len(link[7]) == 1}
    split = {dtype for dtype, link in links if len(link) == 8 and len(link[7]) > 1}
    on_turned = {
        (row["dtype"], len(chain))
        for row in rows
        for chain in map(chain_of, row["chunks"])
        if chain[-1][8:] == ["turned"]
    }

    assert turned == {("float32", 4), ("bfloat16", 2), ("complex64", 4)}
    assert split == {"float16", "float64", ">float32"}
    assert "float32" in whole
    assert on_turned >= {(dtype, n) for dtype in ("float32", "bfloat16") for n in (1, 2, 3)}
    requires = {tuple(body(path)["requires"]) for path in V1_TURNED.rglob("*.manifest.json")}
    assert requires == {("turned",), ("delta", "sparse", "turned")}


def test_golden_files_cover_what_derived_chunks_have():
    found = [
        (body(path), row, chunk)
        for path in V1_DERIVED.rglob("*.manifest.json")
        for row in tensors_of(path)
        for chunk in row["chunks"]
    ]
    derived = [(facts, row, chunk) for facts, row, chunk in found if len(chunk) == 10]

    assert {row["dtype"] for _, row, _ in derived} == {"float16", "bfloat16"}
    assert {len(chunk[9]) for _, _, chunk in derived} == {1, 2}
    assert {len(source) for _, _, chunk in derived for source in chunk[9]} == {8, 9}
    assert any(len({source[2] for source in chunk[9]}) == 2 for _, _, chunk in derived)
    lengths = [{len(c) for c in row["chunks"]} for _, row, _ in derived]
    assert {8, 10} in lengths, "a tensor of which a part is derived"
    assert {"derived"} <= {one for facts, _, _ in found for one in facts["requires"]}


# What the present code writes.


@of_every_case
def test_what_is_written_today_is_what_the_format_version_has_always_had(case, tmp_path):
    """A change that fails here needs a new `layout.VERSION`, or must be undone."""
    write_case(tmp_path, case)
    golden = fixed_parts(home(case) / case.name, case.codec)
    new = fixed_parts(tmp_path, case.codec)
    assert new == golden


plain: Any = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers()
plain = st.one_of(plain, st.text(st.characters()), st.binary())
dtypes = st.sampled_from(
    ["?", "u1", "<i2", ">i4", "<f4", "<f8", ">f8", "<c8", "S3", "<U2", "<M8[s]"]
)
tensors = arrays.arrays(
    dtypes, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40)
)
states = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.0'[]"), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(state=states, codec=st.sampled_from(["auto", "raw", "zstd"]))
def test_the_independent_reader_reads_what_is_written_today(state, codec, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    gpuckpt.save(root, state, 1, codec=codec)
    assert describe(reader.read(root)) == describe(state)


@pytest.mark.parametrize("pattern", ["*.segment", "*.manifest.json"])
def test_the_independent_reader_refuses_any_changed_byte_of_a_chunk_or_manifest(pattern, tmp_path):
    """So that (a) to (d) prove what the check values say, and not only what the bytes say."""
    case = next(case for case in CASES if case.name == "example.raw")
    write_case(tmp_path, case)
    (file,) = tmp_path.glob(pattern)
    data = file.read_bytes()
    for at in range(64, 76) if pattern == "*.segment" else range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises((ValueError, AssertionError)):
            reader.read(tmp_path)


@pytest.mark.parametrize("name", ["planes.delta", "chains.delta", "unchanged.auto", "turned.zstd"])
def test_a_flipped_bit_in_a_chunk_or_its_bases_is_found_by_both_readers(name, tmp_path):
    home = V1_TURNED if name == "turned.zstd" else V1_INCREMENTS
    shutil.copytree(home / name, tmp_path / name)
    root, flips = tmp_path / name, random.Random(1)
    facts = body(max(root.glob("*.manifest.json")))
    chains = [chain_of(chunk) for row in facts["tensors"] for chunk in row["chunks"]]
    for _, _, segment, offset, length, *_ in (link for chain in chains for link in chain):
        file = root / facts["segments"][segment]
        data = file.read_bytes()
        for at in {offset, offset + length - 1, offset + flips.randrange(length)}:
            file.write_bytes(
                data[:at] + bytes([data[at] ^ 1 << flips.randrange(8)]) + data[at + 1 :]
            )
            with pytest.raises(ValueError, match=file.name):
                reader.read(root)
            with pytest.raises(gpuckpt.CorruptError, match=file.name):
                gpuckpt.load(root)
        file.write_bytes(data)


def test_a_flipped_bit_anywhere_in_a_manifest_of_increments_is_found_by_both_readers(tmp_path):
    shutil.copytree(V1_INCREMENTS / "planes.delta", tmp_path / "root")
    root, flips = tmp_path / "root", random.Random(1)
    manifest = max(root.glob("*.manifest.json"))
    data = manifest.read_bytes()
    for at in range(0, len(data), 7):
        changed = bytes([data[at] ^ 1 << flips.randrange(8)])
        manifest.write_bytes(data[:at] + changed + data[at + 1 :])
        with pytest.raises((ValueError, AssertionError)):
            reader.read(root)
        with pytest.raises(gpuckpt.CheckpointError):
            gpuckpt.load(root, int(manifest.name[5:17]))


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(["u1", "<i2", ">f4", "<f8", "<c8"]),
    shares=st.lists(st.sampled_from([0.0, 0.001, 0.1, 0.5]), min_size=1, max_size=4),
    full_every=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_independent_reader_reads_increments_that_are_written_today(
    dtype, shares, full_every, seed, tmp_path_factory
):
    root, state = tmp_path_factory.mktemp("root"), coarse(dtype, seed, DELTA_NBYTES + NBYTES)
    states = [state := moved(state, seed, share, 1 + 7 * seed) for share in shares]
    saves = [Save(step, {"w": state}) for step, state in enumerate(states, 1)]
    write_case(root, Case("any", lambda: saves, "delta", DELTA_NBYTES, full_every=full_every))
    for save in saves:
        assert describe(reader.read(root, save.step)) == describe(save.state)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from([np.float16, ml_dtypes.bfloat16]),
    counts=st.lists(st.integers(4096, 9000), min_size=1, max_size=3),
    codec=st.sampled_from(["auto", "raw", "delta"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_independent_reader_reads_copies_that_are_written_today(
    kind, counts, codec, seed, tmp_path_factory
):
    """Masters of any bits: NaNs, subnormal numbers, ties."""
    root, rng = tmp_path_factory.mktemp("root"), np.random.default_rng(seed)
    state: dict[str, Any] = {}
    for at, count in enumerate(counts):
        master = rng.integers(0, 2**32, count, np.uint32).view(np.float32)
        state |= {f"copy{at}": narrow(master, kind), f"master{at}": master}
    write_case(root, Case("any", lambda: [Save(1, state)], codec, DELTA_NBYTES))
    assert describe(reader.read(root, 1)) == describe(state)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([0, 0, 0, 0, 0, 0, 7, 255]), min_size=16, max_size=300),
    st.sampled_from(["raw", "zstd"]),
    st.sampled_from(["raw", "zstd"]),
)
def test_both_readers_read_sparse_planes_of_any_parts(given, first, second):
    raw = np.array(given, np.uint8)
    bitmap, packed = np.zeros((raw.size + 7) // 8, np.uint8), np.zeros_like(raw)
    packed = packed[: pack_sparse(raw, bitmap, packed)]
    coded = [
        part.tobytes() if codec == "raw" else zstandard.compress(part.tobytes())
        for codec, part in ((first, bitmap), (second, packed))
    ]
    rows = [[first, len(coded[0])], [second, len(coded[1])]]
    assume(bitmap.size + packed.size <= raw.size)
    found = reader.plane(["sparse", sum(map(len, coded)), *rows], b"".join(coded), raw.size)
    assert found == raw.tobytes()
    parts = tuple(Plane(codec, length) for codec, length in rows)
    plane, out = Plane("sparse", sum(map(len, coded)), parts), np.empty_like(raw)
    slot = Slot(*np.empty((3, raw.size), np.uint8))
    joined = np.frombuffer(b"".join(coded), np.uint8)
    decode_delta(joined, [plane], slot, out, base=None, where="here")
    assert out.tobytes() == raw.tobytes()


# What docs/FORMAT.md says.


def test_the_tables_of_the_specification_agree_with_the_code():
    header, trailer = byte_table("**Header**"), byte_table("**Trailer**")
    for table in (header, trailer):
        ends = [0, *(offset + nbytes for offset, nbytes in table)]
        assert [offset for offset, _ in table] == ends[:-1]
    assert sum(nbytes for _, nbytes in header) == layout.HEADER.size
    assert sum(nbytes for _, nbytes in trailer) == layout.TRAILER.size
    assert layout.pack_header() == struct.pack("<8sI52x", b"gpuckpt\0", 1)
    packed = layout.pack_trailer(layout.SegmentTrailer(1, 2, 3, bytes(range(16))))
    assert packed == struct.pack("<QQQ16sI12x8s", 1, 2, 3, bytes(range(16)), 1, b"gpuckpt\0")

    assert f"| head | {layout.MANIFEST_HEAD_NBYTES} |" in FORMAT
    assert f"{layout.CHUNK_NBYTES:,} bytes" in FORMAT
    assert f"{layout.LEAF_NBYTES:,} bytes" in FORMAT
    assert layout.MAGIC.hex(" ") in FORMAT
    assert f"# The format, version {layout.VERSION}\n" in FORMAT


def test_every_element_type_of_the_specification_is_known_to_the_code_and_none_else():
    from gpuckpt.dtypes import _BY_NAME, to_numpy, width_of

    simple = {name for line in element_types() for name in line if "<" not in name}
    simple = {name for name in simple if not name.startswith(("datetime", "timedelta"))}
    assert simple | {"float128", "complex256"} == _BY_NAME.keys() | {"float128", "complex256"}
    for name in _BY_NAME:
        assert reader.dtype(name) == to_numpy(name)
        assert reader.width(name) == width_of(name)


def test_the_example_of_the_specification_is_a_golden_file():
    (segment,) = (V1 / "example.raw").glob("*.segment")
    (manifest,) = (V1 / "example.raw").glob("*.json")
    lines = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?){1,16})", FORMAT, re.MULTILINE)
    assert bytes.fromhex("".join(row for _, row in lines)) == segment.read_bytes()
    assert manifest.read_text() in FORMAT
    assert segment.name in FORMAT


def test_the_examples_of_deltas_and_sparse_planes_are_true():
    assert "A base of two bfloat16 elements, `80 3f 00 c0`" in FORMAT
    assert "a chunk `7f 3f 02 c0`" in FORMAT
    assert "the bytes `01 00 04 00`; the planes are `01 04` and `00 00`" in FORMAT
    base, chunk = (np.frombuffer(bytes.fromhex(h), np.uint8) for h in ("803f00c0", "7f3f02c0"))
    assert chunk.view(ml_dtypes.bfloat16).tolist() == [0.99609375, -2.03125]
    planes = delta_split(chunk, base, 2, np.empty(4, np.uint8))
    assert [plane.tobytes().hex(" ") for plane in planes] == ["01 04", "00 00"]

    assert "`00 00 07 00 00 00 00 00 00 ff` is `04 02` and `07 ff`" in FORMAT
    assert "stored as `04 02 07 ff`" in FORMAT
    plane = ["sparse", 4, ["raw", 2], ["raw", 2]]
    assert reader.plane(plane, bytes.fromhex("040207ff"), 10).hex() == "000007000000000000ff"


def test_the_example_of_turned_elements_is_true():
    assert "*Example.* Two bfloat16 elements `80 3f 00 c0` make" in FORMAT
    assert "turned, are `00 7f 01 80`, and make the planes `00 01` and `7f 80`" in FORMAT
    raw = np.frombuffer(bytes.fromhex("803f00c0"), np.uint8)
    planes = split(raw, 2, np.empty_like(raw), turned=True)
    assert [plane.tobytes().hex(" ") for plane in planes] == ["00 01", "7f 80"]


def test_the_example_of_derived_chunks_is_true():
    assert "Of the float32 elements `00 80 80 3f`, `00 80 81 3f` and `01 00 00 33`" in FORMAT
    assert (
        "`80 3f`, `82 3f` and `00 33`, and the float16 ones `04 3c`, `0c 3c` and `01 00`" in FORMAT
    )
    master = np.frombuffer(bytes.fromhex("0080803f0080813f01000033"), np.uint8)
    words = master.view("<u4").tolist()
    for name, wanted in (("bfloat16", "803f823f0033"), ("float16", "043c0c3c0100")):
        out = np.empty(6, np.uint8)
        round_to(name, master, out)
        assert out.tobytes().hex() == wanted
        assert b"".join(struct.pack("<H", reader.rounded(x, name)) for x in words).hex() == wanted
    assert f"`{checksum([])}`" in FORMAT


def chain_of(chunk: list[Any]) -> list[list[Any]]:
    """The rows of a chunk and its bases, or of its sources and theirs."""
    rows = chunk[9] if len(chunk) == 10 else chunk[8:] if chunk[8:] != ["turned"] else []
    return [chunk, *(link for row in rows for link in chain_of(row))]


def tensors_by_name(root: Path) -> dict[int, dict[str, np.ndarray]]:
    """Each step's tensors, read through the manifest."""
    steps = {}
    for path in root.glob("*.manifest.json"):
        files = [root / name for name in body(path)["segments"]]
        rows = tensors_of(path)
        steps[body(path)["step"]] = {row["name"]: reader.tensor(row, files) for row in rows}
    return steps


def body(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())["manifest"]
    return found


def tensors_of(path: Path) -> list[Any]:
    return list(body(path)["tensors"])


def kinds(node: Any) -> Iterator[str]:
    """Every field name of every one-field object."""
    if isinstance(node, dict):
        yield from node
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from kinds(child)


def fixed_parts(root: Path, codec: str) -> list[object]:
    """All that a root's bytes must have in common with any other made of the same state.

    For `raw` that is everything but the token in names; another version of
    zstd may make other frames, which changes lengths and checksums with them.
    """
    parts: list[object] = []
    indices: list[dict[str, Any]] = []
    for path in sorted(root.iterdir()):
        data = path.read_bytes()
        if path.suffix == ".segment":
            offset, length, raw_length, _ = layout.unpack_trailer(data[-64:], path.name)
            index = zstandard.decompress(data[offset : offset + length])
            assert offset + length == len(data) - 64
            assert raw_length == len(index)
            assert (data[:64], data[-24:]) == (layout.pack_header(), ENDING)
            if codec == "raw":
                parts += [data[64:offset], masked(index, codec)]
            else:
                indices.append(dict(masked(index, codec)))
        else:
            text = data[layout.MANIFEST_HEAD_NBYTES : -2]
            parts += [path.name, data[:25], data[57:70], data[-2:], masked(text, codec)]
            assert json.loads(data)["manifest"] == json.loads(text)
    return [*parts, merged(indices)]


def merged(indices: list[dict[str, Any]]) -> dict[str, Any]:
    """The chunks of each step's tensors: which segments they lie in depends on frames' lengths."""
    found: dict[str, Any] = {}
    for index in indices:
        for row in index["tensors"]:
            chunks = row.pop("chunks")
            known = found.setdefault(f"{index['step']} {row['name']}", {**row, "chunks": []})
            known["chunks"] += chunks
    return found


def masked(text: bytes, codec: str) -> Any:
    # Statistics came later, as a field that a reader may ignore.
    text = SEAL.sub(b"", text)  # of the tokens too
    text = STATISTICS.sub(b"", TOKEN.sub(b".00000000.r", text))
    if codec == "raw":
        return text
    contents = json.loads(text)
    contents["encoded_nbytes"] = None
    contents.pop("digests", None)
    # Turned chunks came later, as a feature.
    contents["requires"] = [one for one in contents.get("requires", ()) if one != "turned"]
    names = contents.get("segments", ())
    if len(names) > len({name.partition(".")[0] for name in names}):
        contents["segments"] = None  # where one is full depends on frames' lengths
    for row in contents["tensors"]:
        row["chunks"] = [
            [[link[0], link[1], link[5]] for link in chain_of(chunk)] for chunk in row["chunks"]
        ]
    return list(contents.items())


def byte_table(title: str) -> list[tuple[int, int]]:
    """Offsets and sizes of a table of the specification."""
    _, _, after = FORMAT.partition(title)
    table = after.strip().partition("\n\n")[0]
    return [(int(a), int(b)) for a, b in re.findall(r"^\| (\d+) \| (\d+) \|", table, re.MULTILINE)]


def element_types() -> list[list[str]]:
    """The names in each line of section 6's table."""
    _, _, after = FORMAT.partition("| names | bytes an element |")
    lines = after.partition("\n\n")[0].splitlines()[2:]
    return [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in lines]
