"""A board of files, for ranks that are processes of one machine."""

from __future__ import annotations

import time
from pathlib import Path


class FileBoard:
    """Values in files of one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, key: str, value: bytes) -> None:
        path = self.root / key.replace("/", "-")
        path.with_suffix(".new").write_bytes(value)
        path.with_suffix(".new").rename(path)

    def wait(self, key: str, timeout: float) -> bytes | None:
        path, end = self.root / key.replace("/", "-"), time.monotonic() + timeout
        while not path.exists():
            if time.monotonic() > end:
                return None
            time.sleep(0.005)
        return path.read_bytes()

    def remove(self, key: str) -> None:
        (self.root / key.replace("/", "-")).unlink(missing_ok=True)
