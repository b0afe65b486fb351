"""The scheduler: the waiting queue, admission by pages, preemption by recompute, and the row budget of a pass.

The scheduler knows rows, pages and ages; it knows no methods (design §3).
"""

from __future__ import annotations

from collections import deque

from fastblt.server.decoding.method import Plan
from fastblt.server.engine.cache.kv_caches import KvCaches
from fastblt.server.engine.cache.prefix_cache import PrefixCache
from fastblt.server.engine.sequence import Planned, Sequence
from fastblt.server.request import QueueFullError
from fastblt.server.settings import EngineSettings

#: Admission assumes this much more global cache than the running mean of patches per byte says.
_MARGIN = 1.2

#: Requests with a process for their grammar that may run at once, and the part of all running ones that they may be.
#: They mostly wait for masks, so many of them would keep the places of those that could go on.
_FOLLOWED, _FOLLOWED_SHARE = 16, 4


class Scheduler:
    def __init__(self, caches: KvCaches, prefix: PrefixCache, settings: EngineSettings) -> None:
        self._caches = caches
        self._prefix = prefix
        self._settings = settings
        self.waiting: deque[Sequence] = deque()
        #: Oldest first.
        self.running: list[Sequence] = []
        self.preemptions = 0
        #: How many may run: fewer than the settings say after memory ran out.
        self.limit = settings.max_running
        #: How many of them may have a process for their grammar.
        self.followed_limit = max(min(_FOLLOWED, settings.max_running // _FOLLOWED_SHARE), 1)
        self._scanned = 0
        self._closed = 0
        # The sequence that was last looked up in the prefix cache because it did not fit, how many others ran then, and
        # how many pages in use it would share.
        self._looked_up: tuple[Sequence | None, int] = (None, 0)
        self._shared = 0

    def enqueue(self, sequence: Sequence) -> None:
        """Raises QueueFullError at the bound of the waiting queue."""
        if len(self.waiting) >= self._settings.max_waiting:
            raise QueueFullError(f"{len(self.waiting)} requests are waiting already; try again later")
        self._wait(sequence, before_equals=False)

    def admit(self) -> list[Sequence]:
        """Move waiting sequences to running, in order, while state indexes and pages are likely to suffice.

        Those that have to wait for others with a process for their grammar are passed over: they keep their place in
        the queue, and go before all others when one of these ends.
        """
        admitted: list[Sequence] = []
        if not self.waiting:
            return admitted
        followed = sum(sequence.followed for sequence in self.running)
        at = 0
        while at < len(self.waiting) and len(self.running) < self.limit:
            sequence = self.waiting[at]
            if sequence.followed and followed >= self.followed_limit:
                at += 1
                continue
            # One alone always fits; another only where nobody is likely to be preempted for it at once.
            if self.running and not self._likely_fits(sequence):
                break
            state_index = self._caches.take_state_index()
            if state_index is None:
                break
            del self.waiting[at]
            followed += sequence.followed
            sequence.state_index = state_index
            self.running.append(sequence)
            self._prefix.admit(sequence)
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
            # The highest value is the lowest priority; the last of equals is the youngest.
            victim = max(reversed(self.running), key=lambda s: s.request.priority)
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Back to the head of its priority's queue, with nothing computed. Its bytes, seed and output stay."""
        self.remove(sequence)
        sequence.restart()
        self._wait(sequence, before_equals=True)
        self.preemptions += 1

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
        self._prefix.release(sequence)
        slots = [patch.slot for patch in sequence.patches]
        if sequence.provisional is not None:
            slots.append(sequence.provisional.slot)
        self.free_latents(slots)
        self._caches.release(sequence.state_index)
        sequence.state_index = 0

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

    def prefill_budget(self) -> int:
        """Rows of prompts in the next pass: what decoding requests leave of it, and a quarter of it at least."""
        total = self._settings.max_pass_rows
        decoding = sum(s.plan.rows if s.plan else 1 for s in self.running)
        return max(total - decoding, total // 4, 1)

    def _wait(self, sequence: Sequence, *, before_equals: bool) -> None:
        """Insert into the queue, behind lower priority values, and before or behind equal ones."""
        bound = sequence.request.priority - before_equals
        at = len(self.waiting)
        while at and self.waiting[at - 1].request.priority > bound:
            at -= 1
        self.waiting.insert(at, sequence)

    def _likely_fits(self, sequence: Sequence) -> bool:
        """Whether the available pages should suffice for it and for the rest of the running prompts."""
        per_byte = (self._closed + 1) / (self._scanned + 1) if self._scanned else 0.5
        arriving = [sequence, *(s for s in self.running if s.prefilling)]
        for group in self._caches.groups.values():
            needed = 0
            for one in arriving:
                length = one.known - one.decoded
                if group.name == "global":
                    length = int(length * min(1.0, per_byte * _MARGIN))
                elif group.window is not None:
                    length = min(length, group.window)
                needed += length // group.page_size + 2
            missing = needed - group.pool.available
            if missing > 0 and (group.name != "global" or missing > self._shared_by(sequence)):
                return False
        return True

    def _shared_by(self, sequence: Sequence) -> int:
        """Global pages in use that it would share. Asked in every pass, so looked up only when something changed."""
        if self._looked_up != (sequence, len(self.running)):
            self._looked_up = (sequence, len(self.running))
            self._shared = self._prefix.shared_pages(sequence)
        return self._shared
