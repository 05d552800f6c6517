"""What a search for faults has counted, and what it has found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """Counts by name; every entry of ``faults`` is one line that says how to see the fault again."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, kind: str, line: str) -> None:
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {line}")

    def __str__(self) -> str:
        counted = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        return "\n".join([f"{self.name}: {counted}", *(f"  {line}" for line in self.faults)])
