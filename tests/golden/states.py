"""The states in the golden files: fixed, whatever library version makes them."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

FAMILY_CODECS = ("auto", "raw", "zstd")
NBYTES = 520  # enough for `auto` to try compression
DELTA_NBYTES = 1 << 16  # enough for a chunk to be a base


@dataclass(frozen=True)
class Save:
    """One step of a golden checkpoint."""

    step: int
    state: Any
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A root: its steps, and how they are written.  Cases of one `family` hold the same."""

    family: str
    saves: Callable[[], list[Save]]
    codec: str
    chunk_nbytes: int = 4 << 20
    segment_nbytes: int = 4 << 30
    full_every: int = 1
    key: bytes | None = None

    @property
    def name(self) -> str:
        """The root's name below its directory."""
        return f"{self.family}.{self.codec}"


class Optimizer:
    """An object that keeps its state behind `state_dict`."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def small_integers(dtype: Any, nbytes: int = NBYTES) -> np.ndarray:
    count = nbytes // np.dtype(dtype).itemsize
    return np.array([at * at % 23 for at in range(count)]).astype(dtype)


def eighths(dtype: Any, nbytes: int = NBYTES) -> np.ndarray:
    count = nbytes // np.dtype(dtype).itemsize
    return np.array([(at * 37 % 101 - 50) / 8 for at in range(count)], "float64").astype(dtype)


def noise(nbytes: int, seed: int = 1) -> np.ndarray:
    return np.frombuffer(random.Random(seed).randbytes(nbytes), "uint8").copy()


def integers() -> list[Save]:
    names = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
    tensors = {name: small_integers(name) for name in names}
    tensors["int16"][:4] = [-1, -(2**15), 2**15 - 1, 0]
    flags = np.array([at % 3 == 0 for at in range(NBYTES)])
    return [Save(1, {**tensors, "bool": flags, "noise": noise(NBYTES)})]


def floats() -> list[Save]:
    names = ("float16", "float32", "float64", "complex64", "complex128")
    tensors = {name: eighths(name) for name in names}
    for array in tensors.values():
        array[:4] = [np.inf, -np.inf, np.nan, -0.0]
    tensors["float32"].view("uint32")[4] = 0x7FA00001  # a signalling NaN with a payload
    tensors["complex64"].imag = eighths("float32", NBYTES // 2)
    return [Save(1, tensors)]


def small() -> list[Save]:
    tensors = {
        name: eighths(getattr(ml_dtypes, name), NBYTES)
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4")
    }
    # Like weights: exponents that compress, fractions that don't.
    weights = np.stack([noise(NBYTES // 2), small_integers("uint8", NBYTES // 2)], axis=1)
    tensors["weights"] = weights.reshape(-1).view(ml_dtypes.bfloat16)
    bits = {"int2": 2, "uint2": 2, "uint4": 4, "float4_e2m1fn": 4}
    bits |= {"float6_e2m3fn": 6, "float6_e3m2fn": 6}
    bits |= dict.fromkeys(
        (
            *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
            *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
        ),
        8,
    )
    for name, count in bits.items():
        every = np.arange(0, 2**count, max(1, 2**count // 32)).astype("uint8")
        tensors[name] = every.view(getattr(ml_dtypes, name))
    return [Save(1, tensors)]


def text() -> list[Save]:
    words = ["", "a", "bc", "def", "ghi", "ñé", "日本", "wxyz"]
    count = 32
    tensors = {
        "bytes": np.array([word.encode("ascii", "ignore") for word in words] * 4, "S7"),
        "text": np.array(words * 4, "U4"),
        "text big-endian": np.array(words * 4, ">U4"),
        "opaque": noise(16 * count).view("V16"),
        "date": np.arange(count).astype("datetime64[D]"),
        "instant": (np.arange(count) * 10**15).astype("datetime64[ns]"),
        "quarter": np.arange(count).astype("datetime64[25s]"),
        "unitless": np.arange(count).view("datetime64"),
        "unitless duration": np.arange(count).astype("timedelta64"),
        "duration": np.arange(-5, count).astype("timedelta64[us]"),
    }
    tensors["date"][3] = np.datetime64("NaT")
    swapped = {dtype: small_integers(dtype) for dtype in (">i2", ">u4", ">i8")}
    swapped |= {dtype: eighths(dtype) for dtype in (">f2", ">f4", ">f8", ">c16")}
    swapped[">M8[s]"] = np.arange(count).astype(">M8[s]")
    return [Save(1, tensors | {"swapped": swapped})]


def structure() -> list[Save]:
    tied = np.arange(6, dtype="float32").reshape(2, 3)
    keys: dict[Any, str] = {1: "an int", False: "a bool", 2.5: "a float", None: "nothing"}
    keys |= {b"k": "bytes", (1, ("x", None)): "a tuple", 2**70: "large", 1j: "complex"}
    keys |= {np.int16(9): "a scalar", "": "an empty string", "é\n\U0001f600": "not ASCII"}
    plain = {
        "singletons": [None, True, False],
        "integers": [0, -1, 2**53, 2**53 + 1, -(2**53) - 1, 2**200, -(2**200)],
        "floats": [0.0, -0.0, 1.0, 0.1, 5e-324, 1.7976931348623157e308, 1e16, 2.0**53],
        "not finite": [float("inf"), float("-inf"), float("nan")],
        "complex": [1 + 2j, complex(-0.0, float("inf"))],
        "strings": ["", "plain", 'quote " and \\', "\x00\x1f\x7f", "ü 日 \U0001f600"],
        "surrogates": ["\ud800", "a\udcff", "\ud83d\ude00"],
        "bytes": [b"", b"\x00\xff", bytearray(b"abc")],
        "scalars": (np.float32(0.1), np.int8(-3), np.bool_(True), np.datetime64("2020-01-01")),
        "small scalar": ml_dtypes.bfloat16(1.5),
        "empty": [{}, [], (), [[]]],
    }
    arrays = {
        "0-d": np.array(3.5),
        "empty": np.zeros((0, 4), "int32"),
        "fortran": np.asfortranarray(np.arange(12, dtype="int16").reshape(3, 4)),
        "channels last": np.arange(120, dtype="int32").reshape(2, 4, 5, 3).transpose(0, 3, 1, 2),
        "every other": np.arange(20, dtype="uint8")[::2],
        "reversed": np.arange(5, dtype="float64")[::-1],
        "long": eighths("float32", 1024).reshape(8, 32),
    }
    collisions = {
        "a.b": np.array([1], "int8"),
        "a": {"b": np.array([2], "int8")},
        "0": np.array([3], "int8"),
        0: np.array([4], "int8"),
        "['a.b']": np.array([5], "int8"),
    }
    optimizer = Optimizer({"beta": 0.9, "moments": [np.arange(3.0), np.ones(2)], "of": tied})
    nested = {"tied": tied, "layers": ({"w": tied}, {"w": np.arange(4, dtype="uint16")})}
    state = {"keys": keys, "plain": plain, "arrays": arrays, **collisions}
    state |= {"nested": nested, "optimizer": optimizer, "inside": [Optimizer({"o": optimizer})]}
    metrics = {"loss": 0.125, "diverged": float("nan"), "best": float("-inf")}
    return [Save(123456789012, state, 3, metrics)]


def segments() -> list[Save]:
    tensors = {
        "ramp": eighths("float32", 1900),
        "odd": small_integers("uint8", 701),
        "wide": noise(12 * 70).view("V12"),
        "noise": noise(900, seed=2).view("uint16"),
        "after": small_integers("int64", 800),
        "tiny": np.array([1.0]),
    }
    return [Save(5, tensors)]


def steps() -> list[Save]:
    frozen, moving = eighths("float32", 640), small_integers("int32", 640)
    first = {"frozen": frozen, "moving": moving, "step": 300}
    second = {"frozen": frozen, "moving": moving + 1, "step": 400, "new": np.array([7])}
    return [Save(300, first, 0), Save(400, second, 1)]


def nothing() -> list[Save]:
    return [Save(0, {})]


def example() -> list[Save]:
    w = np.array([1.0, -2.0, 0.5], "float32")
    state = {"w": w, "tied": w, "optimizer": Optimizer({"lr": 0.5})}
    return [Save(7, state, 1, {"loss": 0.25})]


# Increments: steps that refer to the files of those before.


def weights_like(nbytes: int, seed: int) -> np.ndarray:
    """Exponents that compress, fractions that don't."""
    both = [noise(nbytes // 2, seed), small_integers("uint8", nbytes // 2)]
    return np.stack(both, axis=1).reshape(-1).view(ml_dtypes.bfloat16)


def unchanged() -> list[Save]:
    """Step 2 changes a chunk of a table and a counter, step 3 nothing, step 4 the other chunk."""
    frozen, table, count = weights_like(6000, 1), noise(4000).view("uint16"), np.arange(100)
    second, fourth = table.copy(), table.copy()
    second[1500] += 1
    fourth[[0, 1500]] += 1
    first = {"frozen": frozen, "table": table, "count": count}
    later = {"frozen": frozen, "table": second, "count": count + 1}
    last = {"frozen": frozen, "table": fourth, "count": count + 2}
    return [Save(1, first), Save(2, later), Save(3, {**later, "epoch": 2}), Save(4, last)]


def words_of(array: np.ndarray) -> np.ndarray:
    """What a delta sees of an array."""
    width = 4 if array.dtype == np.complex64 else array.dtype.itemsize
    words: np.ndarray = array.view(f"<u{width}")
    return words


def coarse(kind: Any, seed: int, nbytes: int = DELTA_NBYTES) -> np.ndarray:
    """Elements of few different bytes, all but the lowest of each alike."""
    array: np.ndarray = np.full(nbytes, 60, "uint8").view(kind)
    words_of(array)[:] += noise(words_of(array).size, seed) % 2
    return array


def moved(array: np.ndarray, seed: int, share: float, size: int) -> np.ndarray:
    """Some of an array's words, a `share` of all, moved by up to `size`, modulo their width."""
    array, numbers = array.copy(), random.Random(seed)
    words = words_of(array)
    for _ in range(int(words.size * share)):
        step = numbers.randrange(-size, size + 1) % 2 ** (8 * words.itemsize)
        words[numbers.randrange(words.size)] += np.array(step, words.dtype)
    return array


def chains() -> list[Save]:
    """Deltas of every width, one upon the other; and tensors of which some chunks stay."""
    kinds = {"one": "uint8", "two": ml_dtypes.bfloat16, "four": "float32", "eight": "float64"}
    kinds |= {"complex": "complex64", "big-endian": ">i4", "settled": "float32"}
    state = {name: coarse(kind, at) for at, (name, kind) in enumerate(kinds.items())}
    state |= {"frozen": coarse("float32", 8), "half": coarse("int32", 9, DELTA_NBYTES + NBYTES)}
    saves = [Save(1, state)]
    for step in range(2, 5):
        before, state = state, dict(state)
        for at, name in enumerate(("one", "two", "four", "eight", "complex", "big-endian")):
            state[name] = moved(before[name], step, 0.03, 100 if name == "one" else at + 1)
        if step == 2:
            state["settled"] = moved(before["settled"], step, 0.05, 3)
        half = state["half"] = before["half"].copy()
        half[: DELTA_NBYTES // 4] = moved(half[: DELTA_NBYTES // 4], step, 0.05, 2)
        saves.append(Save(step, state))
    return saves


def planes() -> list[Save]:
    """A base as it is, in one plane; and deltas of which the planes differ in kind."""
    before = noise(DELTA_NBYTES, 3).view("int64")
    after = before + noise(before.size, 4) - 128  # a plane of noise
    after += (noise(before.size, 5) % 5).astype("int64") - 2 << 16  # one for zstd
    after[::9] += 1 << 40  # a sparse one
    return [Save(1, {"w": before}), Save(2, {"w": after})]


# Copies: tensors that are others rounded.

LEAF_NBYTES = 1 << 17  # of float32, of which the rounding is a leaf


def masters(seed: int, count: int) -> np.ndarray:
    """Few different numbers: ties, what becomes subnormal or infinite, and what isn't a number."""
    bits = [0x3F808000, 0x3F818000, 0xBF7FFFFF, 0x38800000, 0x33C00001, 0x80000001, 0x477FF000]
    bits += [0x7FC00000, 0xFF800000, 0x3D4CCCCD, 0xC0490FDB, 0x7F7FFFFF, 0x33000000, 0x387FF000]
    numbers = random.Random(seed)
    table = np.array(bits, "uint32")
    return table[[numbers.randrange(len(bits)) for _ in range(count)]].view("float32")


def narrow(array: np.ndarray, kind: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype(kind)


def copies() -> list[Save]:
    """Copies of both types, whole and in part, and what looks like one; then some masters move."""
    long, short, part = masters(1, 40960), masters(2, 4096), masters(3, 70000)
    unlike = narrow(part, np.float16)
    unlike[-1] = 7
    state = {"long": narrow(long, ml_dtypes.bfloat16), "master": {"long": long, "short": short}}
    state |= {"short": [narrow(short, kind) for kind in (np.float16, ml_dtypes.bfloat16)]}
    state |= {"moment": long[::-1].copy(), "part": unlike, "wide": part}
    again = dict(state)
    moved_long = long.copy()
    moved_long[:20000:999] = 0.5
    again["master"] = {"long": moved_long, "short": short}
    again["long"] = narrow(moved_long, ml_dtypes.bfloat16)
    return [Save(1, state), Save(2, again)]


DERIVED = [
    Case("copies", copies, "auto", LEAF_NBYTES, full_every=8),
    Case("copies", copies, "delta", LEAF_NBYTES, full_every=8),
]

INCREMENTS = [
    *(Case("unchanged", unchanged, codec, 2000, full_every=8) for codec in ("auto", "raw")),
    Case("chains", chains, "delta", DELTA_NBYTES, full_every=3),
    Case("planes", planes, "delta", DELTA_NBYTES, full_every=4),
]


# Sealed ones: raw bytes, frames, chains of deltas, and derived chunks with their sources.

KEY = bytes(range(32))
SEALED = [
    Case("example", example, "raw", key=KEY),
    Case("unchanged", unchanged, "auto", 2000, full_every=8, key=KEY),
    Case("planes", planes, "delta", DELTA_NBYTES, full_every=4, key=KEY),
    Case("copies", copies, "delta", LEAF_NBYTES, full_every=8, key=KEY),
]


# Turned elements.


def floats_like_weights(kind: Any, nbytes: int, seed: int) -> np.ndarray:
    """Signs and fractions of noise, and few exponents."""
    array: np.ndarray = noise(nbytes, seed).view(kind)
    words = words_of(array)
    low = 8 * words.itemsize - 9  # the exponent's lowest bit
    words &= words.dtype.type(~(0xFF << low) % 2 ** (8 * words.itemsize))
    words |= (120 + noise(words.size, seed + 1) % 4).astype(words.dtype) << words.dtype.type(low)
    return array


def turned() -> list[Save]:
    """What is turned, what isn't, and what of the first stays in one plane."""
    tensors = {
        "four": floats_like_weights("float32", 2000, 1),
        "two": floats_like_weights(ml_dtypes.bfloat16, 1000, 3),
        "complex": floats_like_weights("complex64", 1600, 5),
        "half": eighths("float16"),
        "double": eighths("float64"),
        "big-endian": floats_like_weights("float32", 1000, 7).astype(">f4"),
        "noise": noise(1000, 9).view("float32"),
        "one": np.array([-0.5], "float32"),
    }
    tensors["four"][:6] = [np.inf, -np.inf, np.nan, -0.0, 0.0, -1.5]
    tensors["four"].view("uint32")[6] = 0xFFA00001  # a signalling NaN with a sign and a payload
    return [Save(1, tensors)]


def bases() -> list[Save]:
    """Deltas, which aren't turned, upon chunks that are; one chunk stays as it was."""
    kinds = {"four": "float32", "two": ml_dtypes.bfloat16, "frozen": ml_dtypes.bfloat16}
    state = {
        name: floats_like_weights(kind, DELTA_NBYTES, at)
        for at, (name, kind) in enumerate(kinds.items())
    }
    saves = [Save(1, state)]
    for step in (2, 3):
        state = dict(state)
        for name in ("four", "two"):
            state[name] = moved(state[name], step, 0.03, 2)
        saves.append(Save(step, state))
    return saves


TURNED = [
    Case("turned", turned, "zstd"),
    Case("bases", bases, "delta", DELTA_NBYTES, full_every=3),
]

CASES = [
    *(
        Case(f.__name__, f, codec)
        for f in (integers, floats, small, text)
        for codec in FAMILY_CODECS
    ),
    *(Case("structure", structure, codec) for codec in ("auto", "raw")),
    *(Case("segments", segments, codec, 600, 1500) for codec in ("auto", "raw")),
    Case("steps", steps, "auto"),
    Case("nothing", nothing, "auto"),
    Case("example", example, "raw"),
]
