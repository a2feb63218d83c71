"""Nothing that a file says can become code: the package has none of the calls for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpuckpt

PACKAGE = Path(gpuckpt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Modules that make objects, or code, of bytes.
MODULES = {
    *("pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
    *("yaml", "jsonpickle", "imp", "runpy", "code", "codeop", "pty", "xmlrpc"),
}
# Built-in functions, or methods of these names on anything but `re`.
CALLS = {"eval", "exec", "compile", "__import__", "execfile", "input"}
# As methods too: of any module, or of a thing that came out of a file.
METHODS = {
    *("import_module", "load_module", "exec_module", "find_spec", "literal_eval", "system"),
    *("run_path", "run_module", "spec_from_file_location", "run_code", "popen"),
}
LOADERS = {"CDLL", "PyDLL", "LoadLibrary", "dlopen", "WinDLL"}
# Where a library is loaded, and what says which: ours, beside the package, and
# what the interpreter has loaded anyway.
LOADS = {
    "native.py": 'LIBRARY = Path(__file__).parent / "_native.so"\n',
    "stores/room.py": "ctypes.CDLL(None, ",
}


def forbidden(tree: ast.AST, name: str) -> Iterator[str]:
    """What of a module could make code of a file, line by line."""
    for node in ast.walk(tree):
        for found in _found(node, name):
            yield f"{name}:{getattr(node, 'lineno', 0)}: {found}"


def _found(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from {alias.name.split(".")[0] for alias in node.names} & MODULES
    elif isinstance(node, ast.ImportFrom):
        yield from {(node.module or "").split(".")[0]} & MODULES
        yield from {alias.name for alias in node.names} & (MODULES | METHODS | CALLS)
    elif isinstance(node, ast.Name):
        yield from {node.id} & (CALLS | (set() if name in LOADS else LOADERS))
    elif isinstance(node, ast.Attribute):
        yield from {node.attr} & (METHODS | (set() if name in LOADS else LOADERS))
        of_re = isinstance(node.value, ast.Name) and node.value.id == "re"
        yield from {node.attr} & CALLS - ({"compile"} if of_re else set())
    elif isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "shell"}:
        yield node.arg
    elif isinstance(node, ast.Call) and _loads(node.func) and not _is_safe(node, name):
        yield f"{ast.unparse(node.func)}(…)"


def _loads(called: ast.expr) -> bool:
    """Whether it is `load` or `loads` of anything but JSON."""
    if not isinstance(called, ast.Attribute) or called.attr not in {"load", "loads"}:
        return False
    return not (isinstance(called.value, ast.Name) and called.value.id == "json")


def _is_safe(call: ast.Call, name: str) -> bool:
    """Whether an adapter or conversion has torch read data that can't be code, as it promises."""
    asked = any(ast.unparse(one) == "weights_only=True" for one in call.keywords)
    may = name.startswith(("adapters/", "conversion/"))
    return may and ast.unparse(call.func) == "torch.load" and asked


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_can_run_code_from_a_file(path):
    name = str(path.relative_to(PACKAGE))
    assert not list(forbidden(ast.parse(path.read_text()), name))


@pytest.mark.parametrize(
    "text",
    [
        *("import pickle", "import os, marshal", "from shelve import open", "import yaml"),
        *("from _pickle import loads", "import cloudpickle as c", "eval(x)", "exec(x)"),
        *("compile(x, '', 'exec')", "__import__(x)", "f = eval", "builtins.exec(x)"),
        *("importlib.import_module(x)", "from importlib import import_module", "os.system(x)"),
        *("np.load(f)", "np.load(f, allow_pickle=True)", "torch.load(f)", "yaml.load(f)"),
        *("ctypes.CDLL(path)", "from ctypes import CDLL; CDLL(p)", "ctypes.cdll.LoadLibrary(p)"),
        *("runpy.run_path(p)", "subprocess.run(x, shell=True)", "ast.literal_eval(x)"),
    ],
)
def test_each_way_to_run_code_from_a_file_would_be_found(text):
    assert list(forbidden(ast.parse(text), "any.py"))


@pytest.mark.parametrize("text", ["re.compile(x)", "json.loads(x)", "import numpy", "x.loading(y)"])
def test_what_runs_no_code_is_not_found(text):
    assert not list(forbidden(ast.parse(text), "any.py"))


@pytest.mark.parametrize("name", ["adapters/dcp/any.py", "conversion/any.py", "any.py"])
@pytest.mark.parametrize("text", ["torch.load(x)", "torch.load(x, weights_only=safe)"])
def test_only_adapters_load_with_torch_and_only_weights(name, text):
    assert list(forbidden(ast.parse(text), name))
    safe = list(forbidden(ast.parse("torch.load(x, weights_only=True)"), name))
    assert bool(safe) == (name == "any.py")


def test_the_only_libraries_that_are_loaded_have_fixed_places():
    calls = {
        f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).removeprefix("ctypes.") in {"Native", *LOADERS}
    }
    assert calls == {
        "native.py: ctypes.CDLL(str(path))",
        "native.py: ctypes.PyDLL(str(path))",
        "native.py: Native(LIBRARY)",
        "stores/room.py: ctypes.CDLL(None, use_errno=True)",
    }
    for name, line in LOADS.items():
        assert line in (PACKAGE / name).read_text()
