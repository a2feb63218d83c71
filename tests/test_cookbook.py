"""The cookbook's recipes: programs run, scripts run with a scheduler's commands replaced by small
programs, manifests have only fields that Kubernetes knows.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.durability.endpoints import AbsentError, moto
from tests import pages

COOKBOOK = pages.ROOT / "docs/cookbook"
SHORT, LONG = ("30", "0"), ("100000", "0.01")
LIMIT_S = 60


def file_of(page: str, title: str) -> str:
    (text,) = [block.text for block in pages.blocks(COOKBOOK / page) if block.title == title]
    return text


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(file_of("index.md", "train.py"))
    (tmp_path / "run.sh").write_text(file_of("preemptible.md", "run.sh"))
    (tmp_path / "train.sbatch").write_text(file_of("slurm.md", "train.sbatch"))
    return tmp_path


def started(command: list[str], place: Path, **variables: str) -> subprocess.Popen[str]:
    environment = pages.environment(place) | variables
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True, process_group=0
    )


def line_of(process: subprocess.Popen[str], beginning: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return line.strip()
    raise AssertionError(f"no line that begins with {beginning!r}")


def stop(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """As a scheduler does: a signal for the whole group."""
    line_of(process, "from step")
    time.sleep(0.2)
    os.killpg(process.pid, number)


def output(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=LIMIT_S)[0]


def test_a_run_that_is_told_to_end_ends_with_75_and_goes_on_from_there(place):
    program = [sys.executable, "train.py", "runs/a"]
    first = started([*program, *LONG], place)
    stop(first, signal.SIGTERM)
    (stopped,) = re.findall(r"stopped at step (\d+)", output(first))
    assert first.returncode == 75
    again = output(started([*program, str(int(stopped) + 5), "0"], place))
    assert f"from step {stopped}\n" in again
    whole = output(started([sys.executable, "train.py", "b", str(int(stopped) + 5)], place))
    assert again.splitlines()[-1] == whole.splitlines()[-1]


PROGRAM = """#!/bin/bash
echo run >> runs
[ "$(wc -l < runs)" -ge 3 ] && exit {last}
exit 75
"""


@pytest.mark.parametrize("last", [0, 2])
def test_the_script_runs_it_again_until_it_ends_otherwise(place, last):
    (place / "program").write_text(PROGRAM.format(last=last))
    finished = subprocess.run(
        ["bash", "run.sh", "bash", "program"], cwd=place, check=False, timeout=LIMIT_S
    )
    assert finished.returncode == last
    assert (place / "runs").read_text() == "run\n" * 3


def test_a_job_that_gets_usr1_is_queued_again_and_one_that_is_done_is_not(place):
    tools = place / ".tools"
    pages.environment(place)
    for name, text in {"srun": 'exec "$@"', "scontrol": 'echo "$@" >> queue'}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "train", "RUNS": str(place / "runs")}
    first = started(["bash", "train.sbatch"], place, STEPS="100000", **job)
    line_of(first, "from step")
    time.sleep(0.2)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGUSR1)  # the step's tasks, not the script
    (stopped,) = re.findall(r"stopped at step (\d+)", output(first))
    assert first.returncode == 75
    assert (place / "queue").read_text() == "requeue 42\n"
    second = started(["bash", "train.sbatch"], place, STEPS=str(int(stopped) + 5), **job)
    assert f"from step {stopped}\n" in output(second)
    assert second.returncode == 0
    assert (place / "queue").read_text() == "requeue 42\n"


@pytest.mark.parametrize("page", sorted(COOKBOOK.glob("*.md")), ids=lambda page: page.name)
def test_scripts_are_well_formed(page, tmp_path):
    for block in pages.blocks(page):
        if block.language not in {"bash", "sh"}:
            continue
        script = tmp_path / "script"
        script.write_text(block.text)
        subprocess.run(["bash", "-n", str(script)], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--shell=bash", str(script)], check=True)


def test_the_service_is_a_unit_that_starts_again_after_75():
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read_string(file_of("preemptible.md", "train.service"))
    assert unit["Service"]["RestartForceExitStatus"] == "75"
    assert unit["Service"]["Restart"] == "on-failure"
    assert int(unit["Service"]["TimeoutStopSec"]) > 25


class Metadata(BaseHTTPRequestHandler):
    """EC2's service: 404 until the machine is to be taken away."""

    asked = 0

    def do_GET(self) -> None:
        Metadata.asked += 1
        self.send_response(404 if Metadata.asked < 3 else 200)
        self.end_headers()
        self.wfile.write(b'{"action": "terminate"}')

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/spot/instance-action"
    server.shutdown()
    server.server_close()


def test_a_notice_is_seen_once_the_service_has_one(metadata):
    names: dict[str, Any] = {}
    exec(file_of("preemptible.md", "notices.py"), names)
    spot = names["Spot"](metadata, seconds_left=110, every_seconds=0.01)
    end = time.monotonic() + LIMIT_S
    while spot() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert Metadata.asked >= 3
    assert 100 < spot() <= 110


def test_the_programs_of_the_page_about_spot_machines_run(place):
    pages.run([b for b in pages.blocks(COOKBOOK / "preemptible.md") if b[0] == "python"], place)


@pytest.mark.parametrize("number", [0, 1], ids=["bucket", "tiers"])
def test_the_programs_of_the_page_about_s3_run(tmp_path, monkeypatch, number):
    pytest.importorskip("obstore", reason="the programs need obstore")
    shown = [block for block in pages.blocks(COOKBOOK / "s3.md") if block.language == "python"]
    try:
        with moto() as endpoint:
            for name, value in endpoint.environment.items():
                monkeypatch.setenv(name, value)
            pages.run([shown[number]], tmp_path)
    except AbsentError as absent:
        pytest.skip(str(absent))


def test_the_documents_for_s3_are_what_its_interface_takes():
    policy, rules = (
        json.loads(file_of("s3.md", name)) for name in ("policy.json", "lifecycle.json")
    )
    assert {one["Effect"] for one in policy["Statement"]} == {"Allow"}
    (rule,) = rules["Rules"]
    assert rule.keys() == {"ID", "Status", "Filter", "AbortIncompleteMultipartUpload"}


# Kubernetes: the fields of its API that the page uses; a list stands for the items of a list.

CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "resources": {"limits": {"memory": str, "nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "containers": [CONTAINER],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
RULE = {
    "action": str,
    "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
    "onPodConditions": [{"type": str, "status": str}],
}
JOB = {
    "completionMode": str,
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [RULE]},
    "template": {"spec": POD},
}
CLAIM = {"accessModes": [str], "resources": {"requests": {"storage": str}}}
KINDS = {("v1", "PersistentVolumeClaim"): CLAIM, ("batch/v1", "Job"): JOB}


def unknown(value: Any, known: Any, path: str = "") -> list[str]:
    """The paths of fields that aren't known, or are of another type."""
    if isinstance(known, dict) and isinstance(value, dict):
        return [
            bad
            for key, inner in value.items()
            for bad in (
                unknown(inner, known[key], f"{path}.{key}") if key in known else [f"{path}.{key}"]
            )
        ]
    if isinstance(known, list) and isinstance(value, list):
        return [
            bad for i, item in enumerate(value) for bad in unknown(item, known[0], f"{path}[{i}]")
        ]
    return [] if isinstance(known, type) and isinstance(value, known) else [path]


def test_a_field_that_is_not_known_is_found():
    assert unknown({"backoffLimit": "3", "restart": 1}, JOB) == [".backoffLimit", ".restart"]


@pytest.mark.parametrize("title", ["train.yaml", "ranks.yaml"])
def test_kubernetes_knows_every_field_and_the_pods_have_time(title):
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the manifests")
    for document in yaml.safe_load_all(file_of("kubernetes.md", title)):
        known = KINDS[document["apiVersion"], document["kind"]]
        assert document.keys() == {"apiVersion", "kind", "metadata", "spec"}
        assert unknown(document["spec"], known) == []
        if document["kind"] == "Job":
            pod = document["spec"]["template"]["spec"]
            assert pod["restartPolicy"] == "Never"  # what podFailurePolicy wants
            assert pod["terminationGracePeriodSeconds"] > 50
            mounts = {mount["name"] for one in pod["containers"] for mount in one["volumeMounts"]}
            assert mounts == {volume["name"] for volume in pod["volumes"]}
