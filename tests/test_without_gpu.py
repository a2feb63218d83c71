"""What happens without CuPy, and without a GPU: everything else works, and the error says why."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

import gpuckpt

NO_CUPY = "import sys; sys.modules['cupy'] = None\n"
LOAD = """
import sys, gpuckpt
try:
    gpuckpt.load(sys.argv[1], device="cuda")
except gpuckpt.NotFoundError as error:
    print(error)
"""


def run(program: str, root) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "GPUCKPT_STANDIN"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", program, str(root)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_without_cupy_an_error_says_what_to_install(tmp_path):
    gpuckpt.save(tmp_path, {"w": np.ones(3)})
    assert "pip install 'gpuckpt[cuda13]'" in run(NO_CUPY + LOAD, tmp_path)


def test_without_cupy_host_arrays_save_and_load(tmp_path):
    program = NO_CUPY + (
        "import gpuckpt, numpy as np\n"
        "gpuckpt.save(sys.argv[1], {'w': np.ones(3)})\n"
        "print(gpuckpt.load(sys.argv[1])['w'].sum())\n"
    )
    assert run(program, tmp_path).strip() == "3.0"


def test_without_a_gpu_an_error_names_the_device(tmp_path):
    gpuckpt.save(tmp_path, {"w": np.ones(3)})
    message = run(LOAD, tmp_path)
    assert "cuda:0" in message or "cupy" in message
