"""States that are changed by chance between two looks at them, in every way that was thought of."""

from __future__ import annotations

import random
import types
import warnings
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tests.strategies import Array


class Box:
    """An object that answers with another dict each time, of the same leaves."""

    asked = 0

    def __init__(self, items: Any) -> None:
        self.items = items

    def state_dict(self) -> dict[Any, Any]:
        self.asked += 1
        return dict(self.items)

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        raise AssertionError


class Interface:
    """An array of a library that speaks only the array interface."""

    def __init__(self, array: Array) -> None:
        self.__array_interface__ = array.__array_interface__
        self.array = array


class Subclass(np.ndarray):
    """An array of another type."""


Pair = namedtuple("Pair", "a b")  # noqa: PYI024 - states have such ones, too

KEYS: tuple[Any, ...] = (
    *("a", "b", "a.b", "", 0, 1, 2, True, False, 1.0, 0.0, -0.0, None, b"a", ("a", 1), ("a", True)),
    *(np.float32(1), np.str_("a"), np.int64(1), 1 + 0j),
)
VALUES: tuple[Any, ...] = (0, 1, True, 1.0, 0.0, -0.0, float("nan"), None, "a", b"a", 2**70, 1j)
SCALARS: tuple[Any, ...] = (np.float32(1), np.float64(1), np.int64(1), np.datetime64(5, "ms"))
LAYOUTS: tuple[tuple[str, tuple[int, ...]], ...] = (
    *(("f4", (2, 3)), ("f4", (2, 3)), ("f4", (3, 2)), ("f4", (6,)), ("i4", (6,)), (">f4", (6,))),
    *(("V4", (6,)), ("M8[1000us]", (3,)), ("M8[ms]", (3,)), ("i8", (3,)), ("f4", ()), ("f4", (0,))),
    *(("f4", (0, 3)), ("f4", (0,)), ("c8", (3,)), ("u1", (1, 1)), ("S3", (8,))),
)
FORMS = ("dict", "OrderedDict", "UserDict", "proxy", "list", "tuple", "Pair", "Box", "Subdict")


class Subdict(dict[Any, Any]):
    """A dict of another type."""


class Play:
    """A state that is changed by chance; its containers are made anew at every `build`.

    A node is a number of a leaf, or a form of container with its items.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.memory = [np.zeros(64, np.uint8) for _ in range(3)]
        self.leaves = [self.leaf() for _ in range(6)]
        self.root = ["dict", [[key, self.node(2)] for key in ("x", "y", 3)]]

    def leaf(self) -> Any:
        kind = self.rng.random()
        if kind < 0.25:
            return self.rng.choice((*VALUES, *SCALARS))
        dtype, shape = self.rng.choice(LAYOUTS)
        if kind < 0.35:
            return np.broadcast_to(np.zeros((), dtype), shape)
        start = self.rng.choice((0, 8, 16))
        memory = self.rng.choice(self.memory)[start : start + 24]
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = memory[:count].view(dtype).reshape(shape) if count else np.empty(shape, dtype)
        if kind < 0.45:
            array = array.T
        if kind < 0.5:
            array = array[::-1] if array.ndim else array
        if kind < 0.55:
            array.flags.writeable = False
        return array if kind < 0.8 else self.dressed(array, kind)

    def dressed(self, array: Array, kind: float) -> Any:
        if kind < 0.84:
            return Interface(array)
        if kind < 0.88:
            return array.view(Subclass)
        if kind < 0.92:
            return array.astype(ml_dtypes.bfloat16) if array.dtype.kind == "f" else array
        return array.copy()

    def node(self, depth: int) -> Any:
        if not depth or self.rng.random() < 0.4:
            return self.rng.randrange(len(self.leaves))
        count = self.rng.randrange(4)
        return [self.rng.choice(FORMS), [[k, self.node(depth - 1)] for k in self.keys(count)]]

    def keys(self, count: int) -> list[Any]:
        return list(dict.fromkeys(self.rng.choice(KEYS) for _ in range(count)))

    def build(self) -> Any:
        return self._build(self.root)

    def _build(self, node: Any) -> Any:
        if isinstance(node, int):
            return self.leaves[node]
        form, items = node
        children = [self._build(child) for _, child in items]
        if form in ("list", "tuple"):
            return list(children) if form == "list" else tuple(children)
        if form == "Pair":
            return Pair(children, children[:1])
        made = dict(zip((key for key, _ in items), children, strict=True))
        wrap: dict[str, Any] = {
            "OrderedDict": OrderedDict,
            "UserDict": UserDict,
            "proxy": types.MappingProxyType,
            "Box": Box,
            "Subdict": Subdict,
        }
        return wrap[form](made) if form in wrap else made

    def containers(self) -> list[Any]:
        found, left = [], [self.root]
        while left:
            node = left.pop()
            if isinstance(node, list):
                found.append(node)
                left += [child for _, child in node[1]]
        return found

    def change(self) -> None:
        """Change one thing, or nothing."""
        at, node = self.rng.randrange(len(self.leaves)), self.rng.choice(self.containers())
        items = node[1]
        changes: list[Callable[[], object]] = [
            lambda: None,
            lambda: self.leaves.__setitem__(at, self.leaf()),
            lambda: self.leaves.__setitem__(at, self.moved(self.leaves[at])),
            lambda: self.reshape(self.leaves[at]),
            lambda: self.leaves.__setitem__(at, self.retyped(self.leaves[at])),
            lambda: self.rng.shuffle(items),
            lambda: node.__setitem__(0, self.rng.choice(FORMS)),
            lambda: node.__setitem__(1, [[k, self.node(1)] for k in self.keys(3)]),
            lambda: items and items[0].__setitem__(1, self.node(1)),
            lambda: self.rename(items),
            lambda: items and items.pop(),
        ]
        self.rng.choice(changes)()

    def moved(self, leaf: Any) -> Any:
        """The same array in other memory, or the same memory by another array."""
        if not isinstance(leaf, np.ndarray):
            return leaf
        return self.rng.choice((leaf.copy(order="K"), leaf[...], leaf.view(type(leaf))))

    def retyped(self, leaf: Any) -> Any:
        if type(leaf) is not np.ndarray or not leaf.flags.c_contiguous or leaf.dtype.itemsize != 4:
            return leaf
        return leaf.view(self.rng.choice(("i4", "f4", ">f4", "V4")))

    def reshape(self, leaf: Any) -> None:
        if type(leaf) is np.ndarray and leaf.flags.c_contiguous and leaf.size == 6:
            with warnings.catch_warnings():  # numpy would have it done no more, but it is
                warnings.simplefilter("ignore", DeprecationWarning)
                leaf.shape = self.rng.choice(((6,), (2, 3), (3, 2), (6, 1)))

    def rename(self, items: list[Any]) -> None:
        (key,) = self.keys(1)
        if items and key not in {other for other, _ in items[1:]}:
            items[0][0] = key
