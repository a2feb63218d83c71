"""What a campaign of kills has done, and what it found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """What was done, and what was found."""

    kills: Counter[str] = field(default_factory=Counter)
    """By place; by the parent's clock; in races."""
    outlived: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    ahead: Counter[int] = field(default_factory=Counter)
    """Steps that the newest checkpoint was after the last that was announced."""
    failures: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """Of ranks: what those said who named others than who was killed."""

    def report(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "kills": sum(self.kills.values()),
            "kills_by_place": dict(self.kills.most_common()),
            "outlived_by_place": dict(self.outlived.most_common()),
            "checks": dict(self.checks),
            "newest_minus_announced": {str(at): self.ahead[at] for at in sorted(self.ahead)},
            "failures": self.failures,
            "others_named": self.others,
        }
