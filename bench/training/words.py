"""Pairs of texts that belong together, as the numbers of their word pieces.

From the standard library's sources: a function's name and arguments, and the
beginning of its docstring.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.training.runs import Array

PAD, UNKNOWN, BEGIN, END = 0, 100, 101, 102
_LONGEST = 32
_WORD = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")


def pairs(vocabulary: Path, tokens: int, most: int = 4000) -> tuple[Array, Array]:
    """int64[n, tokens] twice, filled up with `PAD`: at most `most` pairs, in the files' order."""
    pieces = {word: at for at, word in enumerate(vocabulary.read_text("utf-8").splitlines())}
    found = []
    for names, text in _documented():
        found.append((_row(names, pieces, tokens), _row(text, pieces, tokens)))
        if len(found) == most:
            break
    left, right = zip(*found, strict=True)
    return np.array(left, np.int64), np.array(right, np.int64)


def _documented() -> Iterator[tuple[str, str]]:
    """Functions' names with their arguments, and their docstrings."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node) or ""
            if len(text) >= 30:
                names = (path.stem, node.name, *(one.arg for one in node.args.args))
                yield " ".join(names), text


def _row(text: str, pieces: dict[str, int], tokens: int) -> list[int]:
    numbers = [BEGIN]
    for word in _WORD.findall(text.lower().replace("_", " ")):
        numbers += _split(word, pieces)
        if len(numbers) >= tokens:
            break
    numbers = [*numbers[: tokens - 1], END]
    return numbers + [PAD] * (tokens - len(numbers))


def _split(word: str, pieces: dict[str, int]) -> list[int]:
    """Greedily, the longest piece first, as BERT's tokenizer."""
    numbers, at = [], 0
    while at < len(word):
        for end in range(min(len(word), at + _LONGEST), at, -1):
            piece = pieces.get(("##" if at else "") + word[at:end])
            if piece is not None:
                break
        else:
            return [UNKNOWN]
        numbers.append(piece)
        at = end
    return numbers
