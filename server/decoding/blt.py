"""BLT: one byte at a time, the global transformer only where a patch closes (arXiv 2412.09871 §3; design §2.3)."""

from __future__ import annotations

from fastblt.server.decoding.method import Outcome, Plan, Progress


class Blt:
    def plan(self, known: int, computed: int, left: int) -> Plan:
        rows, scan_to = known - computed, known + 1 if left > 1 else 0
        return Plan(computed, rows, samples=1, scan_to=scan_to, repeat=left if rows == 1 else 1)

    def advance(self, plan: Plan, outcome: Outcome) -> Progress:
        return Progress(commit=outcome.ids)

    def reset(self) -> None:
        pass
