"""What an engine tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastblt.server.request import Ledger


@dataclass
class EngineStats:
    """A snapshot. `ledger` is the engine ledger: a pass counts once, however many requests share it (design §6.6).

    Its `bytes` and `patches` are those of requests that have ended. `drafted_by_position` and `accepted_by_position`
    count verified drafts that had, and kept, a byte at each position. `holds` counts a request once for every
    decoder pass during which it waited for the next beat. `bytes_prompt` is without BOS. `pages_cached` have no user
    and are as good as free. Of `prefix_queries` bytes of prompts looked up in the prefix cache, `prefix_hits` were
    there; what preempted requests look up again is not counted.
    """

    running: int = 0
    waiting: int = 0
    pages_total: dict[str, int] = field(default_factory=dict)
    pages_free: dict[str, int] = field(default_factory=dict)
    pages_cached: dict[str, int] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    drafts: int = 0
    passes: int = 0
    beats: int = 0
    holds: int = 0
    bytes_generated: int = 0
    bytes_prompt: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    @property
    def pages_available(self) -> dict[str, int]:
        """Pages that nobody uses: free ones, and cached ones."""
        return {group: free + self.pages_cached.get(group, 0) for group, free in self.pages_free.items()}
