"""What an engine tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.request import Ledger


@dataclass
class EngineStats:
    """A snapshot. `ledger` is the engine ledger: a pass counts once, however many requests share it (design §6.6)."""

    running: int = 0
    waiting: int = 0
    pages_total: dict[str, int] = field(default_factory=dict)
    pages_free: dict[str, int] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    passes: int = 0
    beats: int = 0
    bytes_generated: int = 0
    bytes_prompt: int = 0
    preemptions: int = 0
