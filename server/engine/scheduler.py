"""The scheduler: the waiting queue, admission by pages, turns where there are more requests than places, preemption.

The scheduler knows rows, pages and ages; it knows no methods (design §3).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from fastblt.server.decoding.method import Plan
from fastblt.server.engine.cache.kv_caches import KvCaches
from fastblt.server.engine.cache.prefix_cache import PrefixCache
from fastblt.server.engine.pass_time import PassTime
from fastblt.server.engine.sequence import Planned, Sequence
from fastblt.server.request import QueueFullError
from fastblt.server.settings import EngineSettings

#: Admission assumes this much more global cache than the running mean of patches per byte says.
_MARGIN = 1.2

#: Requests with a process for their grammar that may run at once, and the part of all running ones that they may be.
#: They mostly wait for masks, so many of them would keep the places of those that could go on.
_FOLLOWED, _FOLLOWED_SHARE = 16, 4

#: Seconds that a request has its place before one that has not run yet may take it, and before one may that had a turn
#: already. Each change costs the rows since the last patch once more.
FIRST_TURN, NEXT_TURN = 0.25, 4.0

#: A request lets those pass in the queue that come within so many times the time that its prompt takes.
_PATIENCE = 10.0

#: How many requests may be tried in one step behind those for which pages are missing.
_TRIED = 16

#: Bytes of output to expect before any request has ended, and the weight of the newest in the mean.
_OUTPUT, _NEWEST = 256.0, 0.05


class Text(NamedTuple):
    """Means over requests: patches a byte of their text, and bytes of their output; and the share that is greedy."""

    patches_per_byte: float
    output: float
    greedy: float = 0.5


class Scheduler:
    def __init__(
        self,
        caches: KvCaches,
        prefix: PrefixCache,
        settings: EngineSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._caches = caches
        self._prefix = prefix
        self._settings = settings
        self._clock = clock
        #: By `Sequence.due`, lower values of `priority` first.
        self.waiting: deque[Sequence] = deque()
        #: In the order of their admission.
        self.running: list[Sequence] = []
        #: How often a request was put back for want of pages, and how often because its turn was over.
        self.preemptions = self.turns = 0
        #: How many may run: fewer than the settings say after memory ran out.
        self.limit = settings.max_running
        #: How many of them may have a process for their grammar.
        self.followed_limit = max(min(_FOLLOWED, settings.max_running // _FOLLOWED_SHARE), 1)
        #: What passes take; until that is measured, who came first is due first.
        self._pass_time: PassTime | None = None
        self._numbers = 0
        self._scanned = 0
        self._closed = 0
        self._output = _OUTPUT
        # The sequence that was last looked up in the prefix cache because it did not fit, how many others ran then, and
        # how many pages in use it would share.
        self._looked_up: tuple[Sequence | None, int] = (None, 0)
        self._shared = 0

    def enqueue(self, sequence: Sequence) -> None:
        """Raises QueueFullError at the bound of the waiting queue."""
        if len(self.waiting) >= self._settings.max_waiting:
            raise QueueFullError(f"{len(self.waiting)} requests are waiting already; try again later")
        self._numbers += 1
        sequence.number = self._numbers
        sequence.due = self._clock()
        if self._pass_time is not None:
            sequence.due += _PATIENCE * self._pass_time.prompt_seconds(sequence.known, self.patches_per_byte())
        self._wait(sequence)

    def expect(self, pass_time: PassTime) -> None:
        """Know what passes take from now on."""
        self._pass_time = pass_time

    def admit(self) -> list[Sequence]:
        """Move waiting sequences to running, in order, while state indexes and pages are likely to suffice.

        Those that have to wait for others with a process for their grammar are passed over: they keep their place in
        the queue, and go before all others when one of these ends. So are those for which pages are missing, until they
        are due: from then on pages are left for them.
        """
        admitted: list[Sequence] = []
        if not self.waiting:
            return admitted
        now = self._clock()
        followed = sum(sequence.followed for sequence in self.running)
        needs = self._needs(self.running)
        tried = 0
        for sequence in list(self.waiting):
            if sequence.followed and followed >= self.followed_limit:
                continue
            victim = None
            if len(self.running) >= self.limit:
                if not self._may_take_a_turn(sequence, now):
                    continue
                victim = self._whose_turn_is_over(sequence, now)
                if victim is None:
                    if (tried := tried + 1) == _TRIED:
                        break
                    continue
            own = self._needs([sequence])
            # One alone always fits; another only where nobody is likely to be preempted for it at once.
            if self.running and not self._likely_fits(sequence, needs, own):
                tried += 1
                if now >= sequence.due or tried == _TRIED:
                    break
                continue
            if victim is not None:
                self._end_turn(victim, now)
            state_index = self._caches.take_state_index()
            if state_index is None:
                break
            self.waiting.remove(sequence)
            followed += sequence.followed
            sequence.state_index = state_index
            sequence.turn_began = now
            self.running.append(sequence)
            self._prefix.admit(sequence)
            needs = [before + new for before, new in zip(needs, own, strict=True)]
            admitted.append(sequence)
        return admitted

    def reserve(self, sequence: Sequence, plan: Plan) -> bool:
        """Take pages for a plan, preempting others if need be: of the lowest priority, the youngest first.

        False: the sequence itself was preempted.
        """
        length = plan.start + plan.rows
        if plan.scan_to > length:
            length = plan.scan_to
        # Every row may turn out to close a patch; what was not needed goes back after the pass.
        patches = sequence.closed + plan.provisional
        if plan.end > sequence.scanned:
            patches += plan.end - sequence.scanned
        if plan.repeat > 1 and (plan.next_length or not plan.block_ids):
            further = plan.end + (1 + plan.next_length if plan.next_length else plan.repeat)
            if self._caches.reserve(sequence.state_index, further if further > length else length, patches):
                return True
            # Nobody is preempted for rows that a later pass can compute.
            plan.stop_after(1)
        while not self._caches.reserve(sequence.state_index, length, patches):
            # The highest value is the lowest priority.
            victim = max(self.running, key=_age)
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def eldest(self) -> Sequence | None:
        """The running sequence that is preempted last."""
        return min(self.running, key=_age, default=None)

    def preempt(self, sequence: Sequence) -> None:
        """Back to its place in the queue, with nothing computed. Its bytes, seed and output stay."""
        self.remove(sequence)
        sequence.restart()
        self._wait(sequence)
        self.preemptions += 1

    def join(self, sequence: Sequence) -> None:
        """Let a running sequence go on behind what others have computed of its prompt, if that is more than its own."""
        before = sequence.decoded
        if self._prefix.reach(sequence) > before:
            self._give_back(sequence)
            self._caches.clear(sequence.state_index)
            sequence.restart()
            self._prefix.join(sequence, before)
        # Else it could wait for ever for one that is preempted again and again.
        sequence.waited_in_vain = sequence.decoded <= before

    def shrink(self) -> None:
        """Memory ran out: half as many requests run from now on."""
        self.limit = max(len(self.running) // 2, 1)

    def grow(self) -> None:
        """Memory sufficed for a while: one more request may run."""
        self.limit = min(self.limit + 1, self._settings.max_running)

    def remove(self, sequence: Sequence) -> None:
        """Take a running sequence out and give back all that it holds."""
        self._scanned += sequence.scanned
        self._closed += sequence.closed
        self.running.remove(sequence)
        self._give_back(sequence)
        self._caches.release(sequence.state_index)
        sequence.state_index = 0

    def count_output(self, size: int) -> None:
        """A request has ended after `size` bytes: what others are expected to need depends on it."""
        self._output += _NEWEST * (size - self._output)

    def free_latents(self, slots: list[int]) -> None:
        for slot in slots:
            if slot:
                self._caches.latent_pool.give_back(slot)

    def drop_provisional(self, sequence: Sequence) -> None:
        """Free the latent of a patch that was closed for one pass only."""
        if sequence.provisional is not None:
            self.free_latents([sequence.provisional.slot])
            sequence.provisional = None

    def patches_per_byte(self) -> float:
        """Mean over all text so far; 0.5 before there is any."""
        scanned = self._scanned + sum(s.scanned for s in self.running)
        closed = self._closed + sum(s.closed for s in self.running)
        return (closed + 1) / (scanned + 1) if scanned else 0.5

    def text(self) -> Text:
        greedy = [sequence.request.params.temperature == 0 for sequence in self.running]
        return Text(self.patches_per_byte(), self._output, sum(greedy) / len(greedy) if greedy else 0.5)

    def fit(self, ready: list[Planned]) -> list[Planned]:
        """The plans of one pass within the row budget; those that waited longest go first."""
        if sum(plan.rows for _, plan in ready) <= self._settings.max_pass_rows:
            return ready
        batch: list[Planned] = []
        rows = 0
        for sequence, plan in sorted(ready, key=lambda planned: planned[0].last_pass):
            if batch and rows + plan.rows > self._settings.max_pass_rows:
                continue
            rows += plan.rows
            batch.append((sequence, plan))
        return batch

    def prompt_rows(self) -> int:
        """Rows of prompts in the next pass: what decoding requests leave of it, and a quarter of it at least."""
        total = self._settings.max_pass_rows
        decoding = sum(s.plan.rows if s.plan else 1 for s in self.running)
        return max(total - decoding, total // 4, 1)

    def _give_back(self, sequence: Sequence) -> None:
        """Give a running sequence's pages to the prefix cache, and free its latents."""
        self._prefix.release(sequence)
        slots = [patch.slot for patch in sequence.patches]
        if sequence.provisional is not None:
            slots.append(sequence.provisional.slot)
        self.free_latents(slots)

    def _wait(self, sequence: Sequence) -> None:
        """Insert into the queue, by priority, then by when it is due, then by age."""
        key, at = _place(sequence), len(self.waiting)
        while at and _place(self.waiting[at - 1]) > key:
            at -= 1
        self.waiting.insert(at, sequence)

    # Turns

    def _turn(self, sequence: Sequence, now: float) -> float:
        """Seconds that others have their places before a waiting sequence may take one. Who had a turn already lets
        those that had none go first, for a while."""
        first = sequence.timings.scheduled is None or now >= sequence.due + NEXT_TURN
        return FIRST_TURN if first else NEXT_TURN

    def _may_take_a_turn(self, sequence: Sequence, now: float) -> bool:
        """Whether anybody has had a place for long enough. Asked for the whole queue in every step."""
        if not self._prefix.enabled or (sequence.timings.scheduled is not None and now < sequence.due):
            return False
        # Whoever came first into a place stands first.
        return now - self.running[0].turn_began >= self._turn(sequence, now)

    def _whose_turn_is_over(self, sequence: Sequence, now: float) -> Sequence | None:
        """The running sequence that gives its place to a waiting one; None if there is none.

        Its pages stay in the prefix cache, so what it has computed is still there when its next turn comes.
        """
        turn, eldest, wanted = self._turn(sequence, now), self.eldest(), sequence.known - sequence.decoded
        over = [
            s
            for s in self.running
            if now - s.turn_began >= turn
            and s is not eldest
            and s.request.priority >= sequence.request.priority
            and s.params.prompt_logprobs is None
            and not s.followed
            # A prompt that is nearer to its first byte stays.
            and not (s.prefilling and s.known - s.decoded <= wanted)
        ]
        # Long prompts before others, then whose turn has been the longest.
        return max(over, key=lambda s: (s.prefilling * (s.known - s.decoded), now - s.turn_began), default=None)

    def _end_turn(self, sequence: Sequence, now: float) -> None:
        self.remove(sequence)
        sequence.restart()
        sequence.due = max(sequence.due, now + NEXT_TURN)
        self._wait(sequence)
        self.turns += 1

    # Pages

    def _needs(self, sequences: list[Sequence]) -> list[int]:
        """Pages of each group that sequences will still take: for the rest of their prompts, and for the output that
        they are likely to have."""
        per_byte = min(1.0, _MARGIN * ((self._closed + 1) / (self._scanned + 1) if self._scanned else 0.5))
        needs = []
        for group in self._caches.groups.values():
            needed = 0
            for one in sequences:
                length = one.known + min(one.left, self._output)
                if group.name == "global":
                    length = one.closed + (length - one.decoded) * per_byte
                elif group.window is not None:
                    length = min(length, group.window)
                held = group.held(one.state_index) if one.state_index else 0
                # A prompt's chunk reaches beyond its window for a while.
                spare = 2 if one.prefilling else 1
                needed += max(int(length) // group.page_size + spare - held, 0)
            needs.append(needed)
        return needs

    def _likely_fits(self, sequence: Sequence, needs: list[int], own: list[int]) -> bool:
        """Whether the available pages should suffice for it beside the running sequences, that need `needs`."""
        for group, others, further in zip(self._caches.groups.values(), needs, own, strict=True):
            missing = others + further - group.pool.available
            if missing > 0 and (group.name != "global" or missing > self._shared_by(sequence)):
                return False
        return True

    def _shared_by(self, sequence: Sequence) -> int:
        """Global pages in use that it would share. Asked in every pass, so looked up only when something changed."""
        if self._looked_up != (sequence, len(self.running)):
            self._looked_up = (sequence, len(self.running))
            self._shared = self._prefix.shared_pages(sequence)
        return self._shared


def _age(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.number


def _place(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.request.priority, sequence.due, sequence.number
