"""What frameworks keep in their checkpoints, as what a state may hold, and back without loss.

Sets, enums, dataclasses and the like become lists, texts and dicts, at the
same places and so under the same names; `notes` beside them say what they
were.  All that has no such form is refused.  Nothing is made of a class that
the caller hasn't named.
"""

from __future__ import annotations

import dataclasses
import enum
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from pathlib import PosixPath
from types import SimpleNamespace
from typing import Any

from gpuckpt.arrays import look_all
from gpuckpt.errors import FormatError, InvalidError, UnsupportedError
from gpuckpt.names import plain_name
from gpuckpt.structure import DEPTH_LIMIT, Path
from gpuckpt.values import NotPlainError, encode_value

# Where the notes are, beside what they are about.
NOTES = "gpuckpt.types"


@dataclass(frozen=True, slots=True)
class Form:
    """How things of exactly the class `kind` are written.

    `plain` gives something plainer and what else is to be known, a plain
    value; `again` makes the thing of the two.  `plain` raises `ValueError` if
    this one can't be written so.
    """

    name: str
    kind: type
    plain: Callable[[Any], tuple[Any, Any]]
    again: Callable[[Any, Any], Any]


FORMS: tuple[Form, ...] = (
    Form("set", set, lambda thing: (list(thing), None), lambda tree, _: set(tree)),
    Form(
        "frozenset", frozenset, lambda thing: (list(thing), None), lambda tree, _: frozenset(tree)
    ),
    Form("path", PosixPath, lambda thing: (str(thing), None), lambda tree, _: FilePath(tree)),
    Form(
        *("namespace", Namespace),
        *(lambda thing: (dict(vars(thing)), None), lambda tree, _: Namespace(**tree)),
    ),
    Form(
        *("simple namespace", SimpleNamespace),
        *(lambda thing: (dict(vars(thing)), None), lambda tree, _: SimpleNamespace(**tree)),
    ),
    Form(
        *("ordered", OrderedDict),
        *(lambda thing: (_items(thing), None), lambda tree, _: OrderedDict(tree)),
    ),
)


def forms_of(types: Iterable[type], known: Iterable[Form] = ()) -> dict[type, Form]:
    """The forms that are always there, those of a framework, and those of a caller's classes.

    `types` are enums, dataclasses, named tuples, and subclasses of dict that
    can be made of a dict.

    Raises:
        InvalidError: a class is none of these, or two have one name.
    """
    found = {form.kind: form for form in (*FORMS, *known)}
    for kind in types:
        form = _form_of(kind)
        if any(form.name == other.name for other in found.values() if other.kind is not kind):
            raise InvalidError(f"types: two classes are called {form.name}")
        found[kind] = form
    return found


def split(tree: Any, forms: Mapping[type, Form]) -> tuple[Any, list[Any]]:
    """`tree` as containers, arrays and plain values, and the notes; arrays are the same ones.

    Raises:
        UnsupportedError: it names the path of a thing that can't be written.
    """
    notes: list[Any] = []
    return _split(tree, (), forms, notes), notes


def join(tree: Any, notes: Iterable[Any], forms: Mapping[type, Form]) -> Any:
    """Undo `split`.

    Raises:
        InvalidError: a class isn't among `forms`; it names the class.
        FormatError: the notes don't fit what they are about.
    """
    by_name = {form.name: form for form in forms.values()}
    known: dict[Path, tuple[Form, Any]] = {}
    for path, name, extra in notes:
        if name not in by_name:
            raise InvalidError(
                f"{plain_name(path)} was saved from the class {name}; pass types=[…] with it"
            )
        known[tuple(path)] = by_name[name], extra
    try:
        return _join(tree, (), known)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise FormatError(f"what was saved isn't what it says that it is: {error}") from error


def _split(node: Any, path: Path, forms: Mapping[type, Form], notes: list[Any]) -> Any:
    if len(path) > DEPTH_LIMIT:
        raise UnsupportedError(plain_name(path[:4]), f"nested deeper than {DEPTH_LIMIT} levels")
    form = forms.get(type(node))
    if form is not None:
        try:
            node, extra = form.plain(node)
        except ValueError as error:
            raise UnsupportedError(plain_name(path), str(error)) from None
        notes.append([path, form.name, extra])
    if type(node) is dict:
        for key in node:
            _check_plain(key, (*path,), "has a key that is")
        return {key: _split(child, (*path, key), forms, notes) for key, child in node.items()}
    if type(node) in (list, tuple):
        children = [_split(child, (*path, at), forms, notes) for at, child in enumerate(node)]
        return children if type(node) is list else tuple(children)
    if not look_all(node, "it"):
        _check_plain(node, path, "is")
    return node


def _check_plain(value: Any, path: Path, verb: str) -> None:
    try:
        encode_value(value)
    except NotPlainError as error:
        raise UnsupportedError(
            plain_name(path),
            f"{verb} {error}, which can't be saved without pickling it; leave it out, or, if it "
            "is an enum, a dataclass, a named tuple or a dict, pass types=[…] with its class",
        ) from None


def _join(node: Any, path: Path, known: Mapping[Path, tuple[Form, Any]]) -> Any:
    if type(node) is dict:
        node = {key: _join(child, (*path, key), known) for key, child in node.items()}
    elif type(node) in (list, tuple):
        node = type(node)([_join(child, (*path, at), known) for at, child in enumerate(node)])
    if path not in known:
        return node
    form, extra = known[path]
    return form.again(node, extra)


def _items(thing: OrderedDict[Any, Any]) -> dict[Any, Any]:
    if vars(thing):
        raise ValueError(f"an OrderedDict with attributes ({', '.join(vars(thing))})")
    return dict(thing)


def _form_of(kind: type) -> Form:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if issubclass(kind, enum.Enum):
        return Form(name, kind, _member, lambda tree, _: kind[tree])
    if dataclasses.is_dataclass(kind):
        return Form(name, kind, _fields, lambda tree, _: _with_fields(kind, tree))
    if issubclass(kind, tuple) and hasattr(kind, "_make"):
        make = kind._make
        return Form(name, kind, lambda thing: (tuple(thing), None), lambda tree, _: make(tree))
    if issubclass(kind, dict):
        return Form(name, kind, lambda thing: (dict(thing), None), lambda tree, _: kind(tree))
    raise InvalidError(
        f"types: {name} is no enum, dataclass, named tuple or subclass of dict; leave it out"
    )


def _member(thing: enum.Enum) -> tuple[Any, Any]:
    if thing.name not in type(thing).__members__:
        raise ValueError(f"{thing!r} is no member of its enum")
    return thing.name, None


def _fields(thing: Any) -> tuple[Any, Any]:
    names = [field.name for field in dataclasses.fields(thing)]
    if set(getattr(thing, "__dict__", ())) - set(names):
        raise ValueError(f"a {type(thing).__qualname__} with attributes beside its fields")
    return {name: getattr(thing, name) for name in names}, None


def _with_fields(kind: type, fields: Mapping[str, Any]) -> Any:
    """As it was, without what its `__init__` may do besides; frozen ones too."""
    thing: Any = object.__new__(kind)
    for name in (field.name for field in dataclasses.fields(kind)):
        object.__setattr__(thing, name, fields[name])
    return thing
