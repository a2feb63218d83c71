"""What `force` may replace: never the source, and of directories only whole checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from gpuckpt import layout
from gpuckpt.conversion.checksums import FILE
from gpuckpt.conversion.formats import FORMATS
from gpuckpt.conversion.placing import path_of
from gpuckpt.conversion.port import Format
from gpuckpt.conversion.safetensors import INDEX_SUFFIX
from gpuckpt.conversion.serials import LOOKUP, MODEL, SUCCESS, is_trainer, serial_of
from gpuckpt.conversion.snapshots import checksums_name, parse_file_name
from gpuckpt.conversion.standing import Standing, standing
from gpuckpt.errors import InvalidError
from gpuckpt.stores.opening import is_local, is_url, split
from gpuckpt.stores.refusals import told

_ROOT = "gpuckpt"  # the format whose targets get a step more, and lose nothing else
_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_SHARE = re.compile(r"\.metadata|__\d+_\d+\.distcp|gpuckpt\.checksums\.json")
_ORBAX = re.compile(
    r"_METADATA|_CHECKPOINT_METADATA|_sharding|_strings\.json|commit_success\.txt|manifest\.ocdbt"
    r"|d|ocdbt\.process_\d+|array_metadatas|descriptor|gpuckpt\.checksums\.json"
)


def check_target(
    source: str, reads: Format, target: str, writes: Format, *, force: bool
) -> Standing | None:
    """See that a target isn't the source or part of it, and may be replaced if it is to be.

    Links are followed.  Returns what it has looked at, which nothing else may be
    taken for later; None where nothing will be replaced.

    Raises:
        InvalidError: writing it would take away the source, or what is no checkpoint.
    """
    if _is_remote(source) or _is_remote(target):
        homes = {source.rstrip("/"), _home_url(source)}
        _refuse_if(target.rstrip("/") in homes, source, target)
        return None
    at, into = path_of(source), path_of(target)
    home = at.parent if at.is_file() and _is_one_of_several(at.name) else at
    if writes.name == _ROOT:
        _refuse_if(into == at or (into == home and reads.name == _ROOT), source, target)
        return None
    _refuse_if(at.is_relative_to(into), source, target)
    within = into.exists() and into.is_relative_to(home)
    beside = reads.name == _ROOT and (into.is_dir() or writes.suits(str(into)))
    _refuse_if(within and not beside, source, target)
    if not force:
        return None
    if not into.is_dir():
        return standing(into)
    _check_directory(into)
    found = standing(into)
    _check_directory(into)  # so that what was noted between is what was checked
    return found


def _refuse_if(overlap: object, source: str, target: str) -> None:
    if overlap:
        raise InvalidError(
            f"{target}: the source {source} is, or is part of, what would be replaced there, or "
            "holds it; choose another target"
        )


def _check_directory(path: Path) -> None:
    with told(path, "read"):
        names = sorted(one.name for one in path.iterdir())
        whole = not names or any(
            one.recognises(str(path)) and _WHOLE[one.name](path, names)
            for one in FORMATS
            if one.name in _WHOLE
        )
    if not whole:
        raise InvalidError(
            f"{path} is a directory with more in it, or else, than one checkpoint as convert "
            "writes them, and force=True (--force) would delete it all: remove it by hand, or "
            "choose another target"
        )


def _files(pattern: re.Pattern[str]) -> Callable[[Path, Sequence[str]], bool]:
    """Whether there are only files that are called so."""
    return lambda path, names: all(pattern.fullmatch(n) and (path / n).is_file() for n in names)


def _is_orbax(_: Path, names: Sequence[str]) -> bool:
    return all(map(_ORBAX.fullmatch, names))


def _is_singa(path: Path, names: Sequence[str]) -> bool:
    found = [parse_file_name(name) if (path / name).is_file() else None for name in names]
    steps = {one[0] for one in found if one}
    others = {name for name, one in zip(names, found, strict=True) if one is None}
    return len(steps) == 1 and others <= set(map(checksums_name, steps))


def _is_fluid(path: Path, names: Sequence[str]) -> bool:
    if len(names) == 1 and serial_of(names[0]) is not None:
        names = [one.name for one in (path / names[0]).iterdir()]
    return all(name in (MODEL, LOOKUP, SUCCESS, FILE) or is_trainer(name) for name in names)


_WHOLE: dict[str, Callable[[Path, Sequence[str]], bool]] = {
    "safetensors": _files(_MODEL),
    "dcp": _files(_SHARE),
    "orbax": _is_orbax,
    "singa": _is_singa,
    "fluid": _is_fluid,
}


def _is_one_of_several(name: str) -> bool:
    """Whether a file is read with others beside it."""
    ours = layout.manifest_step(name) is not None or layout.segment_step(name) is not None
    return ours or name.endswith(INDEX_SUFFIX) or parse_file_name(name) is not None


def _is_remote(place: str) -> bool:
    return is_url(place) and not is_local(place)


def _home_url(source: str) -> str | None:
    root, name = split(source) if is_url(source) else ("", "")
    return root if _is_one_of_several(name) else None
