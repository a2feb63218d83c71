"""What a check found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "note", "FAILED"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check: `found` is what was seen, `advice` what to do unless all is well."""

    check: str
    outcome: Outcome
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Verdict:
    """All is as it should be."""
    return Verdict(check, "ok", found)


def note(check: str, found: str, advice: str) -> Verdict:
    """It works, but there is something to know."""
    return Verdict(check, "note", found, advice)


def failed(check: str, found: str, advice: str) -> Verdict:
    """A promise of gpuckpt's doesn't hold here."""
    return Verdict(check, "FAILED", found, advice)


def recommendation(verdicts: Sequence[Verdict]) -> str:
    """All verdicts in a sentence."""
    broken = [one.check for one in verdicts if one.outcome == "FAILED"]
    if broken:
        return f"Don't keep checkpoints here: {', '.join(broken)} failed."
    notes = [one.check for one in verdicts if one.outcome == "note"]
    if notes:
        return (
            f"Checkpoints are safe here as far as can be seen; read the notes: {', '.join(notes)}."
        )
    return "Checkpoints are safe here as far as can be seen."
