"""The parts of one engine that planning and postprocessing share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastblt.models.accounting import ModuleParameters
from fastblt.models.config import BltConfig
from fastblt.models.patching import PatchRule
from fastblt.server.engine.cache.kv_caches import KvCaches
from fastblt.server.engine.cache.prefix_cache import PrefixCache
from fastblt.server.engine.draft_controller import DraftController
from fastblt.server.engine.pass_time import PassTime
from fastblt.server.engine.runner.model_runner import ModelRunner
from fastblt.server.engine.scheduler import Scheduler
from fastblt.server.engine.sequence import Sequence
from fastblt.server.settings import EngineSettings


@dataclass
class EngineContext:
    """One engine's parts. `sequences` has every accepted request that has not ended, by request id.

    `parameters` counts the whole model's weights by module, of `bytes_per_weight` each (`patcher_bytes`: the entropy
    model's). `controller` chooses the drafts of `auto`, and `pass_time` bounds what prompts take of a pass; both None
    until the costs of passes are measured. `clock` gives seconds.
    """

    config: BltConfig
    settings: EngineSettings
    rule: PatchRule
    parameters: ModuleParameters
    bytes_per_weight: float
    patcher_bytes: float
    caches: KvCaches
    prefix: PrefixCache
    scheduler: Scheduler
    runner: ModelRunner
    sequences: dict[str, Sequence]
    clock: Callable[[], float]
    controller: DraftController | None = None
    pass_time: PassTime | None = None
