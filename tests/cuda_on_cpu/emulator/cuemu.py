"""Builds CUDA kernels with g++ and launches them on the CPU.

A kernel's source isn't changed: cuemu.h, included before it, gives CUDA's words a meaning that g++
understands, and a table of the kernels is appended to the preprocessed text. With `check=True` the
memory accesses are checked exactly, which finds races and bad addresses whatever the schedule, at
1 to 15 MB a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.cuda_on_cpu import build as standin_build

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

HERE = Path(__file__).resolve().parent
PASSED_ON = ("-D", "-U", "-I", "--include-path", "-include")  # of NVRTC's options
DYNAMIC_SHARED = re.compile(
    r'extern\s+static\s+__attribute__\(\(section\("cuemu_shared"\), used\)\)\s*'
    r"((?:__attribute__\(\(aligned\(\d+\)\)\)\s*)?)([\w:\s]+?)\s+(\w+)\s*\[\s*\]\s*;",
)
TABLE = """
extern "C" {{ extern const cuemu::Entry cuemu_table[]; extern const int cuemu_table_n;
const cuemu::Entry cuemu_table[] = {{
{rows}  {{nullptr, nullptr, 0, nullptr, 0}}}};
const int cuemu_table_n = {count};
}}
"""


class CompileError(RuntimeError):
    """g++ refused a kernel's source."""


class KernelError(RuntimeError):
    """A kernel did what it must not do; the text names the block, the thread and the line."""


class Dims(ctypes.Structure):
    """A launch's shape, as cuemu_launch takes it."""

    _fields_ = [(k, ctypes.c_uint) for k in ("gx", "gy", "gz", "bx", "by", "bz", "shared")]


def kernels_of(text: str) -> dict[str, int]:
    """The kernels in preprocessed text, with their launch bounds (0: none)."""
    found: dict[str, int] = {}
    for match in re.finditer(r"__cuemu_global__", text):
        head = text[match.end() : match.end() + 600]
        before = text[max(0, match.start() - 300) : match.start()]
        if re.search(r"template\s*<[^;{}]*>\s*(static\s+)?$", before):
            continue  # templates are found by name expression only
        bounds = re.match(r"[^;{]*?__cuemu_lb__\s*\(\s*(\d+)", head.split("{", maxsplit=1)[0])
        head = re.sub(r"__cuemu_lb__\s*\([^)]*\)", " ", head)
        head = re.sub(r"__attribute__\s*\(\(.*?\)\)", " ", head)
        name = re.search(r"\b(\w+)\s*\(", head)
        if name:
            found.setdefault(name.group(1), int(bounds.group(1)) if bounds else 0)
    return found


def prepare(text: str, expressions: Sequence[str]) -> str:
    """Preprocessed text as g++ takes it, with the kernels' table."""
    table = kernels_of(text) | dict.fromkeys(expressions, 0)
    text = re.sub(r"__cuemu_lb__\s*\([^()]*\)", " ", text).replace("__cuemu_global__", " ")
    text = DYNAMIC_SHARED.sub(
        r"\2 *const \3 = reinterpret_cast<\2 *>(cuemu_dyn_shared);",
        text,
    )
    rows = "".join(f'  cuemu::entry<&{name}>("{name}", {n}),\n' for name, n in table.items())
    return text + TABLE.format(rows=rows, count=len(table))


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(map(str, command[:3]))} … failed\n{done.stderr}")


def preprocess(text: str, name: str, base: Path, options: Sequence[str]) -> str:
    """CUDA text through g++'s preprocessor, cuemu.h before it."""
    source, output = base.with_suffix(".cu.cpp"), base.with_suffix(".ii")
    source.write_text(f'#line 1 "{name}"\n{text}\n')
    if re.search(r"#\s*include\s*<(cupy|cuda|cub|thrust)", text):
        # CUDA's own headers need a host compile: no __CUDACC__
        device = ["-DCUEMU_CUDA_HEADERS", "-idirafter", str(standin_build.headers())]
    else:
        device = ["-D__CUDACC__", "-D__global__=__cuemu_global__"]
    header = ["-I", str(HERE), "-include", str(HERE / "cuemu.h")]
    run(standin_build.compiler(), "-E", *device, *header, *options, source, "-o", output)
    return output.read_text()


def compile_library(
    text: str,
    name: str,
    base: Path,
    *,
    check: bool,
    options: Sequence[str],
    opt: str,
) -> Path:
    """A host library of the text's kernels, beside `base`."""
    opts = [o.replace("--include-path=", "-I") for o in options if o.startswith(PASSED_ON)]
    std = [o.replace("--std", "-std") for o in options if o.startswith(("-std", "--std"))]
    std = std[:1] or ["-std=c++17"]
    expressions = [o.removeprefix("expr:") for o in options if o.startswith("expr:")]
    ready = prepare(preprocess(text, name, base, [*std, *opts]), expressions)
    base.with_suffix(".ii").write_text(ready)
    common = [standin_build.compiler(), *std, opt, "-g", "-fPIC", "-fno-gnu-unique"]
    common += ["-fno-strict-aliasing", "-w"]
    hooks = ["-fsanitize=thread,alignment,shift,bounds"] if check else []
    hooks += ["--param", "tsan-instrument-func-entry-exit=0"] if check else []
    kind = ["-c", "-x", "c++-cpp-output"]
    run(*common, *hooks, *kind, base.with_suffix(".ii"), "-o", base.with_suffix(".o"))
    runtime = runtime_object([*common, *(["-DCUEMU_CHECK"] if check else [])], base)
    library = base.with_suffix(".so")
    run(*common, "-shared", "-Wl,-Bsymbolic", base.with_suffix(".o"), runtime, "-o", library)
    return library


def runtime_object(command: Sequence[str | Path], base: Path) -> Path:
    """The emulator's own part of each library, which is kept for all that are built so."""
    key = hashlib.sha256(repr((emulator_text(), *command)).encode()).hexdigest()[:24]
    kept = standin_build.home() / "emulated" / f"{key}.rt.o"
    with alone(kept):
        if not kept.exists():
            built = base.with_suffix(".rt.o")
            run(*command, "-c", HERE / "cuemu_rt.cpp", "-o", built)
            built.rename(kept)  # at once: it may be looked for
    return kept


@contextlib.contextmanager
def alone(kept: Path) -> Iterator[None]:
    """No other process builds the same meanwhile: several that start together want the same."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def emulator_text() -> str:
    """All sources of the emulator, which a build depends on."""
    return "".join(path.read_text() for path in sorted(HERE.glob("cuemu*")))


def host_library_of(
    text: str,
    name: str = "kernels.cu",
    *,
    check: bool = False,
    options: Iterable[str] = (),
    expressions: Iterable[str] = (),
    opt: str = "-O1",
) -> Path:
    """The built library of CUDA source text; `options` are NVRTC-like (-D, -I, -std)."""
    given = [*options, *(f"expr:{e}" for e in expressions)]
    key = hashlib.sha256(repr((text, emulator_text(), check, opt, given)).encode()).hexdigest()[:24]
    kept = standin_build.home() / "emulated" / f"{key}.so"
    if kept.exists():
        return kept
    with alone(kept), tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        if not kept.exists():
            base = Path(scratch) / "k"
            built = compile_library(text, name, base, check=check, options=given, opt=opt)
            built.rename(kept)  # at once: it may be looked for
    return kept


class Lib:
    """A loaded library of kernels, launched on host memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dll = d = ctypes.CDLL(str(path))
        d.cuemu_name.restype = ctypes.c_char_p
        d.cuemu_error.restype = ctypes.c_char_p
        d.cuemu_param_size.restype = ctypes.c_uint
        pointers = ctypes.POINTER(ctypes.c_void_p)
        d.cuemu_launch.argtypes = [ctypes.c_int, ctypes.POINTER(Dims), pointers]
        d.cuemu_set.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
        count = ctypes.c_int.in_dll(d, "cuemu_table_n").value
        self.index = {d.cuemu_name(i).decode(): i for i in range(count)}

    def set(self, **settings: int) -> None:
        """order: 0 forward, 1 reverse, n random; block_order: 1 reverse; poison: a byte or -1."""
        for key, value in settings.items():
            self.dll.cuemu_set(key.encode(), int(value))

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """Runs the kernel to its end; arrays are passed by address."""
        i = self.index[name]
        dims = [(*([s] if isinstance(s, int) else s), 1, 1)[:3] for s in (grid, block)]
        if self.dll.cuemu_nparams(i) != len(args):
            raise TypeError(f"{name} takes {self.dll.cuemu_nparams(i)} arguments, got {len(args)}")
        values = [self.argument(i, k, arg) for k, arg in enumerate(args)]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*map(ctypes.addressof, values))
        if self.dll.cuemu_launch(i, Dims(*dims[0], *dims[1], shared), pointers):
            raise KernelError(self.locate(self.dll.cuemu_error().decode()))

    def argument(self, kernel: int, position: int, value: Any) -> Any:
        size = self.dll.cuemu_param_size(kernel, position)
        if hasattr(value, "ctypes"):
            value = value.ctypes.data
        if not isinstance(value, bytes):
            value = int(value).to_bytes(size, "little", signed=value < 0)
        return ctypes.create_string_buffer(value, size)

    def locate(self, message: str) -> str:
        """The message with its [pc+0x…] turned into source lines."""
        match = re.search(r"\[pc\+(0x[0-9a-f]+)\]", message)
        tool = shutil.which("addr2line")
        if match is None or tool is None:
            return message
        command = [tool, "-e", self.path, "-i", match.group(1)]
        out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        lines = [x.split(" ", maxsplit=1)[0] for x in out.split("\n") if x and "cuemu" not in x]
        places = " <- ".join(Path(x).name for x in lines[:3])
        return message.replace(match.group(0), f"({places})")

    def regions(self, *arrays: Any, readonly: Sequence[Any] = ()) -> None:
        """Checked build: the only memory that kernels may touch."""
        parts = [(a, 1) for a in arrays] + [(a, 0) for a in readonly]
        flat = [v for a, writable in parts for v in (a.ctypes.data, a.nbytes, writable)]
        self.dll.cuemu_regions((ctypes.c_ulonglong * len(flat))(*flat), len(parts))

    def written(self, array: Any) -> int:
        """Checked build: how many of the array's bytes kernels wrote since `regions`."""
        self.dll.cuemu_written.restype = ctypes.c_ulonglong
        return int(self.dll.cuemu_written(ctypes.c_ulonglong(array.ctypes.data)))
