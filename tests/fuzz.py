"""`python -m tests.fuzz --seconds N`: changed golden checkpoints, guided by coverage.

Of every feature: manifests, indices, and the encoded bytes of chunks, deltas,
sparse, turned and derived ones too, whose checksums are then made to fit.

Needs atheris (`pip install atheris==3.1.0`), which the suite doesn't: there the
same changes are drawn by hypothesis (`test_hostile_files`).  Whatever isn't a
`CheckpointError` ends it, with the input that led there.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gpuckpt"]):
    from gpuckpt.errors import CheckpointError
    from gpuckpt.manifest import unpack_manifest
    from tests import hostile

INPUT_NBYTES = 512
TIMEOUT_SECONDS = 60  # for one input: longer is a finding
MEMORY_MIB = 2048
SEEDS = 64


def main() -> None:
    """Fuzz until the time is over or something is found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="where inputs that reach new code are kept")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    roots = hostile.golden_roots()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        place = Path(name) / "root"

        def one(data: bytes) -> None:
            provider = atheris.FuzzedDataProvider(data)

            def choose(count: int) -> int:
                number: int = provider.ConsumeIntInRange(0, count - 1)
                return number

            files = hostile.changed(roots[choose(len(roots))].files, choose)
            hostile.write(place, files)
            hostile.use(place)
            raw(provider.ConsumeBytes(INPUT_NBYTES))

        corpus = options.corpus or Path(name) / "corpus"
        sow(corpus)
        limits = [f"-max_total_time={options.seconds}", f"-timeout={TIMEOUT_SECONDS}"]
        limits += [f"-rss_limit_mb={MEMORY_MIB}", f"-max_len={INPUT_NBYTES}", "-len_control=0"]
        atheris.Setup([sys.argv[0], *limits, "-print_final_stats=1", str(corpus)], one)
        atheris.Fuzz()


def sow(corpus: Path) -> None:
    """Inputs to begin with: of none, or a few bytes, every choice would be the first."""
    corpus.mkdir(exist_ok=True)
    for seed in range(SEEDS):
        (corpus / f"seed-{seed}").write_bytes(random.Random(seed).randbytes(INPUT_NBYTES))


def raw(data: bytes) -> None:
    """These very bytes as a manifest's text."""
    try:
        unpack_manifest(hostile.sealed_manifest(data), "m")
    except CheckpointError:
        return


if __name__ == "__main__":
    main()
