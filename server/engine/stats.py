"""What an engine tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

from fastblt.server.request import Ledger


@dataclass(frozen=True)
class EngineAbout:
    """What does not change while an engine runs. `code` says by which code, and how many threads, it computes."""

    weights: int
    dtype: str
    device: str
    code: str
    #: Memory of the caches, in bytes.
    cache_bytes: int


@dataclass
class EngineStats:
    """A snapshot of an engine's gauges and counters."""

    running: int = 0
    waiting: int = 0
    #: Pages by group. Cached ones have no user and are as good as free.
    pages_total: dict[str, int] = field(default_factory=dict)
    pages_free: dict[str, int] = field(default_factory=dict)
    pages_cached: dict[str, int] = field(default_factory=dict)
    #: The engine's ledger: a pass counts once, however many requests share it (design §6.6). Its `bytes` and `patches`
    #: are those of requests that have ended.
    ledger: Ledger = field(default_factory=Ledger)
    #: Entry i: verified drafts that had, and kept, more than i bytes.
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    drafts: int = 0
    #: Decoder passes, and upstream passes.
    passes: int = 0
    beats: int = 0
    #: Counts a request once for every decoder pass during which it waited for the next beat.
    holds: int = 0
    bytes_generated: int = 0
    #: Without BOS.
    bytes_prompt: int = 0
    preemptions: int = 0
    #: How often a request gave its place to another one, with its pages kept.
    turns: int = 0
    #: Passes with rows of prompts, and how many of them took clearly longer than `max_gap_ms` allows.
    prompt_passes: int = 0
    prompt_passes_late: int = 0
    #: Bytes of prompts that were looked up in the prefix cache, and how many of them were found. What preempted
    #: requests look up again is not counted.
    prefix_queries: int = 0
    prefix_hits: int = 0
    #: Bytes of these that another request computed while this one waited for it.
    prefix_joined: int = 0

    @property
    def pages_available(self) -> dict[str, int]:
        """Pages that nobody uses: free ones, and cached ones."""
        return {group: free + self.pages_cached.get(group, 0) for group, free in self.pages_free.items()}


def suffix_sums(counts: list[int]) -> list[int]:
    """Entry i counts the drafts longer than i bytes, from how many have 0, 1, ... bytes."""
    return list(accumulate(reversed(counts[1:])))[::-1]
