"""The format on disk is what docs/FORMAT.md says, and stays so."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gpuckpt
from gpuckpt import layout
from tests.golden import reader
from tests.golden.describe import describe
from tests.golden.regenerate import SUMS, main, sums, write_case
from tests.golden.states import CASES, Case

HERE = Path(__file__).parent
V1 = HERE / "v1"
FORMAT = (HERE.parent.parent / "docs" / "FORMAT.md").read_text()
TOKEN = re.compile(rb"\.[0-9a-f]{8}\.r")
ENDING = struct.pack("<I12x8s", 1, b"gpuckpt\0")
STATISTICS = re.compile(rb',"statistics":\[[^]]*\]')

of_every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def expected(case: Case) -> dict[int, object]:
    text = (V1 / f"{case.family}.json").read_text()
    return {int(step): described for step, described in json.loads(text).items()}


@of_every_case
def test_gpuckpt_loads_every_golden_checkpoint_to_the_last_bit(case):
    for step, contents in expected(case).items():
        assert describe(gpuckpt.load(V1 / case.name, step)) == contents


@of_every_case
def test_a_reader_written_from_the_specification_reads_the_same(case):
    for step, contents in expected(case).items():
        assert describe(reader.read(V1 / case.name, step)) == contents
    assert describe(reader.read(V1 / case.name)) == expected(case)[max(expected(case))]


@of_every_case
def test_a_segment_alone_gives_the_tensors_that_lie_whole_in_it(case):
    for step, whole in tensors_by_name(V1 / case.name).items():
        found: dict[str, np.ndarray] = {}
        for file in (V1 / case.name).glob(f"step-{step:012d}.*.segment"):
            found |= reader.read_segment(file)
        assert not found.keys() - whole.keys()
        assert all(describe(found[name]) == describe(whole[name]) for name in found)
        if case.family != "segments":
            assert found.keys() == {name for name in whole if whole[name].size}
        elif case.codec == "raw":
            assert found.keys() < whole.keys()


@pytest.mark.parametrize("version", sorted(path.name for path in HERE.glob("v[0-9]*")))
def test_golden_files_have_not_changed(version):
    """Files of a version are never written again: an old checkpoint must stay readable."""
    assert sums(HERE / version) == (HERE / version / SUMS).read_text()


def test_golden_files_stay_small():
    assert sum(path.stat().st_size for path in V1.rglob("*") if path.is_file()) <= 200_000


def test_golden_files_are_not_written_twice(capsys):
    before = sums(V1)
    assert main() == 1
    assert "never written again" in capsys.readouterr().out
    assert sums(V1) == before


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


# What the present code writes.


@of_every_case
def test_what_is_written_today_is_what_the_format_version_has_always_had(case, tmp_path):
    """A change that fails here needs a new `layout.VERSION`, or must be undone."""
    write_case(tmp_path, case)
    golden, new = fixed_parts(V1 / case.name, case.codec), fixed_parts(tmp_path, case.codec)
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
    text = STATISTICS.sub(b"", TOKEN.sub(b".00000000.r", text))
    if codec == "raw":
        return text
    contents = json.loads(text)
    contents["encoded_nbytes"] = None
    if len(contents.get("segments", ())) > 1:
        contents["segments"] = None  # where one is full depends on frames' lengths
    for row in contents["tensors"]:
        row["chunks"] = [[chunk[0], chunk[1], chunk[5]] for chunk in row["chunks"]]
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
