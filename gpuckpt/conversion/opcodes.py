"""Python's pickles, read as the data that they are: nothing of one is ever called or imported.

A pickle is a program for a small stack machine ("PEP 307", "PEP 3154", and
the standard library's `pickletools`, whose table of opcodes splits it here).
Where it asks for a class or a function, there is a `Name`; where it asks for a
call, a `Call` that says what was to be called with what.  It is for the caller
to know some of these, and to refuse all others.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gpuckpt.errors import CheckpointError, CorruptError


@dataclass(frozen=True, slots=True)
class Name:
    """A class or a function, by what it is called; it isn't looked for."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Something that lies elsewhere: `key` says where (`persistent_id`)."""

    key: Any


@dataclass(slots=True, eq=False)
class Items:
    """A dict, as the pairs that were put in."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Call:
    """What `what(*args)` would be, with the state and the pairs that it was given then."""

    what: Any
    args: Any
    state: Any = None
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


class _Mark:
    """Where a run of values begins on the stack."""


_MARK = _Mark()


def read_pickle(data: bytes, where: str) -> Any:
    """What a pickle says; `where` is what errors call it.

    Takes memory in proportion to the pickle's length.

    Raises:
        CorruptError: it is no pickle, or does what data needn't.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        return machine.result()
    except CheckpointError:
        raise
    except Exception as error:
        raise CorruptError(
            where,
            f"no pickle of plain data ({type(error).__name__}: {str(error)[:200]})",
            "take the file anew from where it was written",
        ) from error


class _Machine:
    """The stack machine, without what would reach out of it."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        """What is left at the end."""
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise ValueError(f"{len(self._stack)} values are left at its end")
        return self._stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        """Do what one opcode asks for."""
        if opcode in _PUSHES:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode]())
        elif opcode in _TUPLES:
            self.push_tuple([self.pop() for _ in range(_TUPLES[opcode])][::-1])
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in _NOTHING:
            raise ValueError(f"the opcode {opcode}")

    def pop(self) -> Any:
        """The last value."""
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def top(self) -> Any:
        """The last value, which stays."""
        value = self._stack[-1]
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def pop_run(self) -> list[Any]:
        """All from the last mark on."""
        run: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            run.append(value)
        return run[::-1]

    def push_tuple(self, values: list[Any]) -> None:
        """A tuple."""
        self._stack.append(tuple(values))

    def push_list(self, values: list[Any]) -> None:
        """A list."""
        self._stack.append(values)

    def append(self, values: list[Any]) -> None:
        """Put values at the end of the list that is last."""
        target = self.top()
        if not isinstance(target, list):
            raise TypeError(f"values are appended to a {type(target).__name__}")
        target.extend(values)

    def set(self, values: list[Any]) -> None:
        """Put keys and values, in turn, into what is last."""
        target = self.top()
        if not isinstance(target, Items | Call) or len(values) % 2:
            raise ValueError(f"pairs are put into a {type(target).__name__}")
        target.pairs.extend(zip(values[::2], values[1::2], strict=True))

    def push_items(self, values: list[Any]) -> None:
        """A dict."""
        self._stack.append(Items())
        self.set(values)

    def call(self) -> None:
        """What a call would give."""
        args, what = self.pop(), self.pop()
        self._stack.append(Call(what, args))

    def build(self) -> None:
        """Give what is last but one the state that is last."""
        state, target = self.pop(), self.top()
        if not isinstance(target, Call) or target.state is not None:
            raise TypeError(f"a state is given to a {type(target).__name__}")
        target.state = state

    def name(self, text: str) -> None:
        """A class or a function: module and name."""
        module, _, name = text.partition(" ")
        self._stack.append(Name(module, name))

    def name_of_stack(self) -> None:
        """The same, of which the last two values say the parts."""
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name that is no text")
        self._stack.append(Name(module, name))

    def pair(self) -> list[Any]:
        """A key and its value."""
        value, key = self.pop(), self.pop()
        return [key, value]

    def memoize(self, number: int | None) -> None:
        """Note the last value, by the next number or another."""
        self._memo[len(self._memo) if number is None else number] = self.top()

    def recall(self, number: int) -> None:
        """A value that was noted."""
        self._stack.append(self._memo[number])

    def stored(self) -> None:
        """What lies elsewhere."""
        self._stack.append(Stored(self.pop()))

    def push_mark(self) -> None:
        """The beginning of a run of values."""
        self._stack.append(_MARK)


# Opcodes whose argument is the value.
_PUSHES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING", "STRING"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": Items,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = {"PROTO", "FRAME", "STOP"}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda m, _: m.push_mark(),
    "TUPLE": lambda m, _: m.push_tuple(m.pop_run()),
    "LIST": lambda m, _: m.push_list(m.pop_run()),
    "DICT": lambda m, _: m.push_items(m.pop_run()),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_run()),
    "SETITEM": lambda m, _: m.set(m.pair()),
    "SETITEMS": lambda m, _: m.set(m.pop_run()),
    "GLOBAL": lambda m, text: m.name(text),
    "STACK_GLOBAL": lambda m, _: m.name_of_stack(),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.stored(),
    "MEMOIZE": lambda m, _: m.memoize(None),
    "BINPUT": lambda m, number: m.memoize(number),
    "LONG_BINPUT": lambda m, number: m.memoize(number),
    "PUT": lambda m, number: m.memoize(number),
    "BINGET": lambda m, number: m.recall(number),
    "LONG_BINGET": lambda m, number: m.recall(number),
    "GET": lambda m, number: m.recall(number),
}


def is_call(value: Any, *names: str) -> bool:
    """Whether it is a call of one of these, by `module.name`."""
    return isinstance(value, Call) and isinstance(value.what, Name) and str(value.what) in names
