"""Convert a checkpoint from one format to another, tensor by tensor, in bounded memory.

1. Open the source, and see what of it the target can hold.   Nothing is written of what can't be.
2. Write the target under another name; each part that is     A source's own check values are
   read of the source is looked at on its way.                compared by whoever reads it.
3. Make it durable, and give it its name.                     Until then there is no target.
4. If asked, read it back, and compare.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from gpuckpt.apart import Apart
from gpuckpt.conversion.feed import Feed
from gpuckpt.conversion.formats import source_format, target_format
from gpuckpt.conversion.port import Format, Options, Source
from gpuckpt.conversion.replacing import check_target
from gpuckpt.conversion.report import Conversion, Moved
from gpuckpt.conversion.singa import SINGA
from gpuckpt.errors import CorruptError, InvalidError, UnsupportedError
from gpuckpt.seal import Key, make_seal
from gpuckpt.sizes import parse_nbytes

Progress = Callable[[str, int, int], object]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str | None = None,
    step: int | None = None,
    names: str | Iterable[str] | None = None,
    strict: bool = False,
    verify: bool = False,
    force: bool = False,
    ignore_checksums: bool = False,
    shard_size: int | str | None = None,
    codec: str = "auto",
    memory: int | str = "128 MiB",
    key: Key | None = None,
    target_key: Key | None = None,
    workers: int | None = None,
    axes: Mapping[str, int] | None = None,
    progress: Progress = lambda _what, _nbytes, _total: None,
) -> Conversion:
    """Convert what is at `source` into a new `target` of another format.

    The source's format is recognised by what is there, the target's by its
    name, unless `to` names it (docs/guides/convert.md lists them).  `step` is
    the step of a root that is read or, if the source has none, written.  With
    `names` (names or globs), only these leaves, as a flat dict.  With
    `strict`, what a target can't hold is an error; else the result tells what
    is `lost`, which is never a tensor's bytes.  `verify` reads the target back
    and compares; `force` replaces one that is there: a directory only if it is
    empty or has one checkpoint and nothing else, and never the source.
    Targets get checksums of their tensors; where these stand with a source, they are
    compared, unless `ignore_checksums` says that it was changed on purpose.  `workers` and `axes`
    are of SINGA's files: how many there are to be, and the axis of each parameter,
    by name, along which it is cut (0 if it isn't named).
    `shard_size` cuts safetensors into files of at most so many bytes of data.  `codec` and
    `target_key` are those of a checkpoint that is written, `key` is what one
    that is read must be sealed with.  `progress` is told what is done
    ("reading", "verifying"), how many bytes just now, and of how many.

    Blocks until the target is durable.  The memory that it takes doesn't depend
    on the state's size, but where the guide says so of a format.  An
    interrupt, or a failure, leaves no target.

    Raises:
        NotFoundError: there is no source, or no such step or name.
        InvalidError: the formats can't be told, the target is there already, or it is
            the source, or a directory with more in it than a checkpoint; or an option
            is of another format.
        UnsupportedError: the target can't hold a tensor, or with `strict` something else.
        CorruptError: the source isn't what was written, or, of `verify`, the target.
    """
    seal, target_seal = make_seal(key), make_seal(target_key)
    key = target_key = None  # so that no traceback's locals have them
    at, into = os.fspath(source), os.fspath(target)
    reads, writes = source_format(at), target_format(into, to)
    _check_options(reads, writes, workers, axes)
    options = Options(
        step=step,
        shard_nbytes=None if shard_size is None else parse_nbytes(shard_size),
        codec=codec,
        memory=memory,
        force=force,
        seal=seal,
        target_seal=target_seal,
        standing=check_target(at, reads, into, writes, force=force),
        workers=workers,
        axes=axes or {},
    )
    picked = [names] if isinstance(names, str) else None if names is None else list(names)
    with _opened(reads, at, options) as opened:
        total = opened.outline.nbytes
        feed = Feed(
            opened,
            picked,
            lambda nbytes: progress("reading", nbytes, total),
            ignore_checksums=ignore_checksums,
        )
        total = feed.outline.nbytes
        lost = [*feed.outline.left_out, *writes.lost(feed.outline)]
        if strict and lost:
            raise UnsupportedError(into, f"it would lose this: {'; '.join(lost)}")
        written = _write(writes, into, feed, replace(options, checksums=feed.checksums))
    if verify:
        again = Options(
            step=written, memory=options.memory, seal=options.target_seal, axes=options.axes
        )
        _verify(writes, into, feed, again, lambda n: progress("verifying", n, total))
    return _report((at, reads), (into, writes), feed, lost, step=written, verified=verify)


def _check_options(
    reads: Format, writes: Format, workers: int | None, axes: Mapping[str, int] | None
) -> None:
    """See that nothing is asked for that would be passed over."""
    if workers is not None and writes.name != SINGA.name:
        raise InvalidError(f"workers= (--workers) is for targets of singa, not of {writes.name}")
    if axes and SINGA.name not in (reads.name, writes.name):
        raise InvalidError("axes= (--axis) is for conversions from or to singa")


@contextmanager
def _opened(reads: Format, at: str, options: Options) -> Iterator[Source]:
    if reads.open is None:
        raise InvalidError(f"{at}: {reads.name} is only written, not read")
    with reads.open(at, options) as source:
        yield source


def _write(writes: Format, into: str, feed: Feed, options: Options) -> int | None:
    """In a thread of its own, so that no interrupt cuts anything in half; the step, if any."""
    write = writes.write
    if write is None:
        raise InvalidError(f"{into}: {writes.name} is only read, not written")
    written = Apart(lambda: write(into, feed, options)).run(feed.stopped.set)
    feed.check_all_read()
    if isinstance(written, int):
        return written
    return options.step if options.step is not None else feed.outline.step


def _verify(
    writes: Format, into: str, feed: Feed, options: Options, progress: Callable[[int], object]
) -> None:
    """Read the target back, and see that each name has the bytes that went into it."""
    with _opened(writes, into, options) as opened:
        found = Feed(opened, None, progress)

        def read_all() -> None:
            for position in range(len(found.outline.specs)):
                for _ in found.read(position):
                    pass

        Apart(read_all).run(found.stopped.set)
        wanted, there = _facts(feed), _facts(found)
        for name in sorted(wanted.keys() | there.keys()):
            if wanted.get(name) != there.get(name):
                raise CorruptError(
                    f"{into}: {name}",
                    f"read back as {there.get(name)}, and {wanted.get(name)} was written",
                    "delete it, check the disk, and convert again",
                )


def _facts(feed: Feed) -> dict[str, tuple[object, ...]]:
    specs = feed.outline.specs
    return {
        name: (specs[at].dtype, specs[at].shape, feed.digests[at])
        for name, at in feed.outline.tensors.items()
    }


def _report(
    source: tuple[str, Format],
    target: tuple[str, Format],
    feed: Feed,
    lost: Sequence[str],
    *,
    step: int | None,
    verified: bool,
) -> Conversion:
    own = source[1].checks
    further: dict[str, list[str]] = {}
    for name, first in feed.outline.aliases.items():
        further.setdefault(first, []).append(name)
    tensors = tuple(
        Moved(
            *(spec.name, spec.dtype, spec.shape, spec.nbytes, feed.digests[at]),
            aliases=tuple(further.get(spec.name, ())),
            checked="checksum" if at in feed.compared else "format" if own else None,
        )
        for at, spec in enumerate(feed.outline.specs)
    )
    return Conversion(
        *(source[0], source[1].name, target[0], target[1].name, step),
        tensors=tensors,
        values=len(feed.outline.values),
        lost=tuple(lost),
        verified=verified,
    )
