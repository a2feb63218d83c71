"""All peers by name, each in its best documented configuration."""

from __future__ import annotations

from functools import partial

from bench.peers.of_google import Orbax, Tensorstore
from bench.peers.of_gpuckpt import Gpuckpt
from bench.peers.of_numpy import CloneThread, Savez
from bench.peers.of_safetensors import CloneThread as CloneThreadSafetensors
from bench.peers.of_safetensors import SaveFile
from bench.peers.of_torch import Distributed, TorchSave, Torchsnapshot
from bench.peers.of_torch_checkpointing import TorchCheckpointing
from bench.peers.of_zipnn import Zipnn
from bench.peers.peer import Description

RIVALS = ("clone_thread_safetensors", "clone_thread_numpy")  # ratios are to the first that ran


def catalogue() -> tuple[Description, ...]:
    """gpuckpt, the ten-line rivals, then the others."""
    torch, safetensors = ("torch",), ("torch", "safetensors")
    return (
        *_gpuckpt(),
        Description(
            "clone_thread_safetensors",
            CloneThreadSafetensors,
            "ten lines: clone into kept memory, thread, safetensors.torch.save_file, fsync",
            safetensors,
            ("safetensors.torch",),
            syncs=True,
        ),
        Description(
            "clone_thread_numpy",
            CloneThread,
            "ten lines: np.copyto into kept memory, thread, one plain file, fsync",
            ("numpy",),
            syncs=True,
        ),
        Description(
            "safetensors",
            SaveFile,
            "save_file, load_file",
            safetensors,
            ("safetensors.torch",),
            background=False,
        ),
        Description(
            "torch_save",
            TorchSave,
            "torch.save, load(weights_only=True)",
            torch,
            torch,
            background=False,
        ),
        Description(
            "dcp_sync",
            partial(Distributed, how="sync"),
            "torch.distributed.checkpoint.save, FileSystemWriter",
            torch,
            ("torch.distributed.checkpoint",),
            background=False,
        ),
        Description(
            "dcp_async_thread",
            partial(Distributed, how="thread"),
            "async_save by a thread, DefaultStager with kept memory",
            torch,
            ("torch.distributed.checkpoint",),
        ),
        Description(
            "dcp_async_process",
            partial(Distributed, how="process"),
            "async_save by a process, DefaultStager with kept shared memory",
            torch,
            ("torch.distributed.checkpoint",),
        ),
        Description(
            "torch_checkpointing",
            TorchCheckpointing,
            "CheckpointManager.save, its default: copied by a thread, written by a process",
            ("torch-checkpointing", "torch"),
            ("torch_checkpointing",),
        ),
        Description(
            "orbax_async",
            Orbax,
            "StandardCheckpointer (OCDBT, zstd), immutable jax.Arrays: nothing to copy",
            ("orbax-checkpoint", "jax"),
            ("jax", "orbax.checkpoint"),
        ),
        Description(
            "torchsnapshot_async",
            Torchsnapshot,
            "Snapshot.async_take",
            ("torchsnapshot", "torch"),
            ("torchsnapshot",),
        ),
        Description(
            "tensorstore_async",
            Tensorstore,
            "zarr3 in OCDBT, one transaction, not compressed",
            ("tensorstore",),
            ("tensorstore",),
        ),
        Description(
            "zipnn",
            Zipnn,
            "ZipNN with a thread a core, own file",
            ("zipnn",),
            ("zipnn",),
            background=False,
        ),
        Description("numpy_savez", Savez, "np.savez, np.load", ("numpy",), background=False),
    )


def description_of(name: str) -> Description:
    """The peer of this name.

    Raises:
        ValueError: there is none.
    """
    for one in catalogue():
        if one.name == name:
            return one
    raise ValueError(f"no peer is called {name}: {', '.join(one.name for one in catalogue())}")


def _gpuckpt() -> list[Description]:
    copied, held = ("auto", "raw", "zstd", "delta"), ("auto", "raw")
    kinds = [*((codec, "copy") for codec in copied), *((codec, "hold") for codec in held)]
    return [
        Description(
            f"gpuckpt_{codec}_{snapshot}",
            partial(Gpuckpt, codec=codec, snapshot=snapshot),
            f'Checkpointer(codec="{codec}", snapshot="{snapshot}")',
            ("numpy", "zstandard", "xxhash"),
            syncs=True,
        )
        for codec, snapshot in kinds
    ]
