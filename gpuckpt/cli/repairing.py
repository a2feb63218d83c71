"""`gpuckpt repair`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from gpuckpt.cli.output import print_json
from gpuckpt.rebuilding import step_of
from gpuckpt.repair import Repaired, check_apart, repair
from gpuckpt.salvage import Loss
from gpuckpt.seal import make_seal
from gpuckpt.sizes import format_nbytes
from gpuckpt.spec import Spec
from gpuckpt.stores.opening import open_store
from gpuckpt.tiers import Root


def repair_step(
    root: Root,
    step: int | None,
    to: Root,
    console: Console,
    *,
    fill: bool,
    as_json: bool,
    key: Path | None = None,
) -> int:
    """Salvage a step into another directory, and say what is lost; 1 if anything is."""
    check_apart(root, to)
    store, target = open_store(root), open_store(to)
    step = step_of(store, step)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    errors = Console(stderr=True)
    unseen = as_json or not errors.is_terminal
    with Progress(
        *columns, TransferSpeedColumn(), console=errors, transient=True, disable=unseen
    ) as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, nbytes: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"step {step}: {what}", total=None)
            bar.advance(tasks[what], nbytes)

        done = repair(store, step, target, fill=fill, progress=progress, seal=make_seal(key))
    if as_json:
        print_json(_facts(done, store.root, target.root))
    else:
        for line in _lines(done, store.root, target.root, fill=fill):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if done.is_whole else 1


def _facts(done: Repaired, root: str, to: str) -> dict[str, Any]:
    losses = [_loss_facts(loss, done) for loss in done.found.losses]
    return {
        "root": root,
        "step": done.written.step,
        "to": to,
        "whole": done.is_whole,
        "manifest": done.found.unread or None,
        "tensors": len(done.written.tensors),
        "raw_nbytes": done.written.raw_nbytes,
        "lost": [row for row in losses if row["filled"] is None],
        "filled": [row for row in losses if row["filled"] is not None],
        "recovered": [{"name": name, "step": at} for name, at in done.found.recovered.items()],
        "values": _values_of(done),
    }


def _loss_facts(loss: Loss, done: Repaired) -> dict[str, Any]:
    spec = loss.entry.spec
    return {
        "name": spec.label,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "raw_nbytes": spec.nbytes,
        "damage": [
            {"file": one.extent.segment, "offset": one.extent.offset, "reason": one.reason}
            for one in loss.wounds
        ],
        "also_needed_by": sorted(loss.also),
        "older_step": loss.older[0] if loss.older else None,
        "filled": done.filled.get(spec.label),
    }


def _values_of(done: Repaired) -> int | None:
    """The step that plain values and the structure are of; None if they are lost."""
    found = done.found
    if not found.unread:
        return done.written.step
    return found.template.step if done.filled and found.template is not None else None


def _lines(done: Repaired, root: str, to: str, *, fill: bool) -> list[str]:
    found, written = done.found, done.written
    every = len(found.intact) + len(found.losses)
    lines = [f"step {written.step} of {root}: {len(found.intact)} of {every} tensors are intact"]
    if found.unread:
        lines += ["", f"  its manifest can't be read: {found.unread}", f"  {_of_values(done)}"]
    for name, at in found.recovered.items():
        lines += ["", f"  damaged, but found again, bit for bit, in the files of step {at}: {name}"]
    for loss in found.losses:
        lines += ["", *_loss_lines(loss, done, fill=fill)]
    size = format_nbytes(written.encoded_nbytes)
    lines += ["", f"written to {to} and verified: {len(written.tensors)} tensors, {size}"]
    if done.is_whole:
        lines[0] += ", nothing is lost"
    elif done.lost:
        lines.append(
            "restore(state, strict=False) leaves the lost ones as they are in `state`; "
            'add names="*" where an object refuses a part of its state'
        )
    return lines


def _of_values(done: Repaired) -> str:
    at = _values_of(done)
    if at is None:
        return "tensors are from its data files, by name; plain values and structure are lost"
    return f"tensors are from its data files; plain values and structure are those of step {at}"


def _loss_lines(loss: Loss, done: Repaired, *, fill: bool) -> list[str]:
    spec, at = loss.entry.spec, done.filled.get(loss.entry.spec.label)
    verb = "lost" if at is None else f"filled with its value of step {at}"
    lines = [f"  {verb}: {_shown(spec)}"]
    lines += [f"    {wound.extent}: {wound.reason}" for wound in loss.wounds[:3]]
    if len(loss.wounds) > 3:
        lines.append(f"    and {len(loss.wounds) - 3} more of its chunks")
    if not loss.wounds:
        lines.append("    the step's own files have nothing of it, the manifest said where it is")
    if spec.offset is not None and at is None:
        lines.append(f"    without this shard, all of {spec.name!a} is left out")
    if loss.also:
        several = "s" if len(loss.also) > 1 else ""
        lines.append(
            f"    step{several} {', '.join(map(str, sorted(loss.also)))} need these bytes, too"
        )
    if loss.older is None:
        lines.append("    no older step has it intact")
    elif not fill:
        lines.append(f"    step {loss.older[0]} has an older value of it: --fill takes that")
    return lines


def _shown(spec: Spec) -> str:
    shape = " × ".join(map(str, spec.shape)) or "scalar"  # noqa: RUF001
    name = spec.label if spec.label.isprintable() else ascii(spec.label)
    return f"{name} ({spec.dtype}, {shape}, {format_nbytes(spec.nbytes)})"
