"""BLT: one byte at a time, the global transformer only where a patch closes (digest §2.3)."""

from __future__ import annotations

from server.decoding.method import Outcome, Plan, Progress


class Blt:
    keeps_pending = True

    def plan(self, known: int, left: int) -> Plan:
        return Plan(start=known - 1, causal=1, select=1)

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        return Progress(commit=outcome.ids)

    def reset(self) -> None:
        pass
