"""What a wheel, and an editable installation, has besides Python: the loops of kernels/cpu.

They are compiled where a C compiler is.  Without one, all is installed the
same but for them, and numpy does their work.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "gpuckpt/_native.so"


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg, misc]
    """Compiles the library into the package, and marks the wheel as one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Compile; where that fails, say so once and go on without."""
        library = Path(self.root, LIBRARY)
        library.unlink(missing_ok=True)
        if os.environ.get("GPUCKPT_NATIVE") == "0":
            return
        script = Path(self.root, "kernels/cpu/build.py")
        command = [sys.executable, str(script), str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own script
        if done.returncode:
            self.app.display_warning(
                f"gpuckpt is installed without its compiled loops; numpy does their work, slower.\n"
                f"{done.stderr}"
            )
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        # Any Python can load it: it isn't an extension module.
        build_data["tag"] = f"py3-none-{re.sub('[-.]', '_', sysconfig.get_platform())}"
