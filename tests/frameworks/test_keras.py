"""Keras 3, on torch and on jax: a `fit` that goes on at the batch where it was."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpuckpt

if importlib.util.find_spec("keras") is None:  # an import would choose a backend
    pytest.skip("keras isn't installed", allow_module_level=True)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["torch", "jax"])
def fits(request, tmp_path_factory) -> Any:
    """What came of the runs in a process of its own: a process has one backend."""
    pytest.importorskip(request.param, reason=f"{request.param} isn't installed")
    root = tmp_path_factory.mktemp(request.param)
    one = {"KERAS_BACKEND": request.param, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    one["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # they take longer than the runs
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.frameworks.keras_fits", str(root)],
        env=os.environ | one | {"PYTHONPATH": path, "KERAS_HOME": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("run", "left"),
    [
        ("twice", 21 - 11),  # with validation, whose loader draws from the generator
        ("boundary", 21 - 6),
        ("epochs", 21 - 7),
        ("longer", 7),
        ("cut", 21 - 4),
        ("unsized", 7 - 5),  # a generator
    ],
)
def test_a_fit_that_was_ended_goes_on_at_its_batch_with_the_same_bits(fits, run, left):
    whole, again = fits[run]

    assert again["digest"] == whole["digest"]
    assert again["losses"] == whole["losses"][-len(again["losses"]) :]
    assert (whole["trained"], again["trained"]) == (7 if run == "unsized" else 21, left)


def test_no_step_is_saved_twice(fits):
    of_two_epochs, of_a_generator, of_one_that_was_cut_off = fits["saves"]

    assert of_two_epochs == list(range(1, 15))
    assert of_a_generator == list(range(1, 8))
    assert of_one_that_was_cut_off == [3, 4]


def test_so_does_one_that_executes_several_steps_together(fits):
    if "together" not in fits:
        pytest.skip("on torch, Keras executes each step alone")
    whole, again = fits["together"]

    assert again["digest"] == whole["digest"]
    assert 0 < again["trained"] < whole["trained"]


def test_a_checkpoint_has_the_metrics_that_an_epoch_or_a_validation_then_sets_to_zero(fits):
    copied, held, held_unsized = fits["metrics"]

    assert copied == held
    assert all(held)
    assert all(held_unsized)


def test_another_model_is_refused(fits):
    assert "[8, 5] here, [8, 4] in the checkpoint" in fits["refused"]


def test_a_fit_stops_once_it_is_told_to_end(fits):
    assert fits["preempted"] == 1


def test_variables_have_their_paths_for_names(fits):
    assert "dense" in fits["names"][-1] or "sequential" in fits["names"][-1]
    assert any(name.endswith("seed_generator_state") for name in fits["names"])


def test_kerass_absence_says_what_to_install(monkeypatch):
    for name in [one for one in sys.modules if one.startswith("gpuckpt.adapters.keras")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "keras", None)

    with pytest.raises(ImportError, match=r"pip install 'gpuckpt\[keras\]'"):
        import gpuckpt.adapters.keras  # noqa: F401


def test_a_backend_that_has_no_adapter_is_named(tmp_path):
    program = (
        "import gpuckpt\n"
        "from gpuckpt.adapters.keras import Checkpoint\n"
        "try:\n"
        "    Checkpoint('a', every=gpuckpt.Every(epochs=1))\n"
        "except gpuckpt.UnsupportedError as error:\n"
        "    print(error)\n"
    )
    one = {"KERAS_BACKEND": "numpy", "PYTHONPATH": str(REPOSITORY), "KERAS_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | one,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert "Keras runs on numpy; use torch or jax" in done.stdout, done.stderr
    assert gpuckpt.UnsupportedError.__name__ not in done.stderr
