"""The commands' help as a page: `python -m gpuckpt.cli.manual > docs/guides/cli.md`."""

from __future__ import annotations

import sys
from typing import Any

import typer

_HEAD = """\
# The command line

`gpuckpt`, or `python -m gpuckpt`. A root is a directory, or the URL of one in an object store \
([STORES.md](../STORES.md)). Every command has `--json`, for scripts: facts on standard output, \
NaN and infinities as words. In a terminal, tables leave out columns until they fit it; in a \
pipe they are whole, a row on a line.

Exit codes: 0 all is well; 1 it found what one wouldn't want (damage, a loss, a difference where \
`--exit-code` asks for it); 2 it couldn't be carried out, and one line on standard error says why.

`gpuckpt --install-completion` makes bash, zsh, fish and PowerShell complete commands and \
options.

This page is made from what `--help` says: `python -m gpuckpt.cli.manual > docs/guides/cli.md`.
"""


def manual(app: typer.Typer) -> str:
    """All commands in the order of `--help`, each with its text and its options, as Markdown."""
    group: Any = typer.main.get_group(app)
    return "\n".join([_HEAD, *(_page(name, one) for name, one in group.commands.items())])


def _page(name: str, command: Any) -> str:
    text, _, examples = (command.help or "").partition("\b\nExamples:\n")
    shell = "\n".join(line.strip() for line in examples.strip().splitlines())
    places = [_place(one) for one in command.params if one.param_type_name == "argument"]
    usage = " ".join(["gpuckpt", name, "[OPTIONS]", *places])
    rows = [f"| `{_spelled(one)}` | {_meaning(one)} |" for one in command.params]
    table = "\n".join(["| argument or option | meaning |", "|---|---|", *rows])
    blocks = [f"## {name}", text.strip(), f"```\n{usage}\n```", table, f"```console\n{shell}\n```"]
    return "\n\n".join(blocks) + "\n"


def _place(one: Any) -> str:
    """An argument where it stands: `[B]` may be left out, `ROOTS...` are several."""
    name = one.name.upper() + ("..." if one.nargs == -1 else "")
    return name if one.required else f"[{name}]"


def _spelled(one: Any) -> str:
    if one.param_type_name == "argument":
        return _place(one)
    value = "" if one.is_flag else f" {one.metavar or one.name.upper()}"
    return ", ".join(one.opts) + value


def _meaning(one: Any) -> str:
    found = (one.help or "").replace("|", "\\|")
    if one.param_type_name == "option" and one.required:
        return f"{found} Required."
    shown = not one.required and one.default is not None and not getattr(one, "is_flag", False)
    return f"{found} [default: {one.default}]" if shown else found


if __name__ == "__main__":
    from gpuckpt.cli import app

    sys.stdout.write(manual(app))
