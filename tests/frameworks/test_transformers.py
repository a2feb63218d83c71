"""Transformers' Trainer and Accelerate's loops: runs that go on where they were."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import gpuckpt
from tests.frameworks.trainings import StopError, digest

torch = pytest.importorskip("torch", reason="torch isn't installed")
pytest.importorskip("transformers", reason="transformers isn't installed")
pytest.importorskip("accelerate", reason="accelerate isn't installed")

from accelerate import Accelerator, DataLoaderConfiguration  # noqa: E402
from accelerate.state import AcceleratorState as Singleton  # noqa: E402
from torch.nn import Module  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from transformers import (  # noqa: E402
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gpuckpt.adapters.accelerate import AcceleratorState  # noqa: E402
from gpuckpt.adapters.transformers import Checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

INPUTS = torch.randn(28, 8, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS.sum(1, keepdim=True)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """One thread, nothing written into the checkout, and no accelerator of another test."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    Singleton._reset_state(reset_partial_state=True)


class Net(Module):
    """Has buffers, draws from the generator, and notes which batches it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        self.net = torch.nn.Sequential(
            *(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU()),
            *(torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)),
        )

    def forward(self, inputs: Any, labels: Any) -> dict[str, Any]:
        if self.training:
            self.seen.append(float(inputs.sum()))
        outputs = self.net(inputs)
        return {"loss": torch.nn.functional.mse_loss(outputs, labels), "logits": outputs}


class Stop(TrainerCallback):
    """Fails after a step, before anything of that step was saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step >= self.step:
            raise StopError


def trainer_of(model: Any, callbacks: list[Any], **options: Any) -> Any:
    data = [{"inputs": one, "labels": two} for one, two in zip(INPUTS, TARGETS, strict=True)]
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    sizes = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    named = {"label_names": ["labels"], "logging_strategy": "steps", "logging_steps": 2}
    arguments = TrainingArguments("out", **quiet | sizes | named | options)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)


def train(root: Path, stop: int | None = None, extra: tuple[Any, ...] = (), **options: Any) -> Any:
    """Train until the end or `stop`; the model."""
    torch.manual_seed(0)
    model = Net()
    saving = Checkpoint(root, every=gpuckpt.Every(steps=1), keep=gpuckpt.Keep(last=2))
    stops = [] if stop is None else [Stop(stop)]
    trainer = trainer_of(model, [saving, *extra, *stops], **options)
    with contextlib.suppress(StopError):
        trainer.train(resume_from_checkpoint=saving.resume(trainer))
    saving.close()
    return model


@pytest.mark.parametrize(
    ("stops", "options"),
    [
        ((3, 8), {}),  # what is newest then is of an epoch's end
        ((3, 5), {"gradient_accumulation_steps": 2}),
        ((4, 9), {"eval_strategy": "steps", "eval_steps": 3, "lr_scheduler_type": "cosine"}),
        ((8,), {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau"}),
        ((4,), {"max_steps": 11, "dataloader_num_workers": 1}),
    ],
)
def test_a_run_that_is_ended_sees_the_same_batches_and_ends_with_the_same_bits(
    tmp_path, stops, options
):
    whole = train(tmp_path / "whole", **options)
    for stop in stops:
        train(tmp_path / "ended", stop, **options)
    resumed = train(tmp_path / "ended", **options)

    assert 0 < len(resumed.seen) < len(whole.seen)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert digest(resumed.state_dict()) == digest(whole.state_dict())


def test_the_callback_changes_nothing_in_what_is_trained(tmp_path):
    torch.manual_seed(0)
    model = Net()
    trainer_of(model, []).train()

    assert digest(train(tmp_path / "a").state_dict()) == digest(model.state_dict())


def test_a_checkpoint_has_the_trainers_state_its_callbacks_and_what_was_logged(tmp_path):
    stopping = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": False}
    extra = (EarlyStoppingCallback(9),)
    train(tmp_path / "a", 9, extra, metric_for_best_model="loss", **stopping)

    import json

    found = gpuckpt.load(tmp_path / "a")
    state = json.loads(found["trainer_state"].tobytes())
    assert state["global_step"] == 8
    assert {"TrainerControl", "EarlyStoppingCallback"} <= state["stateful_callbacks"].keys()
    with gpuckpt.Checkpointer(tmp_path / "a") as saver:
        latest = saver.latest()
        assert latest is not None
        assert {"loss", "eval_loss"} <= latest.metrics.keys()


@pytest.mark.parametrize(
    ("when", "stop", "last"),
    [("steps", True, 6), ("epoch", True, 14), ("epoch", False, 21)],
)
def test_the_end_is_saved_before_the_best_model_takes_its_place(tmp_path, when, stop, last):
    seen: dict[int, str] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen[state.global_step] = digest(model.state_dict())

    torch.manual_seed(0)
    model = Net()
    every = gpuckpt.Every(steps=100)
    saving = Checkpoint(tmp_path / "a", every=every, snapshot="hold")
    # The highest loss is the best: that of the first evaluation, and no later one is better.
    best = {"load_best_model_at_end": True, "greater_is_better": True, "num_train_epochs": 3}
    often = {"eval_strategy": when, "save_strategy": when, "eval_steps": 3, "save_steps": 3}
    callbacks = [saving, Look(), *([EarlyStoppingCallback(1)] if stop else [])]
    trainer = trainer_of(model, callbacks, metric_for_best_model="loss", **best | often)
    trainer.train(resume_from_checkpoint=saving.resume(trainer))

    assert max(seen) == last
    assert digest(model.state_dict()) == seen[3 if when == "steps" else 7]
    with gpuckpt.Checkpointer(tmp_path / "a") as saver:
        assert saver.steps() == [last]
        latest = saver.latest()
        assert latest is not None
        assert "eval_loss" in latest.metrics
    assert digest(gpuckpt.load(tmp_path / "a")["model"]) == seen[last]


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    sizes = {"vocab_size": 64, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    piece = torch.arange(8)
    data = [{"input_ids": piece + at, "labels": piece + at} for at in range(8)]
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    ends = []
    for steps in (2, 4):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes))
        saving = Checkpoint(tmp_path / "a", every=gpuckpt.Every(steps=1))
        arguments = TrainingArguments("out", max_steps=steps, learning_rate=0.1, **quiet)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[saving])
        trainer.train(resume_from_checkpoint=saving.resume(trainer))
        ends.append((model.lm_head.weight, model.transformer.wte.weight))

    assert ends[1][0] is ends[1][1]
    found = gpuckpt.load(tmp_path / "a")["model"]
    assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()
    assert torch.equal(found["lm_head.weight"], ends[1][0])


def test_a_training_that_was_not_resumed_is_refused(tmp_path):
    train(tmp_path / "a", 3)
    saving = Checkpoint(tmp_path / "a", every=gpuckpt.Every(steps=1))
    trainer = trainer_of(Net(), [saving])

    with pytest.raises(gpuckpt.InvalidError, match=r"checkpoint\.resume\(trainer\)"):
        trainer.train()
    saving.resume(trainer)
    with pytest.raises(gpuckpt.InvalidError, match="has step 2, and the training begins at step 0"):
        trainer.train()
    saving.close()


def test_a_trainer_is_as_it_was_once_the_checkpoint_is_closed(tmp_path):
    train(tmp_path / "a", 3)
    saving = Checkpoint(tmp_path / "a", every=gpuckpt.Every(steps=1))
    trainer = trainer_of(Net(), [saving])
    before = set(vars(trainer))
    directory = saving.resume(trainer)
    assert directory is not None
    assert Path(directory).is_dir()
    saving.close()

    assert set(vars(trainer)) == before
    assert not Path(directory).exists()


@pytest.mark.parametrize("stop", [3, 8])  # what is newest then is within an epoch, and of its end
def test_nothing_is_left_of_a_resumed_run_that_is_killed_in_its_training(
    tmp_path, monkeypatch, stop
):
    train(tmp_path / "a", stop)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    left = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            left.append(list((tmp_path / "temporary").iterdir()))

    train(tmp_path / "a", extra=(Look(),))

    assert len(left) == 14 - stop + 1
    assert not any(left)


def test_a_run_stops_once_it_is_told_to_end(tmp_path):
    torch.manual_seed(0)
    model = Net()
    every = gpuckpt.Every(steps=100)
    saving = Checkpoint(tmp_path / "a", every=every, preempt=lambda: True)
    trainer = trainer_of(model, [saving])
    trainer.train(resume_from_checkpoint=saving.resume(trainer))

    assert len(model.seen) == 2
    with gpuckpt.Checkpointer(tmp_path / "a") as saver:
        assert saver.steps() == [1]


def test_sharded_models_are_left_to_others(tmp_path):
    trainer = trainer_of(Net(), [])
    trainer.is_fsdp_enabled = True

    with pytest.raises(gpuckpt.UnsupportedError, match="dcp"):
        Checkpoint(tmp_path / "a", every=gpuckpt.Every(steps=1)).resume(trainer)


def loop(root: Path, stop: int | None = None, snapshot: str = "auto") -> tuple[str, list[float]]:
    """A loop of Accelerate's, of two epochs; its digest, and the batches that it saw."""
    torch.manual_seed(0)
    config = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    loader = DataLoader(TensorDataset(INPUTS, TARGETS), 4, shuffle=True)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    state = {"run": AcceleratorState(accelerator)}
    seen = []
    with gpuckpt.Checkpointer(root, every=gpuckpt.Every(steps=1), snapshot=snapshot) as ckpt:
        done = ckpt.resume(state)
        for epoch in range(done // len(loader), 2):
            passed = max(done - epoch * len(loader), 0)
            for inputs, targets in state["run"].batches(loader, epoch, passed):
                seen.append(float(inputs.sum()))
                accelerator.backward(model(inputs, targets)["loss"])
                with ckpt.update():
                    optimizer.step()
                    schedule.step()
                optimizer.zero_grad()
                done += 1
                if done == stop:
                    return "", seen
                ckpt.step(done, state)
    return digest(accelerator.unwrap_model(model).state_dict()), seen


@pytest.mark.parametrize("stops", [(4,), (8,), (3, 11)])
def test_a_loop_of_accelerates_goes_on_where_it_was(tmp_path, stops):
    whole, seen = loop(tmp_path / "whole")
    for stop in stops:
        loop(tmp_path / "ended", stop)
    resumed, rest = loop(tmp_path / "ended")

    assert rest == seen[-len(rest) :]
    assert len(rest) == 14 - stops[-1] + 1
    assert resumed == whole


def test_what_was_registered_is_saved_and_refused_by_name_if_it_cannot_be(tmp_path):
    class Counter:
        def __init__(self, count: Any) -> None:
            self.count = count

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    accelerator = Accelerator(cpu=True)
    one = Counter({1, 2})
    accelerator.register_for_checkpointing(one)
    state = {"run": AcceleratorState(accelerator)}
    with gpuckpt.Checkpointer(tmp_path / "a") as ckpt:
        ckpt.save(1, state)
        one.count = object()
        with pytest.raises(gpuckpt.UnsupportedError, match=r"registered\.0\.count"):
            ckpt.save(2, state)
        one.count = 0
        assert ckpt.resume(state) == 1
    assert one.count == {1, 2}


@pytest.mark.parametrize(
    ("adapter", "lacking"),
    [("transformers", "transformers"), ("transformers", "accelerate"), ("accelerate",) * 2],
)
def test_an_absence_says_what_to_install(monkeypatch, adapter, lacking):
    beginnings = ("gpuckpt.adapters.transformers", "gpuckpt.adapters.accelerate")
    for name in [one for one in sys.modules if one.startswith(beginnings)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, lacking, None)

    with pytest.raises(ImportError, match=rf"pip install 'gpuckpt\[{adapter}\]'"):
        importlib.import_module(f"gpuckpt.adapters.{adapter}")


def test_a_loop_of_accelerates_needs_no_transformers(monkeypatch):
    monkeypatch.delitem(sys.modules, "gpuckpt.adapters.accelerate")
    monkeypatch.setitem(sys.modules, "transformers", None)

    assert importlib.import_module("gpuckpt.adapters.accelerate").AcceleratorState
