"""What a command's `--help` says: what it reads and changes, its exit codes, examples."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

SECTIONS = ("Reads:", "Changes:", "Exit codes:", "Examples:")
# What click takes as "leave these lines as they are".
_AS_IT_IS = "\b"


def page(  # noqa: PLR0917 (its sections, in order)
    summary: str,
    about: str,
    reads: str,
    changes: str,
    exits: Mapping[int, str],
    examples: Sequence[str],
) -> str:
    """A command's help: `summary` is a sentence short enough for a list of commands.

    Exit code 2, that it couldn't be carried out, is every command's.
    """
    codes = {**exits, 2: "it couldn't be carried out, and a line on stderr says why"}
    told = "; ".join(f"{code} {codes[code]}" for code in sorted(codes))
    shown = "\n".join(["Examples:", *(f"  $ {one}" for one in examples)])
    parts = [summary, *_paragraphs(about), f"Reads: {reads}.", f"Changes: {changes}."]
    return "\n\n".join([*parts, f"Exit codes: {told}.", f"{_AS_IT_IS}\n{shown}"])


def _paragraphs(text: str) -> list[str]:
    every = textwrap.dedent(text).strip().split("\n\n")
    return [" ".join(one.split()) for one in every if one.strip()]
