"""The guides' code runs: in small, and a second time, as a script that is started again."""

from __future__ import annotations

import importlib.util
import re
from textwrap import indent

import pytest

from tests import pages

# Programs around a guide's blocks of Python, which stand where their numbers are.
JAX = """
import jax, jax.numpy as jnp, optax
from flax import nnx

def make_state():
    return {"w": jnp.zeros((3, 2)), "step": 0}

@jax.jit
def train_step(state, x):
    return {"w": state["w"] + x, "step": state["step"] + 1}

def batch(step):
    return jnp.full((3, 2), step)

state, steps = make_state(), 6
#0
state, steps = make_state(), 9
#0
assert (done, int(state["step"]), float(state["w"][0, 0])) == (6, 9, 45)
#1
assert (int(state["step"]), float(state["w"][0, 0])) == (9, 45)

for wanted in (0, 1):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    with gpuckpt.jax.Checkpointer("runs/flax") as ckpt:
        #2
        assert (done, float(model.bias[0])) == (wanted, wanted)
        model.bias.set_value(model.bias + 1)
        ckpt.save(done + 1, state())
"""
ORBAX = """
import jax, jax.numpy as jnp

def train_step(state):
    return {"w": state["w"] + 1}

#0
state, steps = {"w": jnp.zeros(3)}, 6
#1
state, steps = {"w": jnp.zeros(3)}, 9
#1
assert (latest, float(state["w"][0])) == (6, 9)
"""
KERAS = """
import keras, numpy as np

x, y = np.random.default_rng(0).standard_normal((2, 20, 4)).astype("float32")
found = []
for seed in (0, 1):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(4)])
    #0
    assert int(model.optimizer.iterations) == 10
    found.append(model.get_weights()[0])
assert (found[0] == found[1]).all()
"""
LIGHTNING = """
import dataclasses, enum, functools, torch
import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 2)

    def training_step(self, batch, _):
        loss = self.layer(batch[0]).square().mean()
        self.log("val", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)

Phase = enum.Enum("Phase", ["FIRST"])
AugmentationConfig = dataclasses.make_dataclass("AugmentationConfig", ["degrees"])
quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
pl.Trainer = functools.partial(pl.Trainer, max_epochs=2, accelerator="cpu", **quiet)
loader = DataLoader(TensorDataset(torch.randn(8, 4)), 4)

found = []
for _ in range(2):
    module = Net()
    #0
    assert module.trainer.global_step == 20
    found.append(module.layer.weight.detach().clone())
assert torch.equal(*found)
for _ in range(2):
    module = Net()
    #1
    found.append(module.layer.weight.detach().clone())
assert torch.equal(*found[-2:])
#2
#3
assert torch.equal(module.layer.weight, found[-1])
"""
TRANSFORMERS = """
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
data = [{"input_ids": torch.arange(8) + n, "labels": torch.arange(8) + n} for n in range(16)]

found = []
for seed in (0, 1):
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    #0
    assert trainer.state.global_step == 6
    found.append(model.lm_head.weight.detach().clone())
assert torch.equal(*found)
model = GPT2LMHeadModel(GPT2Config(**sizes))
#1
assert torch.equal(model.lm_head.weight, found[0])
for epochs in (1, 2):
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(data, 4, shuffle=True)
    #2
    assert (step, ckpt.steps()) == (4 * epochs, list(range(3, 4 * epochs + 1, 3)))
"""
DCP = """
import torch, gpuckpt
from torch import distributed

distributed.init_process_group("gloo", "file://$PWD/meeting", rank=0, world_size=1)
state = {"w": torch.ones(3), "step": 300}
#0
pending.result()
assert gpuckpt.load("runs/a/step-600")["w"].tolist() == [1, 1, 1]
distributed.destroy_process_group()
"""
GUIDES = {
    "guides/jax.md": (JAX, "jax", "flax", "optax"),
    "guides/orbax.md": (ORBAX, "jax"),
    "guides/keras.md": (KERAS, "keras", "torch"),
    "guides/lightning.md": (LIGHTNING, "lightning"),
    "guides/transformers.md": (TRANSFORMERS, "transformers", "accelerate"),
    "DCP.md": (DCP, "torch"),
}


def program_of(guide: str) -> str:
    """Its blocks within the program around them, with fewer steps between two saves."""
    shown = [one.text for one in pages.blocks(pages.ROOT / "docs" / guide) if one[0] == "python"]
    around = GUIDES[guide][0]
    asked = {int(number) for number in re.findall(r"^ *#(\d)$", around, re.MULTILINE)}
    assert asked == set(range(len(shown))), "a block that the test doesn't run"

    def block(match: re.Match[str]) -> str:
        return indent(shown[int(match[2])], match[1])

    whole = re.sub(r"^( *)#(\d)$", block, around, flags=re.MULTILINE)
    return re.sub(r"\b((?:save_interval_)?steps)=[13]00\b", r"\1=3", whole)


@pytest.mark.parametrize("guide", GUIDES)
def test_what_a_guide_shows_runs_and_goes_on(guide, tmp_path, monkeypatch):
    for package in GUIDES[guide][1:]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} isn't installed")
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OMP_NUM_THREADS": "1"}
    for name, value in {**quick, "KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    program = program_of(guide).replace("$PWD", str(tmp_path))
    pages.run([pages.Block("python", None, program)], tmp_path, warnings="default")
