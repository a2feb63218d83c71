"""Every scenario, by name, and what of the stand-in it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.cuda import scenarios_of_ends as ends
from tests.cuda import scenarios_of_restores as restores
from tests.cuda import scenarios_of_saves as saves
from tests.cuda.held import LEAST, SLOTS


@dataclass(frozen=True)
class Scenario:
    """`run` says whether all is right; `needs` is a word that `why_not` knows."""

    run: Callable[[], bool]
    needs: str = ""


SCENARIOS: dict[str, Scenario] = {
    "copy after the caller": Scenario(partial(saves.save_behind_work, "copy")),
    "hold after the caller": Scenario(partial(saves.save_behind_work, "hold")),
    "copy after torch": Scenario(saves.save_behind_torch),
    "update after a copy": Scenario(partial(saves.update_behind_save, "copy")),
    "update after a hold": Scenario(partial(saves.update_behind_save, "hold", memory=LEAST)),
    "hold lets the host go on": Scenario(saves.update_on_the_host_goes_on, "streams"),
    "update after given reads": Scenario(saves.update_behind_given_reads),
    "update after a copy, unannounced": Scenario(partial(saves.update_unannounced, "copy")),
    "update after a hold, unannounced": Scenario(partial(saves.update_unannounced, "hold")),
    "update once a copy is staged": Scenario(partial(saves.update_when_staged, "copy")),
    "update once a hold is staged": Scenario(partial(saves.update_when_staged, "hold")),
    "update of a hold while the disk is stuck": Scenario(saves.update_while_the_disk_is_stuck),
    "copy staged before it is written": Scenario(
        partial(saves.staged_while_the_disk_is_stuck, "copy", memory=LEAST)
    ),
    "hold staged before it is written": Scenario(
        partial(saves.staged_while_the_disk_is_stuck, "hold", memory=SLOTS)
    ),
    "hold staged at once": Scenario(partial(saves.staged_while_the_disk_is_stuck, "hold")),
    "hold staged when its slots are full": Scenario(saves.staged_when_its_slots_are_full),
    "dropped after a copy": Scenario(partial(saves.drop_behind_save, "copy")),
    "dropped after a hold": Scenario(partial(saves.drop_behind_save, "hold")),
    "host arrays updated after a hold": Scenario(saves.update_behind_hold_of_host_arrays),
    "host arrays dropped after a hold": Scenario(saves.drop_behind_hold_of_host_arrays),
    "slots after a copy": Scenario(partial(ends.slots_come_back, "copy")),
    "slots after a hold": Scenario(partial(ends.slots_come_back, "hold")),
    "two saves, one after the other": Scenario(saves.save_behind_a_save),
    "slots after a full disk": Scenario(ends.slots_come_back_from_a_full_disk),
    "slots after a refused download": Scenario(
        partial(ends.slots_come_back_if_refused, "copy", "cuMemcpyAsync", 1), "faults"
    ),
    "slots after a refused second look": Scenario(
        partial(ends.slots_come_back_if_refused, "hold", "cuLaunchKernel", 5, memory=SLOTS),
        "faults",
    ),
    "update goes on without threads": Scenario(
        partial(ends.update_goes_on_without_threads, "gpuckpt-work")
    ),
    "update goes on without any thread": Scenario(
        partial(ends.update_goes_on_without_threads, "gpuckpt")
    ),
    "differences of copies": Scenario(saves.differences_of_copies),
    "a copy that nobody saves": Scenario(ends.a_copy_that_nobody_saves),
    "tables in memory of their own": Scenario(saves.tables_are_the_streams_own),
    "tables of another device": Scenario(saves.tables_of_another_device, "two devices"),
    "uploads after the caller": Scenario(restores.restore_behind_work),
    "caller after uploads": Scenario(restores.read_behind_uploads),
    "dropped after an upload": Scenario(restores.drop_behind_upload),
    "slot reused after its upload": Scenario(restores.restore_many_chunks),
    "slot reused after a failed save": Scenario(restores.restore_after_a_failed_save),
    "slot reused after a refused download": Scenario(
        partial(restores.restore_after_a_refusal, "copy", 3), "faults"
    ),
    "slot reused after a refused look at a copy": Scenario(
        partial(restores.restore_after_a_refused_peek, "copy"), "faults"
    ),
    "slot reused after a refused look": Scenario(
        partial(restores.restore_after_a_refused_peek, "hold"), "faults"
    ),
    "slot reused after a refused read": Scenario(
        partial(restores.restore_after_a_refusal, "hold", 3), "faults"
    ),
    "slot reused after a refused second look": Scenario(
        partial(restores.restore_after_a_refusal, "hold", 7), "faults"
    ),
    "dropped after a refused upload": Scenario(restores.restore_after_a_refused_upload, "faults"),
    "dropped after a failed restore": Scenario(restores.drop_behind_a_failed_restore),
    "slots after a restore": Scenario(restores.slots_come_back_from_a_restore),
    "slots after overlapping targets": Scenario(restores.slots_come_back_if_targets_overlap),
    "slots after a refused upload": Scenario(
        restores.slots_come_back_if_an_upload_is_refused, "faults"
    ),
}


def why_not(needs: str, settings: dict[str, Any] | None) -> str | None:
    """Why a scenario can't be played with these settings of the stand-in (None: a real GPU)."""
    known = settings or {}
    if needs == "faults" and settings is None:
        return "only the stand-in fails on request"
    if needs == "streams" and known.get("mode") == "eager":
        return "in eager mode each call completes before it returns"
    if needs == "two devices" and known.get("devices", 1) < 2:
        return "one device"
    return None
