"""The engine with one wait, order, reference or release less.

`find` lists, by their syntax, all places of the engine that wait, order one stream after another,
keep memory for a transfer, or give a slot back. `apply` has the next import of their module leave
one of them out; the sources stay as they are.

`python -m tests.cuda.mutants SCENARIO [MUTANT]` plays a scenario in a process of its own: exit
code 0 if all was right, 1 if something was wrong.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2] / "gpuckpt"
MODULES = (
    *sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("devices/*.py")),
    *("arena.py", "background.py", "checkpointer.py", "encoder.py", "inventory.py", "reading.py"),
    "saving.py",
    *("restore.py", "save.py", "snapshot.py", "staging.py"),
)
# Calls whose results nobody uses: they are there to wait, to order, or to let others go on.
METHODS = {
    *(
        "_arrived",
        "_set_staged",
        "begin_uploads",
        "end_downloads",
        "eventRecord",
    ),
    *("finish_uploads", "follow_callers", "give", "join", "lead_callers", "notify"),
    *("order_update", "record", "release", "set", "settle"),
    *(
        "streamWaitEvent",
        "synchronize",
        "wait",
        "wait_event",
        "wait_for",
        "wait_out",
    ),
}
FUNCTIONS = {"finish", "staged"}
STATE = {"_last"}  # says who waits for what
KEPT = {"_keep", "_owners", "_values"}  # is there to keep something
GUARDS = {"_given_back", "stream", "turn"}  # of a `with`

Site = tuple[str, Callable[[], None]]


@functools.cache
def find() -> dict[str, tuple[str, int]]:
    """All mutants by name: a module, and which of its places."""
    found: dict[str, tuple[str, int]] = {}
    for module in MODULES:
        names = [name for name, _ in _sites(_tree(module))]
        often, seen = Counter(names), Counter[str]()
        for at, name in enumerate(names):
            seen[name] += 1
            number = f" (no. {seen[name]})" if often[name] > 1 else ""
            found[f"{module.removesuffix('.py')}: {name}{number}"] = (module, at)
    return found


def apply(mutant: str) -> None:
    """Have a module imported with one place left out."""
    module, at = find()[mutant]
    tree = _tree(module)
    _, leave_out = list(_sites(tree))[at]
    leave_out()
    code = compile(ast.fix_missing_locations(tree), str(PACKAGE / module), "exec")
    name = f"gpuckpt.{module.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"
    sys.meta_path.insert(0, Finder(name, str(PACKAGE / module), code))


class Loader(importlib.machinery.SourceFileLoader):
    """Loads code that is there already."""

    def __init__(self, name: str, path: str, code: Any) -> None:
        super().__init__(name, path)
        self._code = code

    def get_code(self, fullname: str) -> Any:
        return self._code


class Finder:
    """Finds the one module that is mutated."""

    def __init__(self, name: str, path: str, code: Any) -> None:
        self._name, self._path, self._code = name, path, code

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> Any:
        if name != self._name:
            return None
        loader = Loader(name, self._path, self._code)
        return importlib.util.spec_from_file_location(name, self._path, loader=loader)


def _tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text("utf-8"))


def _sites(tree: ast.Module) -> Iterator[Site]:
    """Each place of a module that can be left out, and how to."""
    for where, body, statement in _statements(tree, ""):
        for what, leave_out in _of_statement(where, body, statement):
            yield f"{where}: {what}", leave_out


def _statements(node: ast.AST, where: str) -> Iterator[tuple[str, list[Any], ast.stmt]]:
    """Every statement with the function that it is in, and the block of which it is part."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        where = f"{where}.{node.name}".lstrip(".")
    for _, field in ast.iter_fields(node):
        for child in list(field) if isinstance(field, list) else ():
            if isinstance(child, ast.stmt):
                yield where, field, child
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                yield from _statements(child, where)


def _of_statement(where: str, body: list[Any], statement: ast.stmt) -> Iterator[Site]:
    def drop() -> None:
        body[body.index(statement)] = ast.Pass()

    if isinstance(statement, ast.Expr) and _is_order(where, statement.value):
        yield ast.unparse(statement), drop
    elif isinstance(statement, ast.Assign | ast.AugAssign) and "__init__" not in where:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        if any(STATE & _words(target) for target in targets):
            yield ast.unparse(statement), drop
    if isinstance(statement, ast.If) and "main_thread" in ast.unparse(statement.test):
        yield f"if {ast.unparse(statement.test)}", _always(statement)
    if isinstance(statement, ast.Assign):
        yield from _of_assignment(statement, drop)
    elif isinstance(statement, ast.With):
        yield from _of_with(statement)
    if not isinstance(statement, ast.ClassDef | ast.FunctionDef):
        yield from _of_calls(statement)


def _is_order(where: str, value: ast.expr) -> bool:
    if not isinstance(value, ast.Call):
        return False
    if isinstance(value.func, ast.Name):
        return value.func.id in FUNCTIONS
    assert isinstance(value.func, ast.Attribute)
    return value.func.attr in METHODS or (value.func.attr, where) == ("append", "caller_streams")


def _of_assignment(statement: ast.Assign, drop: Callable[[], None]) -> Iterator[Site]:
    """What is kept isn't; or what is let go of stays."""
    (target,), value = statement.targets[:1], statement.value
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    values = (
        value.elts if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [value]
    )
    for one, kept in zip(targets, values, strict=False):
        if not KEPT & _words(one):
            continue
        if ast.unparse(kept) in ("()", "None"):
            yield ast.unparse(statement), drop
        elif isinstance(kept, ast.Tuple):
            for at in range(1, len(kept.elts)):
                yield (
                    f"{ast.unparse(one)} keeps {ast.unparse(kept.elts[at])}",
                    _nothing(kept.elts, at),
                )
        elif isinstance(value, ast.Tuple):
            at = values.index(kept)
            yield f"{ast.unparse(one)} keeps {ast.unparse(kept)}", _nothing(value.elts, at, ())


def _of_with(statement: ast.With) -> Iterator[Site]:
    for item in statement.items:
        called = item.context_expr
        function = called.func if isinstance(called, ast.Call) else called
        if {function.attr if isinstance(function, ast.Attribute) else ""} & GUARDS or (
            isinstance(function, ast.Name) and function.id in GUARDS
        ):
            yield f"with {ast.unparse(called)}", _no_guard(item)


def _of_calls(statement: ast.stmt) -> Iterator[Site]:
    """Arguments that keep something, that say how to wait or what to do with what is left."""
    for call in _calls(statement):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
        for at in range(2, len(call.args) if name == "CudaTransfer" else 0):
            yield f"CudaTransfer keeps {ast.unparse(call.args[at])}", _nothing(call.args, at)
        for keyword in call.keywords if name == "ordered_map" else ():
            if keyword.arg == "drop":
                yield "ordered_map(drop=drop)", _removed(call.keywords, keyword)
        if name == "steps" and isinstance(call.func, ast.Attribute):
            yield ast.unparse(call), _used(call)


def _calls(statement: ast.stmt) -> Iterator[ast.Call]:
    """The calls of a statement, without those of the statements inside."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from (node for node in ast.walk(child) if isinstance(node, ast.Call))


def _words(node: ast.AST) -> set[str]:
    """The attributes that an expression names, without those in its indices."""
    if isinstance(node, ast.Tuple):
        return set().union(*map(_words, node.elts))
    if isinstance(node, ast.Subscript):
        return _words(node.value)
    if isinstance(node, ast.UnaryOp):
        return _words(node.operand)
    return {node.attr} if isinstance(node, ast.Attribute) else set()


def _nothing(places: list[ast.expr], at: int, value: object = None) -> Callable[[], None]:
    empty = ast.Tuple([], ast.Load()) if value == () else ast.Constant(None)
    return lambda: places.__setitem__(at, empty)


def _removed(places: list[Any], one: Any) -> Callable[[], None]:
    return lambda: places.remove(one)


def _always(statement: ast.If) -> Callable[[], None]:
    return lambda: setattr(statement, "test", ast.Constant(value=True))


def _no_guard(item: ast.withitem) -> Callable[[], None]:
    nothing = ast.parse("__import__('contextlib').nullcontext()", mode="eval").body
    return lambda: setattr(item, "context_expr", nothing)


def _used(call: ast.Call) -> Callable[[], None]:
    """`steps` that don't wait for each other if one is refused."""

    def leave_out() -> None:
        assert isinstance(call.func, ast.Attribute)
        call.func.attr, call.args = "used", call.args[:1]

    return leave_out


def play(scenario: str, mutant: str = "") -> bool:
    """Whether all is right in a scenario; with a mutant it is played up to three times."""
    if mutant:
        apply(mutant)
    from tests.cuda.scenarios import SCENARIOS

    try:
        return all(SCENARIOS[scenario].run() for _ in range(3 if mutant else 1))
    except BaseException:
        traceback.print_exc(limit=-1)
        return False


def main() -> int:
    from tests.cuda_on_cpu import standin

    standin.install_from_environment()
    return 0 if play(*sys.argv[1:]) else 1


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a mutant's threads may hang
