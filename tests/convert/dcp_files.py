"""Directories of torch.distributed.checkpoint, as several ranks would have left them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.boxes import Box

torch = pytest.importorskip("torch", reason="needs torch")


def write_chunked(folder: Path, tensors: Mapping[str, tuple[Any, Sequence[Box]]]) -> Path:
    """Each box of a tensor in the file of another rank, and the metadata of all of them."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir(parents=True, exist_ok=True)
    described, stored = {}, {}
    for name, (tensor, boxes) in tensors.items():
        chunks = []
        for rank, box in enumerate(boxes):
            file = f"__{rank}_0.distcp"
            with (folder / file).open("ab") as out:
                begin = out.tell()
                torch.save(tensor[box.slices].clone(), out)
                index = MetadataIndex(name, box.offset, rank)
                stored[index] = _StorageInfo(file, begin, out.tell() - begin)
            chunks.append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)))
        properties = TensorProperties(dtype=tensor.dtype)
        described[name] = TensorStorageMetadata(properties, tensor.size(), chunks)
    metadata = Metadata(described, {name: (name,) for name in tensors}, stored)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder
