"""Which ranks there are: as the caller says, else as the program and its launcher do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from gpuckpt.errors import InvalidError
from gpuckpt.groups import Alone, Group
from gpuckpt.groups.c10d import torch_ranks
from gpuckpt.groups.coordination import jax_ranks
from gpuckpt.groups.instore import store_ranks
from gpuckpt.groups.mpi import mpi_ranks
from gpuckpt.stores import Store

# Of each launcher, the variables of a process's number and of how many there are.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)
_MODULES = {"torch": "torch.distributed", "jax": "jax", "mpi": "mpi4py.MPI"}
_WORDS = ("torch", "jax", "mpi", "store", "alone")


def as_group(
    group: object,
    *,
    store: Store,
    environment: Mapping[str, str],
    modules: Mapping[str, Any],
    name: str = "gpuckpt",
) -> Group:
    """The ranks that `group` means, which may be what a user passes as `group=`.

    That is a `Group`, a process group of torch.distributed, a communicator of
    mpi4py, "torch", "jax", "mpi", "store", "alone", or None: see `detect`.
    `store` is where ranks meet that have no other place, `environment` is
    `os.environ`, and `modules` `sys.modules`: nothing is imported that isn't there.
    Every rank calls this, with the same `name`; two groups of one process that
    begin at the same time need two names.

    Raises:
        InvalidError: it means nothing, or what it means isn't initialised.
    """
    if group is None:
        return detect(store=store, environment=environment, modules=modules, name=name)
    if isinstance(group, str):
        return _by_word(group, store, environment, modules, name)
    if (dist := modules.get("torch.distributed")) and isinstance(
        group, getattr(dist, "ProcessGroup", ())
    ):
        return torch_ranks(group, name)
    if (mpi := modules.get("mpi4py.MPI")) and isinstance(group, mpi.Comm):
        return mpi_ranks(group, name)
    if all(hasattr(group, one) for one in ("rank", "size", "all_gather", "barrier")):
        return cast(Group, group)
    raise InvalidError(
        "group= takes a gpuckpt.Group, a process group of torch.distributed, a communicator of "
        f"mpi4py, or one of {', '.join(map(repr, _WORDS))}; got {group!r}"
    )


def detect(
    *, store: Store, environment: Mapping[str, str], modules: Mapping[str, Any], name: str
) -> Group:
    """The ranks of this program: the first that there are of these.

    torch.distributed, if it is initialised; jax.distributed, if it is; MPI, if
    mpi4py has initialised it and there are several ranks; several processes, by
    their launcher's variables, which meet in the store; else this process alone.
    """
    if _torch_is_there(modules):
        return torch_ranks(name=name)
    if _jax_is_there(modules):
        return jax_ranks(name)
    if _mpi_is_there(modules):
        return mpi_ranks(name=name)
    rank, size = ranks_of(environment, modules)
    return Alone() if size == 1 else store_ranks(store, rank, size, environment, name)


def ranks_of(environment: Mapping[str, str], modules: Iterable[str]) -> tuple[int, int]:
    """This process's number and how many there are, by its launcher's variables; 0 of 1 if none.

    What a notebook's kernel inherits isn't about it.  Nor is what Slurm gives
    the shell or the script of a job, which is no task of a step: it has a job,
    and no step.

    Raises:
        InvalidError: the variables make no sense.
    """
    if "ipykernel" in modules:
        return 0, 1
    is_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    for rank, size in _LAUNCHERS:
        slurm = rank.startswith("SLURM")
        if rank in environment and size in environment and not (slurm and is_script):
            return _numbers(environment, rank, size)
    return 0, 1


def _numbers(environment: Mapping[str, str], rank: str, size: str) -> tuple[int, int]:
    try:
        found = int(environment[rank]), int(environment[size])
    except ValueError:
        found = -1, 0
    if not 0 <= found[0] < found[1]:
        raise InvalidError(
            f"{rank}={environment[rank]!r} and {size}={environment[size]!r} in the environment "
            "are no rank and number of ranks; set them, unset them, or pass group="
        )
    return found


def _by_word(
    word: str, store: Store, environment: Mapping[str, str], modules: Mapping[str, Any], name: str
) -> Group:
    if word in _MODULES and _MODULES[word] not in modules:
        raise InvalidError(
            f"group={word!r}, and the program hasn't imported {_MODULES[word]}; import it, and "
            "initialise it, first"
        )
    if word == "torch":
        return torch_ranks(name=name)
    if word == "jax":
        return jax_ranks(name)
    if word == "mpi":
        return mpi_ranks(name=name)
    if word == "store":
        rank, size = ranks_of(environment, ())
        return store_ranks(store, rank, size, environment, name)
    if word == "alone":
        return Alone()
    raise InvalidError(f"group= is one of {', '.join(map(repr, _WORDS))}, got {word!r}")


def _torch_is_there(modules: Mapping[str, Any]) -> bool:
    dist = modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _jax_is_there(modules: Mapping[str, Any]) -> bool:
    distributed = modules.get("jax._src.distributed")
    return distributed is not None and distributed.global_state.client is not None


def _mpi_is_there(modules: Mapping[str, Any]) -> bool:
    mpi = modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return False
    return bool(mpi.COMM_WORLD.size > 1)
