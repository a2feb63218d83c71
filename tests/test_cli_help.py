"""Every command: its help, its JSON, completion, errors in a line, and readers that go away."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import gpuckpt
from gpuckpt.cli import app
from gpuckpt.cli.helping import SECTIONS, page
from gpuckpt.cli.manual import manual
from gpuckpt.cli.tables import Columns, lines_of

COMMANDS = typer.main.get_group(app).commands
GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "cli.md"
# A list of commands shows no more of each.
SUMMARY = 66


@pytest.fixture
def root(tmp_path):
    state = {"w": np.arange(40.0).reshape(5, 8), "v": 1}
    with gpuckpt.Checkpointer(tmp_path / "run", log=True, trace=True, memory="64 MiB") as ckpt:
        for step in (1, 2):
            state["v"] = step
            ckpt.save(step, state).result(60)
    return tmp_path / "run"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_has_every_section(name):
    text = COMMANDS[name].help or ""
    missing = [section for section in SECTIONS if section not in text]
    assert not missing, f"{name}: write its help by `helping.page`"
    assert f"\n  $ gpuckpt {name}" in text
    assert "2 it couldn't be carried out" in text
    assert len(text.splitlines()[0]) <= SUMMARY
    assert all(vars(one)["help"] for one in COMMANDS[name].params), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_shown_as_it_was_written_in_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    shown = CliRunner().invoke(app, [name, "--help"]).stdout
    assert all(len(line) <= 80 for line in shown.splitlines() if "$ gpuckpt" not in line)
    example = next(line for line in (COMMANDS[name].help or "").splitlines() if "$ gpuckpt" in line)
    assert example.strip() in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_speaks_json(name):
    assert any("--json" in one.opts for one in COMMANDS[name].params)


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls", "{root}"),
        ("show", "{root}"),
        ("show", "{root}", "--tree", "--compute"),
        ("verify", "{root}"),
        ("diff", "{root}"),
        ("prune", "{root}", "--keep", "last=5"),
        ("watch", "{root}"),
        ("why-slow", "{root}"),
        ("trace", "{root}", "--out", "{root}.trace"),
        ("repair", "{root}", "--to", "{root}.whole"),
    ],
)
def test_json_is_all_there_is_on_standard_output(root, arguments):
    done = CliRunner().invoke(app, [*(one.format(root=root) for one in arguments), "--json"])
    assert done.exit_code == 0, done.exception
    assert isinstance(json.loads(done.stdout), dict)


def test_a_page_has_its_sections_in_order():
    text = page(
        "It does.", "First.\n\nMore\nof it.", "a", "b", {0: "well", 1: "ill"}, ["gpuckpt x"]
    )
    assert text == (
        "It does.\n\nFirst.\n\nMore of it.\n\nReads: a.\n\nChanges: b.\n\n"
        "Exit codes: 0 well; 1 ill; 2 it couldn't be carried out, and a line on stderr says why."
        "\n\n"
        "\b\nExamples:\n  $ gpuckpt x"
    )


def test_the_guide_is_what_the_commands_say():
    told = "run `python -m gpuckpt.cli.manual > docs/guides/cli.md`"
    assert GUIDE.read_text("utf-8") == manual(app), told


@pytest.fixture
def command(tmp_path):
    """`gpuckpt` on a path of its own, as an installation has it."""
    place = tmp_path / "bin"
    place.mkdir()
    script = place / "gpuckpt"
    script.write_text(f"#!{sys.executable}\nfrom gpuckpt.cli import main\nmain()\n")
    script.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    path = f"{place}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HOME": str(home), "SHELL": "/bin/bash"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_and_options_once_completion_is_installed(command):
    installed = subprocess.run(
        ["bash", "-c", "gpuckpt --install-completion bash"],
        env={**command, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr
    script = """
        source "$HOME/.bashrc"
        complete -p gpuckpt > /dev/null || exit 3
        function=$(complete -p gpuckpt | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        COMP_WORDS=(gpuckpt pr) COMP_CWORD=1; $function gpuckpt; echo "${COMPREPLY[@]}"
        COMP_WORDS=(gpuckpt diff --ex) COMP_CWORD=2; $function gpuckpt; echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", script], env=command, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["prune", "--exit-code"], done.stderr


@pytest.mark.parametrize("arguments", [("show",), ("show", "--json"), ("diff", "--equal")])
def test_a_reader_that_goes_away_ends_a_command_quietly(tmp_path, arguments):
    state = {f"t{at:05}": np.zeros(1, np.float32) for at in range(3000)}
    for step in (1, 2):
        gpuckpt.save(tmp_path, state, step)
    name, *options = arguments
    command = [sys.executable, "-m", "gpuckpt", name, str(tmp_path), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read()
        assert process.wait(60) == 0
    assert told == b""


def test_an_error_is_a_line_whatever_names_it_has(tmp_path):
    command = [sys.executable, "-m", "gpuckpt", "diff", str(tmp_path / "a\x1b[31m\nb")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpuckpt: ")
    assert "\x1b" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_table_fits_by_leaving_out_what_may_go_and_folding_what_may_fold():
    columns = Columns(
        ("name", "size", "more"), left=("name",), optional=("more",), expendable=("more",), least=6
    )
    rows = [("a" * 10, "12", "x" * 20), ("b", "3", "")]
    assert lines_of(columns, rows, 100)[1] == f"{'a' * 10}    12  {'x' * 20}"
    assert lines_of(columns, rows, 16) == [
        "name        size",
        "a" * 10 + "    12",
        "b              3",
    ]
    assert lines_of(columns, rows, 12) == ["name    size", "aaaaaa    12", "aaaa", "b          3"]
    assert lines_of(columns, [("a", "1", "")], 100) == ["name  size", "a        1"]
    assert all(len(line) <= 6 + 2 + 4 for line in lines_of(columns, rows, 1))


def test_a_pipe_gets_whole_rows_and_a_terminal_what_fits(root, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    state = {"a_name_of_many_characters." * 5 + "w": np.zeros(3, np.float32)}
    gpuckpt.save(root, state, 9)
    runner = CliRunner()
    whole = runner.invoke(app, ["show", str(root)]).stdout.splitlines()
    assert any(line.startswith("a_name") and "float32" in line for line in whole)
    monkeypatch.setenv("COLUMNS", "60")
    folded = runner.invoke(app, ["show", str(root)]).stdout.splitlines()[1:-1]
    assert max(map(len, folded)) <= 60
