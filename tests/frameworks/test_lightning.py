"""Lightning: its checkpoints as gpuckpt's, and runs that go on where they were."""

from __future__ import annotations

import contextlib
import enum
import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import gpuckpt
from gpuckpt.stores import local
from tests.frameworks.trainings import StopError, digest

torch = pytest.importorskip("torch", reason="torch isn't installed")
pytest.importorskip("lightning.pytorch", reason="lightning isn't installed")

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset, TensorDataset  # noqa: E402

from gpuckpt.adapters.lightning import Checkpoint, CheckpointIO, load  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore::FutureWarning")

INPUTS = torch.randn(28, 8, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS.sum(1, keepdim=True)


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """No notes about this machine, one thread, and nothing written into the checkout."""
    monkeypatch.chdir(tmp_path)
    logger, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    before = logger.level
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    yield
    logger.setLevel(before)
    torch.set_num_threads(threads)


class Net(pl.LightningModule):
    """Has buffers, draws from the generator, and notes which batches it saw."""

    def __init__(self, plateau: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.seen: list[tuple[int, int, float]] = []
        self.net = torch.nn.Sequential(
            *(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU()),
            *(torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)),
        )

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        self.seen.append((self.trainer.current_epoch, batch_idx, float(inputs.sum())))
        loss = torch.nn.functional.mse_loss(self.net(inputs), targets)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("val", torch.nn.functional.mse_loss(self.net(inputs), targets))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        if self.hparams.plateau:
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return [optimizer], [{"scheduler": schedule, "monitor": "val", "interval": "epoch"}]
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]


class Stop(pl.Callback):
    """Fails after a step, before anything of that step was saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step >= self.step:
            raise StopError


class Ask(pl.Callback):
    """Asks the trainer to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


class Unsized(IterableDataset):
    """Has another order each time, and no length."""

    def __iter__(self):
        for at in torch.randperm(len(INPUTS)).tolist():
            yield INPUTS[at], TARGETS[at]


class Stateful:
    """A loader that knows where it is."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.at = 0

    def __iter__(self):
        if self.at >= len(self.order):
            self.order, self.at = torch.randperm(len(INPUTS)).tolist(), 0
        while self.at < len(self.order):
            some = self.order[self.at : self.at + 4]
            self.at += 4
            yield INPUTS[some], TARGETS[some]

    def __len__(self):
        return len(INPUTS) // 4

    def state_dict(self):
        return {"order": list(self.order), "at": self.at}

    def load_state_dict(self, state):
        self.order, self.at = list(state["order"]), state["at"]


LOADERS: dict[str, Any] = {
    "sized": lambda: DataLoader(TensorDataset(INPUTS, TARGETS), 4, shuffle=True),
    "unsized": lambda: DataLoader(Unsized(), 4),
    "workers": lambda: DataLoader(TensorDataset(INPUTS, TARGETS), 4, shuffle=True, num_workers=1),
    "stateful": Stateful,
}


def trainer_of(callbacks: list[Any], **options: Any) -> Any:
    hidden = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(
        **{"accelerator": "cpu", "callbacks": callbacks, "max_epochs": 2} | hidden | options
    )


def fit(
    callbacks: list[Any],
    loader: str = "sized",
    plateau: bool = False,
    ckpt_path: Any = None,
    **options: Any,
) -> Any:
    """Train until the end or `StopError`; the module."""
    torch.manual_seed(0)
    module, trainer = Net(plateau), trainer_of(callbacks, **options)
    validation = DataLoader(TensorDataset(INPUTS, TARGETS), 8)
    with contextlib.suppress(StopError):
        trainer.fit(module, LOADERS[loader](), validation, ckpt_path=ckpt_path)
    return module


def checkpoint(root: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"every": gpuckpt.Every(steps=1), "keep": gpuckpt.Keep(last=2)}
    return Checkpoint(root, **defaults | options)


@pytest.mark.parametrize(
    ("loader", "plateau", "options"),
    [
        ("sized", False, {}),
        ("sized", True, {"val_check_interval": 3}),
        ("sized", False, {"accumulate_grad_batches": 2}),
        ("unsized", False, {}),
        ("workers", False, {}),
        ("stateful", False, {}),
        ("sized", False, {"max_epochs": -1, "max_steps": 12}),
    ],
)
def test_a_run_that_is_ended_again_and_again_sees_the_same_batches_and_ends_with_the_same_bits(
    tmp_path, loader, plateau, options
):
    whole = fit([checkpoint(tmp_path / "whole")], loader, plateau, **options)
    # In the first epoch, at its end, and in the second.
    ends = (3, 5, 7) if "accumulate_grad_batches" in options else (3, 8, 11)
    for end in ends:
        fit([checkpoint(tmp_path / "ended"), Stop(end)], loader, plateau, **options)
    resumed = fit([checkpoint(tmp_path / "ended")], loader, plateau, **options)

    assert len(whole.seen) == options.get("max_steps", 14)
    assert 0 < len(resumed.seen) < len(whole.seen)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert digest(resumed.state_dict()) == digest(whole.state_dict())


def test_a_run_that_has_ended_can_be_made_longer(tmp_path):
    whole = fit([checkpoint(tmp_path / "whole")])
    fit([checkpoint(tmp_path / "longer")], max_epochs=1)
    longer = fit([checkpoint(tmp_path / "longer")])

    assert len(longer.seen) == 7
    assert digest(longer.state_dict()) == digest(whole.state_dict())


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("steps", [5, 11])
def test_a_run_that_ended_within_an_epoch_goes_on_with_the_rest_of_it(tmp_path, loader, steps):
    whole = fit([checkpoint(tmp_path / "whole")], loader)
    fit([checkpoint(tmp_path / "longer")], loader, max_steps=steps)
    with gpuckpt.Checkpointer(tmp_path / "longer") as saver:
        latest = saver.latest()
        assert latest is not None
        assert (latest.step, latest.epoch) == (steps, steps // 7)
    longer = fit([checkpoint(tmp_path / "longer")], loader)

    assert longer.seen == whole.seen[steps:]
    assert digest(longer.state_dict()) == digest(whole.state_dict())


def test_so_does_one_that_was_told_to_stop(tmp_path):
    whole = fit([checkpoint(tmp_path / "whole")])
    fit([checkpoint(tmp_path / "longer"), Ask(5)])
    longer = fit([checkpoint(tmp_path / "longer")])

    # Lightning validates once more before it stops, which draws from the generator.
    assert longer.seen[:2] == whole.seen[5:7]
    assert len(longer.seen) == 9


def test_the_callback_changes_nothing_in_what_is_trained(tmp_path):
    with_it, without = fit([checkpoint(tmp_path / "a")]), fit([], enable_checkpointing=False)

    assert digest(with_it.state_dict()) == digest(without.state_dict())


def test_an_updates_wait_is_in_the_optimizers_step_and_nothing_is_torn(tmp_path):
    saved = checkpoint(tmp_path / "held", snapshot="hold", codec="raw")
    held = fit([saved], max_epochs=1)

    assert digest(load(tmp_path / "held")["state_dict"]) == digest(held.state_dict())


def test_a_checkpoint_has_its_epoch_and_the_metrics_that_choose_the_best(tmp_path):
    fit([checkpoint(tmp_path / "a", keep=gpuckpt.Keep(best=("loss", "min", 2)))])

    with gpuckpt.Checkpointer(tmp_path / "a") as saver:
        latest = saver.latest()
        assert latest is not None
        assert (latest.step, latest.epoch, set(latest.metrics)) == (14, 2, {"loss", "val"})
        assert 2 <= len(saver.steps()) <= 3


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    fit([checkpoint(tmp_path / "a")], max_epochs=1)
    other = Net()
    other.net[4] = torch.nn.Linear(16, 2)

    with pytest.raises(gpuckpt.MismatchError, match=r"state_dict\.net\.4\.weight"):
        trainer_of([checkpoint(tmp_path / "a")]).fit(other, LOADERS["sized"]())


def test_a_run_stops_once_it_is_told_to_end(tmp_path):
    module = fit([checkpoint(tmp_path / "a", preempt=lambda: True)])

    assert len(module.seen) == 2
    assert gpuckpt.load(tmp_path / "a")["global_step"] == 1


def test_model_checkpoints_are_gpuckpts_and_resume_as_lightnings_own_do(tmp_path):
    found = {}
    for name, plugins in {"own": [], "gpuckpt": [CheckpointIO()]}.items():
        best = {"monitor": "val", "save_top_k": 2, "save_last": True}
        saving = ModelCheckpoint(tmp_path / name, **best)
        fit([saving, EarlyStopping("val", patience=9), Timer("1:00:00:00")], plugins=plugins)
        torch.manual_seed(9)
        again = ModelCheckpoint(tmp_path / name, **best)
        path = tmp_path / name / "last.ckpt"
        options = {"plugins": plugins, "max_epochs": 3, "ckpt_path": path}
        found[name] = digest(fit([again, EarlyStopping("val")], **options).state_dict())
        assert len([one for one in (tmp_path / name).iterdir() if "last" not in one.name]) == 2

    assert found["own"] == found["gpuckpt"]
    last = tmp_path / "gpuckpt" / "last.ckpt"
    assert gpuckpt.load(last)["global_step"] == 21
    assert load(last)["hyper_parameters"] == {"plateau": False}


def test_a_module_is_made_of_a_checkpoint(tmp_path):
    saving = ModelCheckpoint(tmp_path / "a", every_n_epochs=1, filename="one")
    trained = fit([saving], plugins=[CheckpointIO()], max_epochs=1)

    saved = load(tmp_path / "a" / "one.ckpt")
    module = Net(**saved["hyper_parameters"])
    module.load_state_dict(saved["state_dict"])
    assert digest(module.state_dict()) == digest(trained.state_dict())


class Colour(enum.IntEnum):
    RED = 1


@dataclass(frozen=True)
class Point:
    x: int
    around: tuple[Colour, ...] = ()


def test_what_is_no_plain_value_comes_back_as_what_it_was(tmp_path):
    things: dict[str, Any] = {
        "state_dict": torch.nn.BatchNorm1d(2).state_dict(),
        "sizes": [torch.Size([2, 3]), torch.float8_e4m3fn, torch.device("cpu")],
        "set": {1, (2, frozenset({"x"}))},
        "path": Path("a/b"),
        "point": Point(1, (Colour.RED,)),
        "order": OrderedDict(b=1, a=[]),
        "state": {0: {"step": torch.tensor(3.0)}, "none": None},
    }
    plugin = CheckpointIO(types=[Colour, Point])
    plugin.save_checkpoint(things, tmp_path / "a")
    found = plugin.load_checkpoint(tmp_path / "a")

    for name in ("sizes", "set", "path", "point", "order"):
        assert things[name] == found[name]
        assert type(found[name]) is type(things[name])
    assert type(found["sizes"][0]) is torch.Size
    assert type(found["point"].around[0]) is Colour
    assert type(found["state_dict"]) is OrderedDict
    assert vars(found["state_dict"]) == vars(things["state_dict"])
    assert found["state"][0]["step"] == 3.0


@pytest.mark.parametrize(
    "thing", [object(), Colour.RED, lambda: 1, Point(1), {"deep": [Colour.RED]}]
)
def test_what_cannot_come_back_is_refused_by_its_path(tmp_path, thing):
    with pytest.raises(gpuckpt.UnsupportedError, match=r"^callbacks\.mine.*types=") as caught:
        CheckpointIO().save_checkpoint({"callbacks": {"mine": thing}}, tmp_path / "a")

    assert caught.value.name.startswith("callbacks.mine")
    assert not (tmp_path / "a").exists()


def test_a_class_that_the_reader_has_not_named_is_not_made(tmp_path):
    plugin = CheckpointIO(types=[Colour])
    plugin.save_checkpoint({"mine": Colour.RED}, tmp_path / "a")
    plugin.teardown()

    with pytest.raises(gpuckpt.InvalidError, match=r"mine was saved from .*Colour; pass types="):
        CheckpointIO().load_checkpoint(tmp_path / "a")


def test_a_checkpoint_is_deleted_only_once_the_next_is_durable(tmp_path, monkeypatch):
    plugin = CheckpointIO()
    plugin.save_checkpoint({"global_step": 1, "w": torch.ones(3)}, tmp_path / "first")
    plugin.teardown()

    def refuse(appender):
        raise gpuckpt.StorageError("No space left on device")

    monkeypatch.setattr(local.LocalAppender, "sync", refuse)
    plugin.save_checkpoint({"global_step": 2, "w": torch.ones(3)}, tmp_path / "second")
    plugin.remove_checkpoint(tmp_path / "first")
    with pytest.raises(gpuckpt.CheckpointError):
        plugin.teardown()
    monkeypatch.undo()

    assert plugin.load_checkpoint(tmp_path / "first")["global_step"] == 1
    plugin.save_checkpoint({"global_step": 3, "w": torch.ones(3)}, tmp_path / "third")
    plugin.remove_checkpoint(tmp_path / "first")
    assert (tmp_path / "first").exists()
    plugin.teardown()
    assert not (tmp_path / "first").exists()


def test_a_path_has_the_checkpoint_that_was_saved_there_last(tmp_path):
    plugin = CheckpointIO()
    for step in (30, 10):
        plugin.save_checkpoint({"global_step": step, "w": torch.full((3,), step)}, tmp_path / "a")

    assert plugin.load_checkpoint(tmp_path / "a")["global_step"] == 10
    plugin.remove_checkpoint(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_older_runs_higher_step_goes_as_soon_as_the_new_one_is_durable(tmp_path, caplog):
    plugin = CheckpointIO()
    plugin.save_checkpoint({"global_step": 500, "w": torch.ones(3)}, tmp_path / "a")
    plugin.teardown()
    plugin.save_checkpoint({"global_step": 10, "w": torch.zeros(3)}, tmp_path / "a")
    assert plugin._saving is not None
    saver = plugin._saving[0]
    saver.wait()

    assert saver.steps() == [10]
    assert load(tmp_path / "a")["global_step"] == 10
    assert "resume takes" not in caplog.text
    plugin.teardown()


def test_a_crash_before_the_older_runs_step_went_leaves_the_new_one_to_be_loaded(tmp_path):
    for step in (500, 10):
        with gpuckpt.Checkpointer(tmp_path / "a") as saver:
            saver.save(step, {"global_step": step})

    assert CheckpointIO().load_checkpoint(tmp_path / "a")["global_step"] == 10


def test_a_file_of_lightnings_own_is_read_as_weights_only(tmp_path):
    torch.save({"global_step": 1, "w": torch.ones(2)}, tmp_path / "old.ckpt")
    plugin = CheckpointIO()

    assert plugin.load_checkpoint(tmp_path / "old.ckpt")["global_step"] == 1
    plugin.remove_checkpoint(tmp_path / "old.ckpt")
    assert not (tmp_path / "old.ckpt").exists()


def test_checkpoints_may_be_objects_of_a_store():
    pytest.importorskip("obstore", reason="obstore isn't installed")
    plugin, place = CheckpointIO(), "memory://lightning/a.ckpt"
    plugin.save_checkpoint({"global_step": 4, "w": torch.ones(3)}, place)

    assert plugin.load_checkpoint(place)["w"].sum() == 3
    plugin.remove_checkpoint(place)
    with pytest.raises(gpuckpt.NotFoundError):
        plugin.load_checkpoint(place)


def test_lightnings_absence_says_what_to_install(monkeypatch):
    import importlib
    import sys

    for name in [one for one in sys.modules if one.startswith("gpuckpt.adapters.lightning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)

    for kind in (ImportError, gpuckpt.UnsupportedError):
        with pytest.raises(kind, match=r"pip install 'gpuckpt\[lightning\]'"):
            importlib.import_module("gpuckpt.adapters.lightning")
