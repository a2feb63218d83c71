"""Real torch on a real GPU: what it trains is saved as it goes, and comes back bit for bit.

None of these tests runs on the stand-in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpuckpt

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("this torch has no CUDA device", allow_module_level=True)
adapter: Any = pytest.importorskip("gpuckpt.torch")

from torch import nn  # noqa: E402 - only where there is a torch
from torch.nn import functional  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("User", "Future")),
]

DEVICE = "cuda"
SNAPSHOTS = ("copy", "hold")
EACH = gpuckpt.Every(steps=1)


@pytest.fixture(autouse=True)
def _the_same_sums_each_time():
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def wide(width: int = 2048, layers: int = 6) -> Any:
    """Much memory: a snapshot of it takes longer than the host takes to come to the next step."""
    parts: list[Any] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)]
    return nn.Sequential(*parts).to(DEVICE)


def images() -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.BatchNorm2d(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).to(DEVICE, memory_format=torch.channels_last)


def cloned(state: Any) -> dict[str, Any]:
    """Every tensor of a state, and every value, by its path: copies."""
    if hasattr(state, "state_dict"):
        return cloned(state.state_dict())
    if isinstance(state, torch.Tensor):
        return {"": (state.detach().clone(), state.stride())}
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {f".{k}{name}": one for k, v in items for name, one in cloned(v).items()}
    return {"": state.tobytes() if isinstance(state, np.ndarray) else state}


def assert_same_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        if isinstance(one, tuple) and len(one) and isinstance(one[0], torch.Tensor):
            tensor, stride = found[name]
            assert stride == one[1], name
            assert tensor.device == one[0].device, name
            assert tensor.dtype == one[0].dtype, name
            assert bits(tensor).equal(bits(one[0])), name
        else:
            assert found[name] == one, name


def bits(tensor: Any) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def parts_of(model: Any) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=100)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**30)  # so high that steps are skipped
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}


def train_step(parts: dict[str, Any], x: Any, y: Any) -> None:
    with torch.autocast(DEVICE, torch.float16):
        loss = functional.cross_entropy(parts["model"](x), y)
    parts["optimizer"].zero_grad()
    parts["scaler"].scale(loss).backward()
    parts["scaler"].step(parts["optimizer"])
    parts["scaler"].update()
    parts["scheduler"].step()


def batch(step: int, shape: tuple[int, ...]) -> tuple[Any, Any]:
    drawn = torch.Generator(DEVICE).manual_seed(step)
    x = torch.randn(32, *shape, device=DEVICE, generator=drawn)
    x = x.to(memory_format=torch.channels_last) if len(shape) == 3 else x
    return x, torch.randint(0, 10, (32,), device=DEVICE, generator=drawn)


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
@pytest.mark.parametrize(("make", "shape"), [(wide, (2048,)), (images, (3, 24, 24))])
def test_every_step_with_amp_is_saved_as_it_was_while_the_loop_went_on(
    tmp_path, make, shape, snapshot
):
    parts = parts_of(make())
    moments = {}
    with adapter.training(tmp_path, every=EACH, snapshot=snapshot, **parts) as run:
        for step in range(1, 9):
            train_step(parts, *batch(step, shape))
            moments[step] = cloned(run.state)
            run.step()
        run.checkpointer.wait()
        assert run.checkpointer.steps() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert parts["scaler"].get_scale() < 2.0**30  # some steps were skipped

    torch.manual_seed(99)
    fresh = parts_of(make())
    with adapter.training(tmp_path, resume=False, **fresh) as run:
        for step in (8, 1, 5):
            run.checkpointer.restore(run.state, step)
            assert_same_bits(cloned(run.state), moments[step])


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_a_resumed_run_ends_with_the_bits_of_one_that_went_on(tmp_path, snapshot):
    def run_to(root: Any, stop: int) -> Any:
        torch.manual_seed(5)
        parts = parts_of(wide(512, 3))
        with adapter.training(root, every=EACH, snapshot=snapshot, **parts) as run:
            while run.done < stop:
                train_step(parts, *batch(run.done, (512,)))
                run.step()
            return cloned(run.state)

    whole = run_to(tmp_path / "whole", 14)
    run_to(tmp_path / "parts", 6)
    run_to(tmp_path / "parts", 7)
    assert_same_bits(run_to(tmp_path / "parts", 14), whole)


def test_attach_alone_orders_a_held_state_on_the_stream_that_trains(tmp_path):
    model = wide()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    moments = {}
    with (
        gpuckpt.Checkpointer(tmp_path, snapshot="hold") as ckpt,
        adapter.attach(ckpt, optimizer),
        torch.cuda.stream(torch.cuda.Stream()),
    ):
        for step in range(1, 6):
            loss = model(torch.ones(8, 2048, device=DEVICE)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            moments[step] = cloned(state)
            ckpt.save(step, state)
        ckpt.wait()
        torch.cuda.synchronize()
        for step in (2, 5):
            ckpt.restore(state, step)
            assert_same_bits(cloned(state), moments[step])


def test_a_graph_of_the_whole_step_goes_on_with_what_was_restored(tmp_path):
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)).to(DEVICE)
    rate = torch.tensor(1e-2, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, capturable=True)
    x, y = batch(0, (256,))

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    with adapter.training(
        tmp_path, model=model, optimizer=optimizer, snapshot="hold", every=EACH, rng=False
    ) as run:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                one()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one()
        moments = {}
        for step in range(1, 11):
            graph.replay()
            moments[step] = cloned(run.state)
            run.step()
        run.checkpointer.wait()

        run.checkpointer.restore(run.state, 4)
        assert_same_bits(cloned(run.state), moments[4])
        assert optimizer.param_groups[0]["lr"] is rate
        for _ in range(6):
            graph.replay()
        assert_same_bits(cloned(run.state), moments[10])


def test_a_fresh_optimizer_gets_its_state_where_its_parameters_are(tmp_path):
    parts = parts_of(wide(256, 2))
    parts["scaler"] = torch.amp.GradScaler(DEVICE)
    train_step(parts, *batch(0, (256,)))
    gpuckpt.save(tmp_path, {"optimizer": parts["optimizer"]})

    fresh = torch.optim.AdamW(wide(256, 2).parameters(), lr=1e-3, fused=True)
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.resume({"optimizer": fresh})
        ckpt.restore({"optimizer": fresh})
    assert fresh.state
    assert all(
        one.device.type == DEVICE for state in fresh.state.values() for one in state.values()
    )
    assert_same_bits(cloned(fresh), cloned(parts["optimizer"]))


def test_compiled_steps_and_their_hooks_neither_break_graphs_nor_compile_again(tmp_path):
    from torch._dynamo.utils import counters

    counters.clear()
    model = torch.compile(images(), backend="eager")
    optimizer = torch.optim.AdamW(model.parameters())
    with adapter.training(tmp_path, model=model, optimizer=optimizer, every=EACH) as run:
        for step in range(6):
            loss = model(batch(step, (3, 24, 24))[0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


DTYPES = ["bfloat16", "float16", "float32", "float64", "complex64", "bool", "int64", "uint8"]
DTYPES += ["float8_e4m3fn", "float8_e5m2", "uint16"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load_keep_bits_strides_and_what_is_one_tensor(tmp_path, dtype):
    wanted = getattr(torch, dtype)
    bytes_ = torch.randint(0, 2, (4, 6, 8, 10 * wanted.itemsize), dtype=torch.uint8, device=DEVICE)
    tensor = bytes_.view(wanted)
    state = {
        "plain": tensor,
        "tied": tensor,
        "channels_last": tensor.contiguous(memory_format=torch.channels_last),
        "every_other": tensor[:, ::2],
        "scalar": tensor[0, 0, 0, 0].clone(),
        "empty": tensor[:0],
        "on_host": tensor.cpu(),
        "step": 7,
    }
    adapter.save(state, tmp_path / "a")
    found = adapter.load(tmp_path / "a")
    assert found["tied"] is found["plain"]
    assert found["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert found["step"] == 7
    for name, one in state.items():
        if isinstance(one, torch.Tensor):
            assert found[name].device == one.device, name
            assert found[name].dtype == one.dtype, name
            assert found[name].shape == one.shape, name
            assert bits(found[name]).equal(bits(one)), name
    there = adapter.load(tmp_path / "a", map_location="cpu")
    assert there["plain"].device.type == "cpu"
    assert bits(there["plain"]).equal(bits(tensor.cpu()))


def test_the_generators_of_the_gpu_go_on_where_they_were(tmp_path):
    own = torch.Generator(DEVICE).manual_seed(3)
    state = {"rng": gpuckpt.RNG(), "own": adapter.Generator(own)}
    torch.rand(5, device=DEVICE)
    torch.rand(5, device=DEVICE, generator=own)
    gpuckpt.save(tmp_path, state)
    expected = torch.rand(9, device=DEVICE), torch.rand(9, device=DEVICE, generator=own)
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.resume(state)
    found = torch.rand(9, device=DEVICE), torch.rand(9, device=DEVICE, generator=own)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
