"""How near `auto` comes to the best draft right after a start, by simulation: its controller against made-up machines.

    python -m fastblt.benchmarks.simulation.auto --runs 60    a minute: the first seconds of 360 servers

Passes take what the cost curves say that are measured here, times a factor of the machine, of each kind of draft and of
each draft, and each round some noise more; the engine takes its own time for each request. Bytes are right by chance.
So the controller meets what it cannot know, on hundreds of servers in a minute, where a real one takes seconds each.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import start
from fastblt.benchmarks.markdown import Table
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.config import BltConfig
from fastblt.server.decoding.auto import Draft
from fastblt.server.engine.device.cost import Costs
from fastblt.server.engine.draft_controller import DraftController
from fastblt.server.engine.round_time import shares
from fastblt.server.engine.scheduler import Text
from fastblt.server.request import DecodingMethod
from fastblt.server.settings import PRETRAINED

#: Standard deviations of the logarithms of factors: of a kind of draft, of a draft, and of a round.
_KIND, _DRAFT, _ROUND = 0.06, 0.06, 0.08
#: Bounds of what passes take over the curves, and of the engine's own seconds for a request and step.
_PACE, _OWN = (0.9, 1.15), (1.2e-4, 3.5e-4)
#: Patches a byte, bytes of each request, what one of many takes beside its own rounds, in rounds, and the share of
#: steps that are mostly prompts, and tell nothing.
_PATCHES, _OUTPUT, _ENDS, _PROMPTS = 0.2, 192, 1.0, 0.4
#: How often the decoder's next byte is right, and a block's: as in greedy texts of the shipped model, and at 0.8.
_RIGHT = {"greedy": (0.997, 0.81), "0.8": (0.989, 0.63)}


@dataclass
class Machine:
    """A machine and a text that no controller knows. `right`: the chances of a byte of the decoder, and of a block."""

    costs: Costs
    config: BltConfig
    right: tuple[float, float]
    text: Text
    seed: int

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._pace, self._own = self.rng.uniform(*_PACE), self.rng.uniform(*_OWN)
        #: It reckons passes as a controller does that has seen thousands of rounds of this text.
        self._known = DraftController(self.config, self.costs)
        self._known._text = self.text._replace(output=math.inf)
        kinds: dict[tuple[DecodingMethod, int], float] = {}
        self._factors: dict[Draft, float] = {}
        for draft in self._known.drafts:
            kind = kinds.setdefault((draft.method, draft.block), self._factor(_KIND))
            self._factors[draft] = kind * self._factor(_DRAFT)
        for _ in range(2000):
            for draft in self._known.drafts:
                self.tell(self._known, draft)

    def _factor(self, deviation: float) -> float:
        return math.exp(self.rng.gauss(0, deviation))

    def _run(self, chance: float, length: int) -> int:
        """Bytes that are right before the first wrong one."""
        right = 0
        while right < length and self.rng.random() < chance:
            right += 1
        return right

    def tell(self, controller: DraftController, draft: Draft) -> None:
        """A round's acceptance."""
        decoder, block = self.right
        if draft.method == DecodingMethod.BLT_DSV:
            controller.filtered(draft, draft.block - 1, self._run(block, draft.block - 1))
        if draft.length:
            chance = block if draft.method == DecodingMethod.BLT_DV else decoder
            controller.round_ended(draft, draft.length, self._run(chance, draft.length))

    def round(self, draft: Draft, requests: int) -> tuple[float, float]:
        """Seconds of a usual round of all requests, and the bytes that it gives each, what their ends take counted."""
        passes, steps, made = self._known._round(draft, requests)
        seconds = self._factors[draft] * (self._pace * passes + self._own * shares(steps, requests))
        return seconds, _OUTPUT / (_OUTPUT / made + _ENDS * (1 - 1 / requests))

    def rate(self, draft: Draft, requests: int) -> float:
        """Bytes a second of all requests."""
        seconds, made = self.round(draft, requests)
        return requests * made / seconds

    def speed(self, clients: int, each: int) -> float:
        """Bytes a second of `auto` from a start until every client had `each` outputs, over the best draft's."""
        controller = DraftController(self.config, self.costs)
        made = seconds = 0.0
        step = 0
        while made < clients * each * _OUTPUT:
            # Clients come one after another.
            requests = min(clients, 1 + step * max(1, clients // 4))
            step += 1
            draft = controller.next()
            taken, given = self.round(draft, requests)
            taken *= self._factor(_ROUND)
            seconds += taken
            made += requests * given
            for _ in range(requests):
                controller.ended(draft)
                self.tell(controller, draft)
            passes = [("decoder", requests)] * (20 if draft.length else 5)
            told = None if self.rng.random() < _PROMPTS else taken
            controller.step_ended(requests, lambda: self.text, told, passes)
        return made / seconds / max(self.rate(draft, clients) for draft in controller.drafts)


def simulate(*, model: str = str(PRETRAINED), runs: int = 60, clients: Sequence[int] = (1, 8, 32)) -> dict[str, Any]:
    """Shares of the best draft's speed over `runs` machines: mean, median, tenth part, and how many are below 0.95."""
    loaded = load_checkpoint(model)
    engine = start(loaded, 1)
    engine.calibrate()
    assert engine._context.controller is not None
    costs = engine._context.controller._costs
    table = Table("clients", "temperature", "mean", "median", "tenth part", "below 0.95, %")
    result: dict[str, Any] = {}
    for count in clients:
        for heat, right in _RIGHT.items():
            each = 24 if count == 1 else 8 if count < 16 else 4
            text = Text(_PATCHES, _OUTPUT, float(heat == "greedy"))
            found = sorted(Machine(costs, loaded.config, right, text, seed).speed(count, each) for seed in range(runs))
            row = {
                "mean": statistics.mean(found),
                "median": statistics.median(found),
                "tenth": found[runs // 10],
                "below": sum(share < 0.95 for share in found) / runs,
            }
            result[f"{count} clients, {heat}"] = row
            shares_ = (f"{row[name]:.3f}" for name in ("mean", "median", "tenth"))
            table.row(str(count), heat, *shares_, f"{100 * row['below']:.0f}")
    return result


app = command(simulate)

if __name__ == "__main__":
    app()
