"""How the bytes of a request were made, for those who ask (`return_rounds`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from fastblt.server.decoding.method import Progress
from fastblt.server.request import DecodingMethod, Ledger, Origin, Round


def origins(progress: Progress) -> list[Origin]:
    """How each byte that `progress` makes final was made."""
    if progress.commit_steps:
        return [Origin.FILLED] * len(progress.commit)
    drafted, accepted = progress.drafted, progress.accepted
    steps = progress.draft_steps or [0] * drafted
    made = [Origin.BLOCK if step else Origin.DRAFTED for step in steps[:accepted]]
    if accepted < drafted:
        made.append(Origin.CORRECTED)
    return made + [Origin.CAUSAL] * (len(progress.commit) - len(made))


class RoundLog:
    """The rounds of one request that have not been told yet."""

    def __init__(self) -> None:
        #: With how many bytes had told entropies before.
        self._pending: deque[tuple[Round, int]] = deque()
        #: How many of the completion's bytes have told entropies, and how many patches begin behind the first of them.
        self._known = 0
        self._patches = 0

    def add(
        self,
        method: DecodingMethod,
        start: int,
        progress: Progress,
        seconds: float,
        ledger: Ledger,
        entropies: Sequence[float],
        patches: Sequence[int],
        weights: Callable[[Ledger], float],
    ) -> None:
        """Record a round that makes bytes final behind the `start` ones there are.

        `entropies` are those before the completion's bytes, from the first one on; `patches` counts which of these
        bytes begin a patch. What lies behind the round's bytes is left out of both. `weights` are the gigabytes that
        the passes of a ledger read.
        """
        end = start + len(progress.commit)
        entropies = entropies[:end]
        known = max(len(entropies), self._known)
        fresh = [at for at in patches if self._known <= at < known]
        self._patches += sum(at > 0 for at in fresh)
        # BLT runs the small modules once a byte, and the global transformer for the prompt and for every patch.
        of_blt = Ledger(patcher=end, encoder=end, decoder=end, global_=1 + self._patches)
        one = Round(
            method=method,
            start=start,
            ids=list(progress.commit),
            origins=origins(progress),
            draft=list(progress.verified),
            accepted=progress.accepted,
            steps=list(progress.commit_steps or progress.draft_steps or [0] * progress.drafted),
            entropies=list(entropies[self._known :]),
            patches=fresh,
            seconds=seconds,
            patcher=ledger.patcher,
            encoder=ledger.encoder,
            global_=ledger.global_,
            decoder=ledger.decoder,
            gb=weights(ledger),
            gb_blt=weights(of_blt),
        )
        self._pending.append((one, self._known))
        self._known = known

    def take(self, released: int, *, final: bool) -> list[Round]:
        """The rounds whose bytes are all among the first `released` ones of the completion; at the end, the rest too,
        cut to these bytes."""
        rounds: list[Round] = []
        while self._pending:
            one, known = self._pending[0]
            left = released - one.start
            if left < len(one.ids) and not final:
                break
            self._pending.popleft()
            if left > 0:
                rounds.append(one if left >= len(one.ids) else _cut(one, left, released - known))
        return rounds


def _cut(one: Round, left: int, entropies: int) -> Round:
    """A round of which only the first `left` bytes belong to the completion, and the first `entropies` ones."""
    return replace(
        one,
        ids=one.ids[:left],
        origins=one.origins[:left],
        entropies=one.entropies[: max(entropies, 0)],
        patches=[at for at in one.patches if at < one.start + left],
    )
