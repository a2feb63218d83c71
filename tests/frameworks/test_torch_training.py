"""`training` and `attach`: checkpoints in a loop that says nothing about updates."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import gpuckpt
from gpuckpt.stores.memory import MemoryStore

torch: Any = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import gpuckpt.torch as adapter  # noqa: E402 - only where there is a torch
from tests.frameworks.same import frozen  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's of itself
EACH = gpuckpt.Every(steps=1)
WORLD = Path(__file__).parents[2]


class SlowStore(MemoryStore):
    """A store to which nothing is written before `go` is set."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def create(self, *arguments: Any, **options: Any) -> Any:
        assert self.go.wait(60)
        return super().create(*arguments, **options)


class Loop:
    """A small classifier with dropout and batch norm, its optimizer and scheduler."""

    def __init__(self, seed: int = 0, *, width: int = 16, norm: bool = True) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(8, width), *([nn.BatchNorm1d(width)] if norm else []), nn.Dropout(0.3)]
        self.model: Any = nn.Sequential(*layers, nn.Linear(width, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=99)
        data = torch.Generator().manual_seed(7)
        pairs = torch.randn(40, 8, generator=data), torch.randint(0, 4, (40,), generator=data)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*pairs), batch_size=8, shuffle=True
        )
        self.batches = adapter.Batches(loader)

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.batches,
        }

    def train(self, run: Any, stop: int) -> None:
        while run.done < stop:
            for x, y in self.batches:
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(x), y).backward()
                self.optimizer.step()
                self.scheduler.step()
                run.step()
                if run.done == stop:
                    break

    def run(self, store: Any, stop: int, **options: Any) -> Any:
        with adapter.training("", store=store, every=EACH, **self.parts, **options) as run:
            self.train(run, stop)
            return frozen(run.state)


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_a_run_in_pieces_ends_with_the_bits_of_one_in_one_piece(snapshot):
    whole, store = Loop().run(MemoryStore(), 23, snapshot=snapshot), MemoryStore()
    for seed, stop in enumerate((4, 5, 13, 23)):
        pieces = Loop(seed).run(store, stop, snapshot=snapshot)
    assert pieces == whole


def test_a_run_goes_on_compiled_or_not():
    whole, store = Loop().run(MemoryStore(), 9), MemoryStore()
    for seed, stop, compiled in ((0, 3, False), (1, 4, True), (2, 7, True), (3, 9, False)):
        loop = Loop(seed)
        loop.model = torch.compile(loop.model, backend="eager") if compiled else loop.model
        pieces = loop.run(store, stop)
    assert pieces == whole


class Held:
    """A state of more than buffers have room for, held by a save to a store that waits."""

    def __init__(self, *layers: Any, every: int = 1, unseen: Any = (), **parts: Any) -> None:
        self.store, self.model = SlowStore(), nn.Sequential(nn.Linear(2600, 2600), *layers)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        for one in self.model.parameters():
            one.grad = torch.ones_like(one)
        self.run = adapter.training(
            "",
            model=self.model,
            optimizer=[self.optimizer, *unseen],
            store=self.store,
            snapshot="hold",
            memory="26 MiB",
            every=gpuckpt.Every(steps=every),
            **parts,
        )

    def check(self, change: Any, *, waits: bool = True) -> None:
        """Save it, `change` it meanwhile, and see what was saved.  `waits`: for the store, too."""
        then = frozen(self.run.state)
        timer = threading.Timer(0.3, self.store.go.set)
        if waits:
            timer.start()
        with self.run:
            self.run.step()
            change()
            self.store.go.set()
            self.run.checkpointer.wait()
            self.run.checkpointer.restore(self.run.state)
            same = frozen(self.run.state) == then
            assert same  # not the two in it: millions of numbers would be compared for a message


def test_a_step_of_the_optimizer_waits_until_what_is_held_has_been_read():
    held = Held()
    held.optimizer.step()
    held.check(held.optimizer.step)


def test_without_the_hooks_it_would_not_wait_and_the_save_fails_or_has_later_values():
    held = Held()
    held.optimizer.step()
    held.run._hooks.seen.add(0)
    held.run._hooks.remove()
    with pytest.raises(
        (gpuckpt.TornError, AssertionError)
    ):  # as the change comes amid reads, or before
        held.check(held.optimizer.step, waits=False)


def test_buffers_that_a_forward_changes_are_waited_for_too():
    held = Held(nn.BatchNorm1d(2600))
    held.optimizer.step()
    held.check(lambda: held.model(torch.randn(4, 2600)))


class Loader:
    """Data that keeps its state in an array, and changes it there."""

    def __init__(self):
        self.noise = torch.zeros(2600, 2600)

    def state_dict(self):
        return {"noise": self.noise}

    def load_state_dict(self, state):
        self.noise.copy_(state["noise"])


def test_what_is_in_the_state_beside_the_model_is_waited_for_too():
    average, loader = torch.zeros(2600, 2600), Loader()
    for part, changed in (
        ({"others": {"average": average}}, average),
        ({"data": loader}, loader.noise),
    ):
        held = Held(**part)
        held.optimizer.step()
        held.check(lambda changed=changed: changed.add_(1))


def test_an_optimizer_that_announces_nothing_is_waited_for_though_another_one_does():
    unseen = nn.Linear(2, 2)
    held = Held(unseen=[torch.optim.SGD(unseen.parameters(), 0.1)])
    held.optimizer.step()
    held.check(lambda: held.model[0].weight.data.add_(1))


def test_batches_are_not_waited_for():
    held = Held(data=Loop().batches)
    held.optimizer.step()
    held.check(lambda: next(iter(held.run.state["data"])), waits=False)


def test_steps_without_hooks_are_waited_for_when_there_were_others_before():
    held = Held(every=2)
    held.optimizer.step()
    held.run.step()
    compiled = torch.compile(held.optimizer.step, backend="eager")
    compiled()
    held.check(compiled)


def test_a_closure_is_called_after_the_wait():
    loop = Loop(width=512, norm=False)
    loop.optimizer = torch.optim.LBFGS(loop.model.parameters(), max_iter=3)

    def closure():
        loop.optimizer.zero_grad()
        loss = loop.model(torch.ones(4, 8)).square().mean()
        loss.backward()
        return loss

    with adapter.training(
        "",
        model=loop.model,
        optimizer=loop.optimizer,
        store=MemoryStore(),
        snapshot="hold",
        every=EACH,
    ) as run:
        moments = {}
        for step in range(1, 6):
            loop.optimizer.step(closure)
            moments[step] = frozen(run.state["model"])
            run.step()
        for step in (2, 5):
            run.checkpointer.restore(run.state, step)
            assert frozen(run.state["model"]) == moments[step]


def test_several_models_and_optimizers_have_names_and_are_all_hooked():
    one, other = nn.Linear(2, 2), nn.Linear(3, 3)
    parts: dict[str, Any] = {
        "model": {"generator": one, "critic": other},
        "optimizer": {
            "generator": torch.optim.SGD(one.parameters(), 0.1, momentum=0.9),
            "critic": torch.optim.Adam(other.parameters()),
        },
        "others": {"shuffle": torch.Generator(), "best": {"loss": 3.5}},
    }
    store = MemoryStore()
    with adapter.training("", store=store, every=EACH, **parts) as run:
        for optimizer in parts["optimizer"].values():
            assert not run._hooks.all_seen
            optimizer.step()
        assert run._hooks.all_seen
        run.step()
    found = gpuckpt.load("", store=store)
    assert set(found) == {"model", "optimizer", "rng", "shuffle", "best"}
    assert found["model"]["critic"]["weight"].equal(other.weight)
    assert found["best"] == {"loss": 3.5}


def test_a_step_that_the_scaler_skips_changes_and_breaks_nothing():
    loop = Loop(norm=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    with adapter.training(
        "",
        model=loop.model,
        optimizer=loop.optimizer,
        scaler=scaler,
        store=MemoryStore(),
        every=EACH,
    ) as run:
        moments = {}
        for step in range(1, 7):
            loop.optimizer.zero_grad()
            loss = loop.model(torch.full((4, 8), 1e6)).square().sum()
            scaler.scale(loss).backward()
            scaler.step(loop.optimizer)
            scaler.update()
            moments[step] = frozen(run.state)
            run.step()
        assert moments[1]["model"] == moments[2]["model"]  # skipped
        for step in (1, 2, 6):
            run.checkpointer.restore(run.state, step)
            assert frozen(run.state) == moments[step]


def test_hooks_go_with_the_run_and_are_not_there_twice():
    loop = Loop()
    for _ in range(3):
        run = adapter.training("", store=MemoryStore(), **loop.parts)
        assert len(loop.optimizer._optimizer_step_pre_hooks) == 1
        run.close()
        run.close()
        assert not loop.optimizer._optimizer_step_pre_hooks
    with pytest.raises(gpuckpt.ClosedError):
        run.step()
    loop.optimizer.step()


def test_a_run_that_fails_to_open_leaves_neither_lock_nor_hook():
    loop, other, store = Loop(width=16), Loop(width=17), MemoryStore()
    loop.run(store, 1)
    with pytest.raises(gpuckpt.MismatchError):
        adapter.training("", store=store, **other.parts)
    assert not other.optimizer._optimizer_step_pre_hooks
    loop.run(store, 2)


def test_attach_saves_by_itself_after_each_step_of_the_last_optimizer():
    loop, store = Loop(norm=False), MemoryStore()
    state = {"model": adapter.Model(loop.model), "optimizer": adapter.Optimizer(loop.optimizer)}
    moments = {}
    with (
        gpuckpt.Checkpointer("", store=store, every=EACH) as ckpt,
        adapter.attach(ckpt, loop.optimizer, state=state, done=4) as attached,
    ):
        for step in (5, 6, 7):
            loop.model(torch.ones(4, 8)).square().mean().backward()
            loop.optimizer.step()
            moments[step] = frozen(state)
        attached.remove()
        loop.optimizer.step()
        ckpt.wait()
        assert ckpt.steps() == [5, 6, 7]
        for step in (5, 6, 7):
            ckpt.restore(state, step)
            assert frozen(state) == moments[step]


def test_attach_says_what_it_needs():
    with gpuckpt.Checkpointer("", store=MemoryStore()) as ckpt:
        with pytest.raises(gpuckpt.InvalidError, match="give it the optimizers"):
            adapter.attach(ckpt)
        with pytest.raises(gpuckpt.InvalidError, match="a Linear has no register_step_pre_hook"):
            adapter.attach(ckpt, nn.Linear(1, 1))


def test_training_says_what_has_no_state():
    loop = Loop()
    parts = loop.parts | {"store": MemoryStore()}
    with pytest.raises(gpuckpt.InvalidError, match=r"data: a DataLoader .*Batches\(loader\)"):
        adapter.training(**parts | {"data": loop.batches.loader})
    with pytest.raises(gpuckpt.InvalidError, match="scaler: a int has no state_dict"):
        adapter.training(**parts | {"scaler": 3})
    with pytest.raises(gpuckpt.InvalidError, match="'model' is taken"):
        adapter.training(**parts, others={"model": 1})


def test_training_is_a_checkpointer_that_can_be_told_to_stop():
    told = threading.Event()
    loop = Loop()
    with adapter.training("", store=MemoryStore(), preempt=told.is_set, **loop.parts) as run:
        loop.train(run, 3)
        assert not run.should_stop
        assert run.exit_code == 0
        told.set()
        loop.train(run, 4)
        assert run.should_stop
        assert run.exit_code == gpuckpt.PREEMPTED
        assert run.checkpointer.steps() == [4]


def test_hooks_neither_break_graphs_nor_have_anything_compiled_again():
    from torch._dynamo.utils import counters

    def trained(hooked):
        torch._dynamo.reset()
        counters.clear()
        loop = Loop()
        model = torch.compile(loop.model, backend="eager")
        run = (
            adapter.training("", store=MemoryStore(), every=EACH, **loop.parts) if hooked else None
        )
        for _ in range(4):
            model(torch.ones(4, 8)).square().mean().backward()
            loop.optimizer.step()
            if run is not None:
                run.step()
        if run is not None:
            run.close()
        return {name: dict(counts) for name, counts in counters.items()}

    plain, hooked = trained(hooked=False), trained(hooked=True)
    assert plain == hooked
    assert plain["stats"]["unique_graphs"] == 1


def test_a_step_that_is_compiled_is_ordered_all_the_same():
    loop = Loop(width=512, norm=False)
    for one in loop.model.parameters():
        one.grad = torch.ones_like(one)
    made = torch.compile(loop.optimizer.step, backend="eager")
    store = MemoryStore()
    with adapter.training(
        "", model=loop.model, optimizer=loop.optimizer, store=store, snapshot="hold", every=EACH
    ) as run:
        moments = {}
        for step in range(1, 6):
            made()
            moments[step] = frozen(run.state)
            run.step()
        for step in (1, 3, 5):
            run.checkpointer.restore(run.state, step)
            assert frozen(run.state) == moments[step]


@pytest.mark.slow
def test_a_restore_takes_no_second_copy_of_the_model(tmp_path):
    program = """
import resource, sys, torch, gpuckpt, gpuckpt.torch
from torch import nn
torch.set_num_threads(1)
def made(value):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(8)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for one in model.parameters():
            one.fill_(value)
    return model
root, act = sys.argv[1:]
model = made(2.0 if act == "save" else 0.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with gpuckpt.torch.training(
    root, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), snapshot="hold",
    memory="64 MiB", every=gpuckpt.Every(steps=1),
) as run:
    if act == "save":
        run.step()
assert all(float(one.sum()) == 2.0 * one.numel() for one in model.parameters())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(WORLD)}
    for act in ("save", "restore"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), act],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        # 512 MiB of weights; 64 MiB of buffers, and what Python and the libraries add.
        assert int(done.stdout) < 160 * 1024, (act, done.stdout)
