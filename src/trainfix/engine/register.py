"""What the engine knows of each fix in this process: its decisions, what it put where, and what it was told.

Whoever changes it holds the lock of `trainfix.engine.lifecycle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trainfix.engine import finder, replace
from trainfix.engine.contract import Fix, Target
from trainfix.engine.decide import Decision

LOUD = ("refused", "failed")


@dataclass
class Repair:
    """What the engine knows of one fix: its decisions, and the journal of what it put where."""

    fix: Fix
    installed: str
    decisions: dict[str, Decision]
    journal: list[replace.Entry] = field(default_factory=list)
    told: bool = False

    @property
    def applied(self) -> frozenset[str]:
        return frozenset(id for id, decision in self.decisions.items() if decision.state == "applied")

    @property
    def guarded(self) -> frozenset[str]:
        return frozenset(id for id, decision in self.decisions.items() if decision.state in ("applied", *LOUD))

    def in_place(self) -> bool:
        """Whether every target holds one of our replacements now (after a reload it does not)."""
        ours = [entry.replacement for entry in self.journal]
        return bool(ours) and all(any(live is our for our in ours) for live in live_functions(self.fix.targets))

    def lost(self) -> list[str]:
        """Who has put something where a replacement of ours stood that does not call ours any more."""
        return [
            f"{entry.slot.name} has since been replaced by {entry.holder()}"
            for entry in self.journal
            if not replace.leads_to(entry.slot.get(), entry.replacement, entry.slot.owner)
        ]

    def make_way(self) -> None:
        """A target was reloaded, or other advisories are asked for. What still stands is taken out, to be judged and
        replaced anew; a reloaded class or function keeps its entries for those who hold it, and they are undone with
        the rest."""
        live = [id(function) for function in live_functions(self.fix.targets)]
        standing = replace.standing(self.journal)
        replace.take_out([entry for entry in standing if id(entry.replacement) in live])
        self.journal = [entry for entry in standing if id(entry.replacement) not in live]


def live_functions(places: Sequence[Target]) -> list[object]:
    """The innermost function at each place, None where there is none."""
    found: list[object] = []
    for place in places:
        try:
            slot, live = replace.resolve(place.path)
        except replace.Missing:
            found.append(None)
            continue
        found.append(replace.inner_slot(slot, live)[1])
    return found


executed: set[str] = set()
repairs: dict[str, Repair] = {}
asked: set[str] = set()  # precision advisories are repaired only when they are asked for by name
disabled: dict[str, str] = dict.fromkeys(finder.current.disabled, "TRAINFIX_DISABLE")
reverted: set[str] = set()
