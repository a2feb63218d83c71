"""How often properties are tried, and which tests go to which of several workers (`-n`)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from tests.often import often

# Of properties that don't say themselves how often; what else there is by default stays.
settings.register_profile("often", settings(max_examples=often(100)))
settings.load_profile("often")

# What a fixture of theirs makes once for a module, by a benchmark, by ranks or by a compiler, takes
# seconds: each worker would make it again that gets one of the tests that use it.
TOGETHER = (
    "tests/convert/test_memory.py",
    "tests/convert/test_old_and_new_systems.py",
    "tests/frameworks/test_keras.py",
    "tests/kernels/test_deltas.py",
    "tests/kernels/test_oldest_nvrtc.py",
    "tests/kernels/test_on_cpu.py",
    "tests/kernels/test_strided.py",
    "tests/ranks/test_dcp.py",
    "tests/ranks/test_jax_leaves.py",
    "tests/ranks/test_torch_leaves.py",
    "tests/test_bench_gpu.py",
)


# One of its tests of the same parameters looks at what the other has compiled.
PAIRED = "tests/kernels/test_compile.py"


def scope_of(nodeid: str) -> str:
    """Tests of one scope go to one worker: a test by itself, unless its file's go together."""
    file = nodeid.partition("::")[0]
    if file == PAIRED:
        return file + nodeid.partition("[")[2]
    return file if file in TOGETHER else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadscope`: scopes as above, those of several tests first; else as it is."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long begins first: else one worker goes on when the others have ended."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
