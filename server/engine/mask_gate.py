"""Keeps requests out of a pass while their grammar masks are missing, so that other requests need not wait."""

from __future__ import annotations

from fastblt.server.decoding.method import Plan
from fastblt.server.engine.constraints.grammar_pool import GrammarPool
from fastblt.server.engine.sequence import Planned, Sequence


class MaskGate:
    """Waits for masks, as long as the pool allows, and tells which requests have theirs (docs/design.md §9)."""

    def __init__(self, pool: GrammarPool) -> None:
        self._pool = pool

    def decided(self, running: list[Sequence]) -> list[Sequence]:
        """Begin a step. Returns the undecided requests whose constraints can now be asked to `decide`."""
        self._pool.begin_step()
        undecided = [s for s in running if s.undecided]
        if not undecided:
            return []
        # A request that is still in its prompt does not need its grammar yet.
        wanted = [s.constraint.grammar for s in undecided if not s.prefilling and s.constraint and s.constraint.grammar]
        if wanted:
            self._pool.wait(wanted, alone=len(wanted) == len(running))
        else:
            self._pool.poll()
        return [s for s in undecided if s.constraint and s.constraint.grammar and not s.constraint.grammar.waiting]

    def send(self) -> None:
        """Ask the processes for what the step's bytes and drafts need, so that they work during what comes next."""
        self._pool.send()

    def ready(self, planned: list[Planned], *, others: bool = False) -> list[Planned]:
        """The planned sequences whose masks are there. `others`: whether further requests could run without them."""
        late = [sequence for sequence, plan in planned if not _has_masks(sequence, plan)]
        if not late:
            return planned
        cursors = [s.constraint.grammar for s in late if s.constraint and s.constraint.grammar]
        self._pool.wait(cursors, alone=len(late) == len(planned) and not others)
        return [(sequence, plan) for sequence, plan in planned if _has_masks(sequence, plan)]


def _has_masks(sequence: Sequence, plan: Plan) -> bool:
    constraint = sequence.constraint
    if constraint is None or not (plan.samples or plan.block_ids):
        return True
    return constraint.ready(sequence.draft, plan.block_ids)
