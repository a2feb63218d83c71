"""`python build.py LIBRARY`: compile the loops beside this file into one shared library.

Takes `CC` (else cc, gcc or clang, the first that is there) and, after its own,
the flags in `CFLAGS`.  Appears as a whole or not at all, also to a process
that has an older one in use.  Exits with 1, and says why, if it can't.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# Nothing here may depend on the machine that compiles, or round otherwise than numpy.
FLAGS = "-std=c11 -O3 -g0 -fPIC -shared -fvisibility=hidden -ffp-contract=off -Wall -Wextra"
LIMIT_SECONDS = 120


def compiler() -> list[str]:
    """The compiler's command; empty if there is none."""
    if given := os.environ.get("CC"):
        return shlex.split(given)
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), [])


def build(library: Path) -> str | None:
    """Compile; None, or why that isn't possible."""
    command = compiler()
    if not command:
        return "no C compiler"
    sources = [str(path) for path in sorted(HERE.glob("*.c"))]
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".native-") as room:
        made = Path(room) / library.name
        flags = [*FLAGS.split(), *shlex.split(os.environ.get("CFLAGS", ""))]
        words = [*command, *flags, "-o", str(made), *sources]
        try:
            done = subprocess.run(  # noqa: S603 - the user's own compiler
                words, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
            )
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)
        if done.returncode:
            return f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}"
        made.replace(library)
    return None


def main() -> int:
    """Compile to the path that is given."""
    failure = build(Path(sys.argv[1]).absolute())
    if failure:
        print(failure, file=sys.stderr)  # noqa: T201 - a command's output
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
