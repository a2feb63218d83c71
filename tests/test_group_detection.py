"""Which ranks there are: what counts, what doesn't, and what `group=` takes."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from gpuckpt.errors import InvalidError
from gpuckpt.groups import Alone, Group
from gpuckpt.groups.detect import as_group
from gpuckpt.groups.meeting import Meeting
from gpuckpt.groups.threads import MemoryBoard
from gpuckpt.stores.memory import MemoryStore

TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


def found(
    group: object = None, modules: Mapping[str, Any] | None = None, **environment: str
) -> Any:
    return as_group(
        group, store=MemoryStore(), environment=environment, modules=modules or {}, name="g"
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "4"},
        {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_RANK": "2", "PMI_SIZE": "4"},
        {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"},
        TASK | {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"},
        TASK | {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "64"},
        # The launcher below the other one knows better.
        TASK | {"SLURM_PROCID": "0", "SLURM_NTASKS": "9", "RANK": "2", "WORLD_SIZE": "4"},
    ],
)
def test_a_launchers_variables_make_ranks_that_meet_in_the_store(environment):
    group = found(**environment)
    assert isinstance(group, Meeting)
    assert (group.rank, group.size) == (2, 4)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "4"},
        # The script of a job, and the shell of an allocation.
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
        TASK | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
    ],
)
def test_a_process_that_is_no_rank_is_alone(environment):
    assert isinstance(found(**environment), Alone)


def test_a_notebook_in_an_allocation_is_alone():
    environment = TASK | {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert isinstance(found(modules={"ipykernel": object()}, **environment), Alone)


def test_a_notebook_can_say_that_it_is_a_rank():
    group = found("store", {"ipykernel": object()}, RANK="0", WORLD_SIZE="4")
    assert (group.rank, group.size) == (0, 4)


@pytest.mark.parametrize(("rank", "size"), [("4", "4"), ("-1", "4"), ("x", "4"), ("0", "")])
def test_variables_that_make_no_sense_are_refused_by_name(rank, size):
    with pytest.raises(InvalidError, match=r"RANK='.*' and WORLD_SIZE='.*' .* or pass group="):
        found(RANK=rank, WORLD_SIZE=size)


def test_frameworks_that_are_imported_and_not_initialised_do_not_count():
    modules = {
        "torch.distributed": SimpleNamespace(
            is_available=lambda: True, is_initialized=lambda: False
        ),
        "jax._src.distributed": SimpleNamespace(global_state=SimpleNamespace(client=None)),
        "mpi4py.MPI": SimpleNamespace(
            Is_initialized=lambda: True,
            Is_finalized=lambda: False,
            COMM_WORLD=SimpleNamespace(size=1),
        ),
    }
    assert isinstance(found(modules=modules), Alone)


@pytest.mark.parametrize("word", ["torch", "jax", "mpi"])
def test_a_framework_that_is_not_there_is_not_imported(word):
    with pytest.raises(InvalidError, match=f"group='{word}', and the program hasn't imported"):
        found(word)


@pytest.mark.parametrize("group", [Alone(), Meeting(MemoryBoard(), 1, 2)])
def test_a_group_is_taken_as_it_is(group: Group):
    assert found(group, RANK="0", WORLD_SIZE="4") is group


@pytest.mark.parametrize("group", ["ranks", 3, object(), SimpleNamespace(rank=0, size=1)])
def test_what_is_no_group_is_refused(group):
    with pytest.raises(InvalidError, match="'torch', 'jax', 'mpi', 'store', 'alone'"):
        found(group)


def test_runs_of_two_jobs_have_two_names_and_ranks_of_one_job_one():
    def run(**environment: str) -> str:
        group = found("store", None, RANK="1", WORLD_SIZE="2", **environment)
        return str(group._member._run)

    assert run(SLURM_JOB_ID="1") == run(SLURM_JOB_ID="1", SLURM_STEP_ID="3", MASTER_ADDR="a")
    assert len({run(), run(SLURM_JOB_ID="1"), run(SLURM_JOB_ID="2"), run(GPUCKPT_RUN="x")}) == 4
