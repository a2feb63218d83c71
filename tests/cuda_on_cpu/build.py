"""Builds the stand-in for CUDA's driver and runtime, once for each state of its sources.

CuPy's wheel carries NVIDIA's runtime as a static library, which asks the driver for tables that
nobody documents. So the one extension module that contains it, ``cupy_backends.cuda.api.runtime``,
is built again from CuPy's own source distribution, against a library of documented calls
(``driver/``). All the rest of CuPy stays the wheel's.

Run it as ``python -m tests.cuda_on_cpu.build [DIR]`` or by its path. It exits with `MISSING` and a
sentence where the machine lacks what the build needs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUPY = "cupy-cuda13x"
MISSING = 3
LIBRARY = "libcuda.so.1"
RUNTIME = "runtime" + sysconfig.get_config_var("EXT_SUFFIX")
NEEDED_HEADERS = {  # and the PyPI package of each
    "cuda.h": "nvidia-cuda-runtime",
    "cuda_runtime_api.h": "nvidia-cuda-runtime",
    "crt/host_defines.h": "nvidia-cuda-crt",
    "cuda_profiler_api.h": "nvidia-cuda-profiler-api",
}
CYTHON_ENV = {
    "CUPY_USE_CUDA_PYTHON": "False",
    "CUPY_CUFFT_STATIC": "False",
    "CUPY_CUDA_VERSION": "13020",
    "CUPY_HIP_VERSION": "0",
}
CYTHON_DIRECTIVES = (
    "embedsignature=True,c_api_binop_methods=True,binding=False,warn.deprecated.IF=False"
)


class MissingError(RuntimeError):
    """The machine lacks something that the stand-in is built from."""


def home() -> Path:
    """The cache directory: builds, kernels and the source distribution lie under it."""
    default = HERE.parents[1] / ".venv" / "cuda-on-cpu"
    return Path(os.environ.get("GPUCKPT_STANDIN_DIR") or default).absolute()


def cupy_version() -> str:
    try:
        return importlib.metadata.version(CUPY)
    except importlib.metadata.PackageNotFoundError:
        raise MissingError(f"{CUPY} is not installed in {sys.prefix}") from None


def sources() -> list[Path]:
    return sorted(p for d in ("driver", "emulator") for p in (HERE / d).glob("*.*"))


def location() -> Path:
    """Where the build of exactly these sources for this CuPy and this Python lies."""
    key = hashlib.sha256(f"{cupy_version()} {RUNTIME} {sys.version}".encode())
    for path in (Path(__file__), *sources()):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    return home() / key.hexdigest()[:16]


def reason_unbuilt() -> str | None:
    """None if the stand-in is built and current, else why it can't be used."""
    try:
        where = location()
    except MissingError as error:
        return str(error)
    if (where / LIBRARY).exists() and (where / RUNTIME).exists():
        return None
    return f"the CUDA stand-in isn't built (or its sources have changed): no {where}"


def headers() -> Path:
    """The include directory of CUDA: PyPI's packages in this environment, else a toolkit's."""
    candidates = []
    spec = importlib.util.find_spec("nvidia")
    if spec is not None:
        candidates += [Path(p) / "cu13" / "include" for p in spec.submodule_search_locations or ()]
    if os.environ.get("CUDA_HOME"):
        candidates.append(Path(os.environ["CUDA_HOME"]) / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    for directory in candidates:
        if all((directory / name).exists() for name in NEEDED_HEADERS):
            return directory
    absent = [n for n in NEEDED_HEADERS if not any((d / n).exists() for d in candidates)]
    wanted = ", ".join(
        f"{name} (PyPI: {NEEDED_HEADERS[name]})" for name in absent or NEEDED_HEADERS
    )
    places = ", ".join(map(str, candidates))
    raise MissingError(f"CUDA's headers: no one place has all; missing {wanted}; tried {places}")


def compiler() -> str:
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise MissingError("Python.h is missing (Debian: apt-get install python3-dev)")
    found = shutil.which(os.environ.get("CXX") or "g++")
    if found is None:
        raise MissingError("no C++ compiler: g++ is not on PATH (Debian: apt-get install g++)")
    return found


def execute(*command: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        shown = " ".join(map(str, command[:4]))
        raise RuntimeError(f"{shown} … exited with {done.returncode}\n{done.stdout}{done.stderr}")


def cupy_sources(work: Path) -> Path:
    """CuPy's source distribution of the installed version, unpacked; the archive is kept."""
    version = cupy_version()
    archive = home() / "sdist" / f"cupy-{version}.tar.gz"
    if not archive.exists():
        download(version, archive)
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    return work / f"cupy-{version}"


def download(version: str, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-binary", "cupy", "--dest", str(archive.parent), f"cupy=={version}"]
    stub = os.environ | {"CUPY_INSTALL_USE_STUB": "1"}  # its metadata, without looking for CUDA
    done = subprocess.run(pip, env=stub, capture_output=True, text=True, check=False)
    if done.returncode or not archive.exists():
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = lines[0] if lines else f"no {archive.name} came"
        raise MissingError(f"CuPy's source distribution {version} can't be had: {why}")


def build_driver(target: Path, include: Path) -> None:
    cpp = [HERE / "driver" / name for name in ("stubcuda.cpp", "stubcudart.cpp")]
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wno-deprecated-declarations", "-fPIC"]
    link = ["-shared", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}", "-ldl", "-lpthread"]
    execute(compiler(), *flags, f"-I{include}", *cpp, "-o", target / LIBRARY, *link)


def build_runtime(target: Path, include: Path, source: Path) -> None:
    if importlib.util.find_spec("Cython") is None:
        raise MissingError(f"cython>=3.2,<3.3 is not installed in {sys.prefix}")
    versions = CYTHON_ENV | {"CUPY_CYTHON_VERSION": importlib.metadata.version("cython")}
    defines = [part for name, value in versions.items() for part in ("-E", f"{name}={value}")]
    module = ["--module-name", "cupy_backends.cuda.api.runtime"]
    cython = [sys.executable, "-m", "cython", "--cplus", "-3", "-X", CYTHON_DIRECTIVES, *defines]
    pyx = Path("cupy_backends/cuda/api/runtime.pyx")
    execute(*cython, *module, pyx, cwd=source)
    includes = [sysconfig.get_paths()["include"], include, "cupy_backends", "cupy/_core/include"]
    flags = ["-O1", "-fPIC", "-shared", "-w", *(f"-I{path}" for path in includes)]
    files = [pyx.with_suffix(".cpp"), target / LIBRARY, "-o", target / RUNTIME]
    execute(compiler(), *flags, *files, cwd=source)


def build() -> Path:
    """The directory of a current build, made if it isn't there; older ones are removed."""
    where = location()
    if reason_unbuilt() is None:
        return where
    include = headers()
    compiler()
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home(), prefix="new-") as scratch:
        target = Path(scratch) / "build"
        target.mkdir()
        source = cupy_sources(Path(scratch))
        build_driver(target, include)
        build_runtime(target, include, source)
        for old in home().glob("*/" + LIBRARY):
            if not old.parent.name.startswith("new-"):
                shutil.rmtree(old.parent)
        target.rename(where)
    return where


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("directory", nargs="?", help="the cache directory")
    directory = parser.parse_args().directory
    if directory:
        os.environ["GPUCKPT_STANDIN_DIR"] = directory
    start = time.monotonic()
    try:
        where = build()
    except MissingError as error:
        print(f"cuda-on-cpu: can't be built here: {error}", file=sys.stderr)
        return MISSING
    print(f"cuda-on-cpu: {where} ({time.monotonic() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
