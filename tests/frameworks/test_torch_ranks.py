"""`gpuckpt.torch.training` in several processes: DistributedDataParallel, FSDP2."""

from __future__ import annotations

import pytest

from tests.launch import launch

pytest.importorskip("torch")

TRAIN = "tests.frameworks.torch_workers:train"


def digests(directory, root, *, kind, stop, seed=0):
    arguments = {"kind": kind, "root": str(root), "stop": stop, "seed": seed}
    found = launch("torch", TRAIN, 2, directory, arguments, timeout=150)
    assert [one.error for one in found] == [None, None], found[0].output + found[1].output
    return [one.value for one in found]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_that_resume_end_with_the_bits_of_ranks_that_went_on(tmp_path, kind):
    whole = digests(tmp_path / "a", tmp_path / "whole", kind=kind, stop=5)
    digests(tmp_path / "b", tmp_path / "parts", kind=kind, stop=3)
    assert digests(tmp_path / "c", tmp_path / "parts", kind=kind, stop=5, seed=1) == whole
