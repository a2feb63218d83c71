"""Batches: a DataLoader that goes on in the middle of an epoch; and torchdata's own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.stores.memory import MemoryStore

torch: Any = pytest.importorskip("torch")

from torch.utils import data  # noqa: E402 - only where there is a torch

import gpuckpt.torch as adapter  # noqa: E402


class Numbers(data.Dataset):
    """It counts what it is asked for, and draws noise from every generator there is."""

    def __init__(self, *, noise: bool = False) -> None:
        self.asked, self.noise = 0, noise

    def __len__(self):
        return 26

    def __getitem__(self, index):
        self.asked += 1
        noise = random.random() + np.random.rand() + torch.rand(()).item() if self.noise else 0
        return torch.tensor(index + noise, dtype=torch.float64)


class Stream(data.IterableDataset):
    def __iter__(self):
        return iter(torch.arange(26.0))


LOADERS = {
    "shuffled": lambda: data.DataLoader(Numbers(), 4, shuffle=True),
    "shuffled, with noise": lambda: data.DataLoader(Numbers(noise=True), 4, shuffle=True),
    "shuffled by its own generator": lambda: data.DataLoader(
        Numbers(noise=True), 4, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "drawn with replacement": lambda: data.DataLoader(
        Numbers(), 4, sampler=data.RandomSampler(Numbers(), replacement=True, num_samples=50)
    ),
    "weighted": lambda: data.DataLoader(
        Numbers(),
        batch_sampler=data.BatchSampler(
            data.WeightedRandomSampler(
                list(range(1, 27)), 40, generator=torch.Generator().manual_seed(1)
            ),
            4,
            drop_last=True,
        ),
    ),
    "one by one": lambda: data.DataLoader(Numbers(), batch_size=None, shuffle=True),
    "a stream": lambda: data.DataLoader(Stream(), 4),
}


def state_of(batches: Any) -> dict[str, Any]:
    return {"data": batches, "rng": gpuckpt.RNG()}


def draws() -> float:
    """As a training step draws, between two batches."""
    return random.random() + float(np.random.rand()) + float(torch.rand(()))


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def given_out(batches: Any, stop: int, done: int = 0, epochs: int = 3) -> list[Any]:
    """What steps `done` to `stop` see, each with what it draws."""
    seen: list[Any] = []
    for epoch in range(batches.epoch, epochs):
        for batch in batches:
            seen.append((epoch, batch.tolist(), draws()))
            if done + len(seen) == stop:
                return seen
    return seen


@pytest.mark.parametrize("name", LOADERS)
def test_an_epoch_goes_on_with_the_batches_that_were_left(name):
    seed(0)
    whole = given_out(adapter.Batches(LOADERS[name]()), 10**6)
    count = len(whole) // 3
    for stop in (1, 3, count - 1, count, count + 2, 2 * count, 3 * count - 1):
        seed(0)
        before, store = adapter.Batches(LOADERS[name]()), MemoryStore()
        seen = given_out(before, stop)
        gpuckpt.save("", state_of(before), step=stop, store=store)
        seed(99)
        after = adapter.Batches(LOADERS[name]())
        with gpuckpt.Checkpointer("", store=store) as ckpt:
            ckpt.resume(state_of(after))
        assert seen + given_out(after, 10**6, stop) == whole, stop


def test_batches_that_were_given_out_are_not_loaded_again():
    seed(0)
    before = adapter.Batches(LOADERS["shuffled"]())
    given_out(before, 5)
    state = before.state_dict()
    after = adapter.Batches(LOADERS["shuffled"]())
    after.load_state_dict(state)
    given_out(after, 6, 5)
    assert after.loader.dataset.asked == 4


def test_of_a_stream_they_are():
    before = adapter.Batches(LOADERS["a stream"]())
    assert [batch for _, batch, _ in given_out(before, 2)][1] == [4.0, 5.0, 6.0, 7.0]
    after = adapter.Batches(LOADERS["a stream"]())
    after.load_state_dict(before.state_dict())
    assert given_out(after, 3, 2)[0][1] == [8.0, 9.0, 10.0, 11.0]


def test_workers_give_out_the_same_batches():
    def made():
        return adapter.Batches(data.DataLoader(Numbers(), 4, shuffle=True, num_workers=1))

    seed(0)
    whole = given_out(made(), 9, epochs=2)
    seed(0)
    before, store = made(), MemoryStore()
    seen = given_out(before, 4)
    gpuckpt.save("", state_of(before), store=store)
    after = made()
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        ckpt.resume(state_of(after))
    assert seen + given_out(after, 9, 4) == whole


def test_it_says_how_many_batches_an_epoch_has_and_where_it_is():
    batches = adapter.Batches(LOADERS["shuffled"]())
    assert len(batches) == 7
    given_out(batches, 9)
    assert (batches.epoch, batches.position) == (1, 2)


def test_an_epoch_that_was_left_begins_anew_for_who_iterates_again():
    batches = adapter.Batches(LOADERS["a stream"]())
    next(iter(batches))
    assert next(iter(batches)).tolist() == [4.0, 5.0, 6.0, 7.0]
    assert batches.position == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_stateful_loader_of_torchdata_goes_on_where_it_was():
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def made():
        return stateful.StatefulDataLoader(Numbers(), 4, shuffle=True)

    def seen_by(loader, epochs):
        return [batch.tolist() for _ in range(epochs) for batch in loader]

    seed(0)
    whole = seen_by(made(), 1)
    seed(0)
    before, store, batches = made(), MemoryStore(), []
    for batch in before:
        batches.append(batch.tolist())
        if len(batches) == 3:
            break
    gpuckpt.save("", {"data": before}, store=store)
    after = made()
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        ckpt.resume({"data": after})
    assert batches + seen_by(after, 1) == whole
