"""An engine without a model, in a process of its own, for faults that a real one cannot be talked into."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastblt.models.config import BltConfig, StackConfig
from fastblt.server.engine.stats import EngineStats
from fastblt.server.process import engine_main as process
from fastblt.server.request import (
    ByteLogprobs,
    Delta,
    FinishReason,
    InvalidRequestError,
    Ledger,
    QueueFullError,
    Request,
)

REPEATED = 97 + 4  # "a"


@dataclass
class FakeEngine:
    """Gives every request one byte a step. `fail_at` is the step that raises; `pause` the seconds a step takes.

    It is loaded once the file `gate` exists; `refuse` and `broken` say what `add` raises. `idle_at` is the step from
    which on nothing comes of a step any more, and `error_for` the end of the ids of requests that fail.
    """

    model_name: str = "fake"
    max_model_len: int = 1000
    max_waiting: int = 1000
    fail_at: int = -1
    pause: float = 0.0
    refuse: bool = False
    broken: bool = False
    error_for: str | None = None
    error_at: int = 1
    gate: str | None = None
    idle_at: int | None = None
    max_running: int = 1000
    started: list[str] = field(default_factory=list)
    fail_to_load: str | None = None
    steps: int = 0
    config: BltConfig = field(default_factory=lambda: BltConfig(*[StackConfig(32, 1, 2, 2, 32, 1e4)] * 4))
    live: dict[str, tuple[Request, int]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)

    def add(self, request: Request, *, wait: bool = True) -> None:
        if self.broken:
            raise KeyError("a secret detail")
        if self.refuse:
            raise InvalidRequestError("refused", "prompt")
        # As in the real engine, what was aborted has left the queue at once.
        if len(self.live.keys() - set(self.aborted)) >= self.max_waiting:
            raise QueueFullError("full")
        self.live[request.request_id] = (request, 0)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def has_work(self) -> bool:
        return bool(self.live)

    def step(self) -> list[Delta]:
        if self.idle_at is not None and self.steps >= self.idle_at:
            self.started = []
            time.sleep(0.01)
            return []
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("a secret detail")
        time.sleep(self.pause)
        deltas = []
        running = [i for i in self.live if i not in self.aborted][: self.max_running]
        self.started = [i for i in running if self.live[i][1] == 0]
        for request_id, (request, count) in list(self.live.items()):
            if request_id not in running and request_id not in self.aborted:
                continue
            delta = Delta(request_id)
            if request_id in self.aborted:
                delta.finish_reason = FinishReason.ABORT
            elif self.error_for is not None and request_id.endswith(self.error_for) and count == self.error_at:
                delta.finish_reason, delta.error = FinishReason.ERROR, "no luck"
            else:
                delta.ids = [REPEATED]
                if request.params.logprobs is not None:
                    delta.logprobs = [ByteLogprobs.of(float("-inf"), [(REPEATED, -0.5)])]
                if count + 1 == request.params.max_tokens:
                    delta.finish_reason = FinishReason.LENGTH
            if delta.finish_reason is not None:
                delta.ledger = Ledger(decoder=count + 1)
                del self.live[request_id]
            else:
                self.live[request_id] = (request, count + 1)
            deltas.append(delta)
        return deltas

    def balanced(self) -> bool:
        return not self.live

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.live), passes=self.steps)


def command(**fields: Any) -> list[str]:
    """What starts a process with an engine of these fields."""
    return [sys.executable, "-m", __name__, json.dumps(fields)]


def _load(_: object) -> Any:
    engine = FakeEngine(**json.loads(sys.argv[1]))
    while engine.gate is not None and not Path(engine.gate).exists():
        time.sleep(0.01)
    if engine.fail_to_load is not None:
        raise ValueError(engine.fail_to_load)
    return engine


if __name__ == "__main__":
    sys.exit(process.main(_load))
