"""`python -m bench.durability COMMAND …`: campaigns that are too long for the tests.

`kills` kills thousands of processes, and `ranks` one of four that save together;
`reboots` looks at every file system that losses of power could leave; `flips`
flips bits in files and in memory; `requests` strikes each request to an object
store.  `COMMAND --help` says more.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

# A command is the module of that name, which has `main(words)` and a docstring.
COMMANDS = ("kills", "ranks", "reboots", "flips", "requests")


def main() -> int:
    """Hand the words on to the command."""
    parser = argparse.ArgumentParser("python -m bench.durability", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    options = parser.parse_args(sys.argv[1:2])
    command = import_module(f"bench.durability.{options.command}")
    status: int = command.main(sys.argv[2:])
    return status


if __name__ == "__main__":
    sys.exit(main())
