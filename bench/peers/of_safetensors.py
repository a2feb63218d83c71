"""safetensors: plainly, and as the strongest rival, ten lines around it."""

from __future__ import annotations

import threading
from pathlib import Path

from bench.peers.cache import Arrays
from bench.peers.files import sync
from bench.peers.of_torch import OfTorch


class SaveFile(OfTorch):
    """`safetensors.torch.save_file` and `load_file`."""

    def begin(self, step: int) -> None:
        """Write all of it."""
        from safetensors.torch import save_file

        save_file(self.tensors, self.place(step))

    def restore(self, step: int) -> Arrays:
        """Into new tensors."""
        from safetensors.torch import load_file

        return self.arrays_of(load_file(self.place(step)))


class CloneThread(SaveFile):
    """Clone into kept memory, start a thread, `save_file`, fsync."""

    def __init__(self, arrays: Arrays, directory: Path) -> None:
        super().__init__(arrays, directory)
        import safetensors.torch  # noqa: F401 - so that the first save needn't

        self._kept = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self._thread = threading.Thread()
        self._failure: BaseException | None = None

    def begin(self, step: int) -> None:
        """Copy, and start the thread."""
        for name, kept in self._kept.items():
            kept.copy_(self.tensors[name])
        self._thread = threading.Thread(target=self._write, args=(self.place(step),))
        self._thread.start()

    def _write(self, path: Path) -> None:
        from safetensors.torch import save_file

        try:
            save_file(self._kept, path)
            sync(path)
            sync(path.parent)
        except BaseException as error:
            self._failure = error

    def finish(self) -> None:
        """Join the thread."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
