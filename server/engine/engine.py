"""The engine: continuous batching in beats (design §3).

A beat is one upstream pass (pooling and global transformer) over every patch that closed, then decoder passes of every
request that can go on without another. `step` does one decoder pass, with the upstream pass before it where one is due.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.packed import weight_bytes
from fastblt.models.patching import PatchRule
from fastblt.server.decoding.choose import check_block_size, make_method, resolve
from fastblt.server.engine.cache.kv_caches import OVERSHOOT, KvCaches
from fastblt.server.engine.cache.prefix_cache import PrefixCache
from fastblt.server.engine.constraints.constraint import Constraint
from fastblt.server.engine.constraints.grammar_pool import GrammarPool
from fastblt.server.engine.context import EngineContext
from fastblt.server.engine.device.cost import Costs
from fastblt.server.engine.device.devices import DeviceLostError, is_lost, out_of_memory
from fastblt.server.engine.device.ranks import RankLostError, leader_of
from fastblt.server.engine.device_queue import DeviceQueue
from fastblt.server.engine.draft_controller import DraftController
from fastblt.server.engine.load import load_model, prepare
from fastblt.server.engine.mask_gate import MaskGate
from fastblt.server.engine.pass_time import PassTime, measure_costs
from fastblt.server.engine.planner import Planner
from fastblt.server.engine.postprocess import DRAFTING, Postprocessor
from fastblt.server.engine.runner.model_runner import ModelRunner
from fastblt.server.engine.scheduler import Scheduler
from fastblt.server.engine.sequence import Planned, Sequence
from fastblt.server.engine.stats import EngineStats, suffix_sums
from fastblt.server.request import (
    DecodingMethod,
    DecodingParams,
    Delta,
    ErrorCode,
    FinishReason,
    InvalidRequestError,
    QueueFullError,
    Request,
)
from fastblt.server.settings import PRETRAINED, EngineSettings

logger = logging.getLogger(__name__)

#: After so many passes without trouble one more request may run, where memory had run out.
_GROW_PASSES = 64


class Engine:
    """Runs requests to their end. To be used from one thread, but for `stats`.

    `runner` makes what computes the passes, and `clock` gives seconds: the simulator has its own.
    """

    def __init__(
        self,
        model: Blt,
        settings: EngineSettings,
        name: str = "blt",
        *,
        runner: Callable[[Blt, KvCaches, EngineSettings], ModelRunner] = ModelRunner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = model.config.with_patching(settings.patching_threshold, settings.max_patch_length)
        prepare(model, settings)
        device = model.device
        dtype = model.dtype
        self.model_name = name
        self.config = config
        self.settings = settings
        self._check_defaults()
        leader = leader_of(model)
        self._caches = KvCaches(model, leader.share(config) if leader else config, settings, DeviceQueue(device), dtype)
        self._runner = runner(model, self._caches, settings)
        self._clock = clock
        self._prefix = PrefixCache(self._caches, enabled=settings.prefix_cache)
        self._scheduler = Scheduler(self._caches, self._prefix, settings, clock)
        self._grammars = GrammarPool(self._scheduler.followed_limit)
        self._gate = MaskGate(self._grammars)
        self._sequences: dict[str, Sequence] = {}
        self._context = EngineContext(
            config=config,
            settings=settings,
            rule=PatchRule(config.patching_threshold, config.max_patch_length),
            parameters=ModuleParameters.of(config),
            bytes_per_weight=weight_bytes(model),
            patcher_bytes=weight_bytes(model.patcher),
            caches=self._caches,
            prefix=self._prefix,
            scheduler=self._scheduler,
            runner=self._runner,
            sequences=self._sequences,
            clock=clock,
        )
        self._planner = Planner(self._context)
        self._postprocessor = Postprocessor(self._context)
        # One for all steps: making it costs more than entering it.
        self._inference = torch.inference_mode()
        self._aborted: list[str] = []
        #: Ids of the requests that the last step took from the queue for the first time.
        self.started: list[str] = []
        self._passes = self._beats = self._holds = self._passes_in_beat = 0
        #: Monotonic seconds since when a request waits for the next upstream pass; None: none does.
        self._held_since: float | None = None
        self._bytes_prompt = 0
        if device.type == "cuda":
            with self._inference:
                self._runner.capture(logger.info)

    @classmethod
    def load(cls, settings: EngineSettings) -> Engine:
        """Load the checkpoint that the settings name. Raises CheckpointError, ConfigError or ValueError."""
        model = load_model(settings)
        folder = Path(settings.model)
        name = settings.model
        if folder.exists():
            folder = folder.resolve()
            name = "fastblt-python" if folder == PRETRAINED else folder.name
        return cls(model, settings, name)

    @property
    def max_model_len(self) -> int:
        """Bytes of prompt (BOS included) and completion together that one request may have."""
        return self._caches.max_length - OVERSHOOT

    @property
    def cache_bytes(self) -> int:
        """Bytes of memory that the caches take."""
        return self._caches.nbytes

    def add(self, request: Request, *, wait: bool = True) -> None:
        """Accept a request, which then ends in exactly one terminal Delta.

        Raises InvalidRequestError if it can never be served, QueueFullError if the queue is at its bound. Without
        `wait` grammars are compiled beside the passes: what cannot be used is accepted and ends with an error.
        """
        if request.request_id in self._sequences:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", "request_id")
        prompt, params = request.prompt_ids, request.params
        if not prompt:
            raise InvalidRequestError("the prompt is empty", "prompt")
        if len(prompt) + params.max_tokens > self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} bytes (with BOS) and max_tokens is {params.max_tokens}: together more "
                f"than this server's {self.max_model_len}",
                "prompt",
            )
        decoding = self._resolve(params.decoding, structured=params.structured_output is not None)
        constraint = Constraint.of(params, self._grammars, wait=wait)
        # The seed is drawn once and outlives preemption.
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        if decoding.method == DecodingMethod.AUTO:
            self.calibrate()
        method = make_method(decoding, self._context.controller)
        sequence = Sequence(request, decoding, method, seed, constraint)
        try:
            self._scheduler.enqueue(sequence)
        except QueueFullError:
            sequence.close()
            raise
        self._sequences[request.request_id] = sequence

    def abort(self, request_id: str) -> None:
        """End a request; its terminal Delta comes with the next step. Unknown ids are ignored."""
        if request_id in self._sequences:
            self._aborted.append(request_id)

    def calibrate(self) -> None:
        """Measure what passes cost here: a fraction of a second. Until then `max_gap_ms` bounds nothing.

        A request of `auto` does it if nobody has. Ends without effect once it was done.
        """
        if self._context.controller is None:
            costs, per_depth = measure_costs(self._runner, self._caches.max_length)
            self._context.controller = DraftController(self.config, costs)
            self.time_passes(costs, per_depth)

    def time_passes(self, costs: Costs, per_depth: float) -> None:
        """Bound passes by time from now on: `costs` and `per_depth` are those of `PassTime`."""
        self._context.pass_time = PassTime(costs, per_depth, 1e-3 * self.settings.max_gap_ms)
        self._scheduler.expect(self._context.pass_time)

    def has_work(self) -> bool:
        return bool(self._sequences)

    def step(self) -> list[Delta]:
        """One decoder pass, with the upstream pass before it if one is due. Returns what requests got from it."""
        began = self._clock()
        self._runner.work.clear()
        with self._inference:
            deltas = self._step()
        if self._runner.work:
            decoding = sum(not sequence.prefilling for sequence in self._scheduler.running)
            seconds, prompts = self._clock() - began, self._planner.prompts
            if (pass_time := self._context.pass_time) is not None:
                held = bool(self._planner.held())
                others = self._planner.decoding > 0
                pass_time.step_ended(seconds, prompts, self._runner.work, decoding=others, held=held)
                if (controller := self._context.controller) is not None:
                    # What prompts take is no cost of drafting.
                    own = pass_time.without_prompts(seconds, prompts.seconds)
                    controller.step_ended(decoding, self._scheduler.text, own, self._runner.work)
        return deltas

    def _step(self) -> list[Delta]:
        deltas: list[Delta] = []
        self._runner.begin_step()
        for request_id in self._aborted:
            if request_id in self._sequences:
                deltas.append(self._postprocessor.finish(self._sequences[request_id], FinishReason.ABORT))
        self._aborted.clear()
        self.started.clear()
        for sequence in self._scheduler.admit():
            if sequence.timings.scheduled is None:
                sequence.timings.scheduled = self._clock()
                self._bytes_prompt += sequence.prompt_length - 1
                self.started.append(sequence.request.request_id)
            try:
                self._runner.admit(sequence)
            except Exception as error:
                deltas += self._fail([sequence], error)
        running = self._scheduler.running
        try:
            batch = list(running)
            for sequence in self._gate.decided(running):
                if (delta := self._postprocessor.decide(sequence)) is not None:
                    deltas.append(delta)
            self._planner.prepare(self._planner.plan())
            waiting = [s for s in running if s.plan is not None and not s.ready]
            ready = self._gate.ready(_ready(running), others=bool(waiting))
            if waiting and (not ready or self._upstream_due(waiting)):
                batch = waiting
                self._runner.upstream(waiting)
                for sequence in waiting:
                    sequence.ready = True
                ready = self._gate.ready(_ready(running))
                self._beats += 1
                self._passes_in_beat = 0
                self._held_since = None
            else:
                self._holds += len(waiting)
                if not waiting:
                    self._held_since = None
            planned = self._scheduler.fit(ready)
            batch = [sequence for sequence, _ in planned]
            if not batch:
                return deltas
            before = self._runner.ledger.decoder
            results = self._runner.decode(planned)
            made = self._runner.ledger.decoder - before
        except RankLostError:
            raise
        except Exception as error:
            if is_lost(error):
                raise DeviceLostError(f"the device is lost: {error}") from error
            return deltas + (self._retry(batch) if out_of_memory(error) else self._fail(batch, error))
        if self._passes // _GROW_PASSES < (self._passes + made) // _GROW_PASSES:
            self._scheduler.grow()
        self._passes += made
        self._passes_in_beat += made
        for (sequence, plan), result in zip(planned, results, strict=True):
            sequence.last_pass = self._passes
            try:
                if (delta := self._postprocessor.process(sequence, plan, result)) is not None:
                    deltas.append(delta)
                # Its state is gone if the text has ended.
                draft = result.next_draft if sequence.state_index else None
                if draft is not None and (delta := self._postprocessor.process_next_draft(sequence, draft)) is not None:
                    deltas.append(delta)
            except Exception as error:
                deltas += self._fail([sequence], error)
        self._gate.send()
        return deltas

    def stats(self) -> EngineStats:
        groups = self._caches.groups
        ledger = replace(self._runner.ledger)
        for sequence in list(self._sequences.values()):
            for name in DRAFTING:
                setattr(ledger, name, getattr(ledger, name) + getattr(sequence.ledger, name))
        self._postprocessor.add_traffic(ledger)
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_total={name: group.pool.size for name, group in groups.items()},
            pages_free={name: group.pool.free for name, group in groups.items()},
            pages_cached={name: group.pool.cached for name, group in groups.items()},
            ledger=ledger,
            drafted_by_position=suffix_sums(self._postprocessor.drafts),
            accepted_by_position=suffix_sums(self._postprocessor.accepted),
            drafts=sum(self._postprocessor.drafts),
            passes=self._passes,
            beats=self._beats,
            holds=self._holds,
            bytes_generated=self._postprocessor.bytes_generated,
            bytes_prompt=self._bytes_prompt,
            preemptions=self._scheduler.preemptions,
            turns=self._scheduler.turns,
            prompt_passes=pass_time.passes if (pass_time := self._context.pass_time) else 0,
            prompt_passes_late=pass_time.late if pass_time else 0,
            prefix_queries=self._prefix.queries,
            prefix_hits=self._prefix.hits,
            prefix_joined=self._prefix.joined,
        )

    def balanced(self) -> bool:
        """Whether every page, latent and state index is free or cached: true whenever nothing runs (contract 3)."""
        return self._caches.balanced()

    def _resolve(self, asked: DecodingParams, *, structured: bool = False) -> DecodingParams:
        settings = self.settings
        untrained = settings.allow_untrained_block_size
        return resolve(asked, settings.decoding, self.config, untrained_sizes=untrained, structured=structured)

    def _check_defaults(self) -> None:
        """Raises InvalidRequestError for defaults that no request could run with."""
        self._resolve(DecodingParams())
        size = self.settings.decoding.block_size
        if size is not None:
            allowed = self.settings.allow_untrained_block_size
            check_block_size(size, DecodingMethod.BLT_D, self.config, untrained_sizes=allowed)

    # Before a pass

    def _upstream_due(self, waiting: list[Sequence]) -> bool:
        """Whether the beat ends here although some requests could go on. A request's first upstream pass never
        waits."""
        longest, now = self.settings.max_hold_ms, self._clock()
        if self._held_since is None:
            self._held_since = now
        if self._passes_in_beat >= self.settings.max_passes_per_beat or any(s.ledger.global_ == 0 for s in waiting):
            return True
        return longest is not None and 1e3 * (now - self._held_since) >= longest

    # After a pass

    def _fail(self, batch: list[Sequence], error: Exception) -> list[Delta]:
        """A pass failed: its requests end with an error; the others go on."""
        logger.error("a pass failed; its %d requests end with an error", len(batch), exc_info=error)
        # What the exception says is for the log.
        text = f"a forward pass failed: {type(error).__name__}"
        return [
            self._postprocessor.finish(sequence, FinishReason.ERROR, text, ErrorCode.PASS_FAILED)
            for sequence in batch
            if sequence.request.request_id in self._sequences
        ]

    def _retry(self, batch: list[Sequence]) -> list[Delta]:
        """Memory ran out: the requests of the pass go back to the queue, and fewer run at once from now on.

        A request that ran alone, and has had no byte since this happened to it before, ends with an error.
        """
        logger.warning("memory ran out in a pass of %d requests", len(batch))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        alone = len(self._scheduler.running) == 1
        self._scheduler.shrink()
        deltas = []
        # The oldest comes to stand first in the queue.
        for sequence in [s for s in reversed(self._scheduler.running) if s in batch]:
            if alone and sequence.starved_at == sequence.known:
                text = "out of memory, and again when it was tried once more with no other request beside it"
                deltas.append(self._postprocessor.finish(sequence, FinishReason.ERROR, text, ErrorCode.OUT_OF_MEMORY))
            else:
                sequence.starved_at = sequence.known
                self._scheduler.preempt(sequence)
        return deltas


def _ready(running: list[Sequence]) -> list[Planned]:
    """Those whose plan only waits for a decoder pass, oldest first."""
    return [(sequence, plan) for sequence in running if sequence.ready and (plan := sequence.plan) is not None]
