"""NaNs, infinities and squares: counted, kept in the manifest, told to people."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import gpuckpt
from gpuckpt import layout
from gpuckpt.cli.showing import show_step
from gpuckpt.commit import open_step
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CorruptError
from gpuckpt.fingerprint import checksum128
from gpuckpt.manifest import Manifest, notable, pack_manifest, unpack_manifest
from gpuckpt.spec import Spec
from gpuckpt.statistics import Statistics, byte_values, kind_of, statistics_of
from gpuckpt.stores.local import LocalStore
from gpuckpt.tensors import TensorEntry
from tests.golden import reader
from tests.strategies import PLAIN, SMALL, same

Bytes = Any
ONE_BYTE = tuple(name for name in SMALL if name.startswith("float"))
WIDE = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
NATIVE = (*WIDE, *ONE_BYTE)
EVERY = (*NATIVE, *(f">{name}" for name in WIDE))
BITS = {"float4_e2m1fn": 15, "float6_e2m3fn": 63, "float6_e3m2fn": 63}
STATE = {"w": np.zeros(3, "f4"), "v": np.ones(4), "n": np.arange(3)}
GOLDEN = Path(__file__).parent / "golden" / "v1"


def numbers_in(raw: Bytes, dtype: str) -> Any:
    """The elements as float64, parts of complex numbers one by one: a plain reference."""
    kind = to_numpy(dtype)
    elements = np.frombuffer(raw.tobytes(), kind)
    if kind.kind == "c":
        elements = elements.view(elements.real.dtype)
    with np.errstate(all="ignore"):
        return elements.astype(np.float64)


def expected(raw: Bytes, dtype: str) -> tuple[int, int, float]:
    numbers = numbers_in(raw, dtype)
    finite = numbers[np.isfinite(numbers)]
    with np.errstate(all="ignore"):
        squares = np.square(finite)
    total = math.inf if np.isinf(squares).any() else math.fsum(squares)
    return int(np.isnan(numbers).sum()), int(np.isinf(numbers).sum()), total


def check(raw: Bytes, dtype: str) -> None:
    found = statistics_of(raw, dtype)
    assert found is not None
    nans, infs, squares = expected(raw, dtype)
    assert (found.nans, found.infs) == (nans, infs)
    assert found.squares == pytest.approx(squares, rel=1e-6, abs=1e-300)


def at_offset(raw: Bytes, offset: int) -> Bytes:
    room = np.empty(raw.size + offset, np.uint8)
    room[offset:] = raw
    return room[offset:]


def raw_of(numbers: Any, dtype: str) -> Bytes:
    kind = to_numpy(dtype)
    with np.errstate(all="ignore"):
        if kind.kind == "c":
            part = f"{'>' if dtype[0] == '>' else '<'}f{kind.itemsize // 2}"
            return np.repeat(numbers, 2).astype(part).view(np.uint8)
        return np.asarray(numbers).astype(kind).view(np.uint8)


@st.composite
def chunks(draw: st.DrawFn) -> tuple[Bytes, str]:
    """Bytes of any float type: any at all, of one size of numbers, of special ones between."""
    dtype = draw(st.sampled_from(EVERY))
    count = draw(st.sampled_from((0, 1, 2, 3, 127, 128, 129, 300, 4097, 5000, 70001)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(("bits", "normal", "special")))
    if kind == "bits":
        raw = rng.integers(0, 256, count * to_numpy(dtype).itemsize, np.uint8)
        return raw & BITS.get(dtype, 255), dtype
    scale = draw(st.sampled_from((1.0, 1e-3, 1e-7, 1e-20, 1e-30, 1e-42, 1e4, 1e18, 1e30, 1e200)))
    numbers = rng.standard_normal(count) * scale
    if kind == "special":
        odd = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e-45, 6e-8, 1e308)
        where = rng.random(count) < draw(st.sampled_from((0.0001, 0.1, 1.0)))
        numbers[where] = rng.choice(odd, int(where.sum()))
    return at_offset(raw_of(numbers, dtype), draw(st.integers(0, 9))), dtype


@settings(max_examples=300, deadline=None)
@given(chunks())
@example((np.empty(0, np.uint8), "bfloat16"))
@example((np.array([0x01, 0x00, 0x80, 0x7F], np.uint8), "float32"))
def test_a_chunk_is_counted_as_a_plain_reference_counts_it(chunk):
    raw, dtype = chunk
    raw.flags.writeable = False
    check(raw, dtype)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, 1 / 3, 3e-39, 1e-20, 7e-23, 65504, 1e30, 3e38])
def test_many_equal_elements_do_not_add_up_their_rounding(dtype, value):
    check(raw_of(np.full(200_000, value), dtype), dtype)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.5, 1e30])
def test_one_element_counts_wherever_it_is(dtype, value):
    for at in (0, 1, 70_000, 99_999):
        numbers = np.zeros(100_000)
        numbers[at] = value
        check(raw_of(numbers, dtype), dtype)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize(("some", "others"), [(1e-21, 2.0), (1e-3, 1e-21), (0.0, 1e-21)])
def test_elements_count_whatever_a_sample_of_every_nth_would_say(dtype, some, others):
    numbers = np.full(100_000, others)
    numbers[:: 100_000 // 256] = some
    check(raw_of(numbers, dtype), dtype)


@pytest.mark.parametrize(
    ("dtype", "quiet", "signalling", "infinite"),
    [
        ("<u2 float16", 0x7E00, 0x7C01, 0x7C00),
        ("<u2 bfloat16", 0x7FC0, 0x7F81, 0x7F80),
        ("<u4 float32", 0x7FC00000, 0x7F800001, 0x7F800000),
        ("<u8 float64", 0x7FF8 << 48, (0x7FF0 << 48) + 1, 0x7FF0 << 48),
        (">u4 >float32", 0x7FC00000, 0x7F800001, 0x7F800000),
    ],
)
def test_nans_of_any_payload_and_sign_are_nans(dtype, quiet, signalling, infinite):
    code, name = dtype.split()
    sign = 1 << (np.dtype(code).itemsize * 8 - 1)
    bits = [quiet, quiet + 5, signalling, sign | signalling, infinite, sign | infinite, sign, 0]
    for repeat in (1, 5000):
        raw = np.array(bits * repeat, code).view(np.uint8)
        assert statistics_of(raw, name) == Statistics(4 * repeat, 2 * repeat, 0.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", *ONE_BYTE])
def test_a_chunk_of_every_bit_pattern_is_counted(dtype):
    width = to_numpy(dtype).itemsize
    codes = np.arange(min(1 << 8 * width, 1 << 20), dtype=f"u{width}")
    raw = (codes << max(8 * width - 20, 0)).astype(codes.dtype).view(np.uint8)
    check(raw & BITS.get(dtype, 255), dtype)


@pytest.mark.parametrize("dtype", [*(name for name in PLAIN if name not in WIDE), "int4", "S5"])
def test_what_is_no_float_has_no_statistics(dtype):
    assert statistics_of(np.zeros(480, np.uint8), dtype) is None
    assert kind_of(dtype) == 0
    assert byte_values(dtype) is None


def test_a_sum_that_float64_cannot_hold_is_infinite_and_hides_no_count():
    raw = np.array([1e200, math.nan, math.inf, 1.0]).view(np.uint8)
    assert statistics_of(raw, "float64") == Statistics(1, 1, math.inf)
    assert statistics_of(raw[:8], "float64") == Statistics(0, 0, math.inf)


def test_a_tensors_statistics_are_the_sum_of_its_chunks():
    raw = raw_of(np.array([1.0, math.nan, 2.0, math.inf, -math.inf, 3.0]), "float32")
    parts = [statistics_of(raw[at : at + 8], "float32") or Statistics() for at in (0, 8, 16)]
    assert sum(parts, Statistics()) == statistics_of(raw, "float32") == Statistics(1, 2, 14.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn"])
@pytest.mark.parametrize("byte", [0, 0x3F, 0xFF])
def test_counting_takes_little_memory_however_large_the_chunk(dtype, byte):
    raw = np.full(4 << 20, byte, np.uint8)
    statistics_of(raw[:64], dtype)  # makes the table
    tracemalloc.start()
    try:
        statistics_of(raw, dtype)
        assert tracemalloc.get_traced_memory()[1] < 600 << 10
    finally:
        tracemalloc.stop()


def test_kinds_of_elements_are_those_that_a_gpu_reads():
    kinds = {"float16": 1, "bfloat16": 2, "float32": 3, "complex64": 3, "float64": 4}
    kinds |= {"complex128": 4, **dict.fromkeys(ONE_BYTE, 5)}
    assert {name: kind_of(name) for name in NATIVE} == kinds
    assert {kind_of(f">{name}") for name in NATIVE} == {0}


@pytest.mark.parametrize("dtype", ONE_BYTE)
def test_byte_values_are_the_types_own(dtype):
    values = byte_values(dtype)
    assert values is not None
    assert values.shape == (256,)
    assert not values.flags.writeable
    bits = np.arange(256, dtype=np.uint8) & BITS.get(dtype, 255)
    assert same(values, bits.view(getattr(ml_dtypes, dtype)).astype(np.float32))


# In the manifest


def entry(statistics: Statistics | None, dtype: str = "float32", name: str = "w") -> TensorEntry:
    return TensorEntry(Spec(name, dtype, (0, 9)), (), 3, statistics)


def packed(tensor: TensorEntry) -> bytes:
    return pack_manifest(Manifest(3, {"dict": [["w", {"tensor": 0}]]}, (tensor,)))


def with_statistics(odd: object, dtype: str, shape: tuple[int, ...]) -> bytes:
    """A manifest of a stranger, whose checksum fits."""
    text = packed(TensorEntry(Spec("w", dtype, (0,)), (), 3))
    body = json.loads(text[layout.MANIFEST_HEAD_NBYTES : -len(layout.MANIFEST_TAIL)])
    body["tensors"][0] |= {"statistics": odd, "shape": shape}
    itemsize = to_numpy(dtype).itemsize
    nbytes = math.prod(shape) * itemsize
    if nbytes:
        body["segments"] = [layout.segment_name(3, "01234567", 0, 0)]
        planes = [["raw", nbytes]]
        body["tensors"][0]["chunks"] = [[0, nbytes, 0, 64, nbytes, "0" * 32, "1" * 16, planes]]
    changed = json.dumps(body).replace('"1e999"', "1e999").encode()
    head = layout.MANIFEST_HEAD % (layout.VERSION, checksum128(changed))
    return head.encode() + changed + layout.MANIFEST_TAIL


@given(st.floats(0, allow_nan=False))
@example(math.inf)
@example(0.1 + 0.2)
def test_statistics_come_back_from_a_manifest_to_the_last_bit(squares):
    for statistics in (Statistics(0, 0, squares), None):
        again = unpack_manifest(packed(entry(statistics)), "m")
        assert again.tensors == (entry(statistics),)


def test_numbers_of_numpys_types_are_packed_like_others():
    counted: Any = Statistics(np.int64(0), np.uint32(0), np.float64(2.5))  # type: ignore[arg-type]
    assert packed(entry(counted)) == packed(entry(Statistics(0, 0, 2.5)))


def test_a_manifest_without_statistics_says_nothing_of_them():
    assert b"statistics" not in packed(entry(None))
    assert b'"statistics":[0,0,2.5]' in packed(entry(Statistics(squares=2.5)))


def test_a_manifest_from_before_there_were_statistics_is_read():
    manifest = open_step(LocalStore(GOLDEN / "example.raw"), 7)
    assert [tensor.statistics for tensor in manifest.tensors] == [None]


@pytest.mark.parametrize(
    "odd",
    [
        *(None, True, 5, "inf", {}, [], [0, 0], [0, 0, 0.0, 0], [[0], 0, 0.0]),
        *([-1, 0, 0.0], [0, -1, 0.0], [0.0, 0, 0.0], [True, 0, 0.0], ["1", 0, 0.0]),
        *([0, 0, -0.5], [0, 0, "nan"], [0, 0, "-inf"], [0, 0, "1"], [0, 0, True], [0, 0, None]),
        *(
            [4, 0, 0.0],
            [0, 4, 0.0],
            [2, 2, 0.0],
            [2**63, 0, 0.0],
            [0, 0, 10**400],
            [0, 0, "1e999"],
        ),
    ],
    ids=repr,
)
def test_statistics_that_cannot_be_are_refused(odd):
    with pytest.raises(CorruptError, match="not a manifest"):
        unpack_manifest(with_statistics(odd, "float32", (3,)), "m")


def test_a_complex_tensor_has_two_numbers_an_element():
    for dtype, counts in {"float32": (1, 2), "complex64": (2, 4)}.items():
        (tensor,) = unpack_manifest(with_statistics([*counts, 0], dtype, (3,)), "m").tensors
        assert tensor.statistics == Statistics(*counts, 0.0)
    with pytest.raises(CorruptError):
        unpack_manifest(with_statistics([3, 4, 0], "complex64", (3,)), "m")


# For people


@pytest.fixture
def root(tmp_path):
    """A checkpoint whose manifest has statistics of `w` and `v`, but not of `n`; `w`'s are lies."""
    gpuckpt.save(tmp_path, STATE, 3)
    manifest = open_step(LocalStore(tmp_path), 3)
    counted = {"w": Statistics(1, 1, 9.0), "v": Statistics(squares=4.0)}
    tensors = tuple(
        dataclasses.replace(tensor, statistics=counted.get(tensor.spec.name))
        for tensor in manifest.tensors
    )
    changed = dataclasses.replace(manifest, tensors=tensors)
    (tmp_path / layout.manifest_name(3)).write_bytes(pack_manifest(changed))
    return tmp_path


def test_readers_read_a_checkpoint_with_statistics_as_one_without(root):
    assert b'"statistics":[1,1,9.0]' in (root / layout.manifest_name(3)).read_bytes()
    assert same(gpuckpt.load(root), STATE)
    assert same(reader.read(root), STATE)


def shown(root: Path) -> str:
    text = io.StringIO()
    assert show_step(root, None, None, Console(file=text, width=200), as_json=False) == 0
    return text.getvalue()


def test_show_tells_norms_and_what_is_not_finite(root, capsys):
    lines = [line for line in shown(root).splitlines() if line.startswith(("name", "w", "v", "n"))]
    titles, *rows, warning = lines
    at = titles.index("norm")
    assert {row[0]: row[at : at + 4].strip() for row in rows} == {"w": "3", "v": "2", "n": ""}
    assert warning == "w isn't finite: 1 NaN, 1 inf"

    show_step(root, None, None, Console(), as_json=True)
    leaves = {leaf["name"]: leaf for leaf in json.loads(capsys.readouterr().out)["leaves"]}
    counted = {key: [leaf[key] for leaf in leaves.values()] for key in ("norm", "nans", "infs")}
    assert list(leaves) == ["w", "v", "n"]
    assert counted == {"norm": [3.0, 2.0, None], "nans": [1, 0, None], "infs": [1, 0, None]}


def test_show_says_nothing_of_what_nobody_counted():
    text = shown(GOLDEN / "example.raw")
    assert "norm" not in text
    assert "finite" not in text


def test_the_warning_names_three_tensors_and_counts_the_others():
    spoiled = [
        TensorEntry(Spec(f"m.{n}", "float32", (64, 64)), (), 3, Statistics(12 * n, 3 - n, 1.0))
        for n in range(4)
    ]
    fine = [entry(Statistics(squares=math.inf)), entry(None)]
    pair = TensorEntry(Spec("z", "complex64", (5,)), (), 3, Statistics(nans=6))

    assert notable(fine) is None
    assert notable([*fine, pair]) == "values that aren't finite: z (6 NaN of 10)"
    three = "m.0 (3 inf of 4096), m.1 (12 NaN, 2 inf of 4096), m.2 (24 NaN, 1 inf of 4096)"
    assert notable([*fine, *spoiled[:3]]) == f"values that aren't finite: {three}"
    assert notable(spoiled) == f"values that aren't finite: {three} and 1 more tensor"
    assert notable([*spoiled, pair]) == f"values that aren't finite: {three} and 2 more tensors"
