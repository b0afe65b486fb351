"""The training loop: micro-batches shared out over processes, learning rate schedule, curves, and resuming."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from fastblt.models.training import state
from fastblt.models.training.files import StateError, write_atomically
from fastblt.models.training.optimizer import Optimizer, OptimizerConfig, trained
from fastblt.models.training.parallel import World
from fastblt.models.training.state import Length, Saved

#: A step that takes longer than this was suspended from outside. Only this much of it counts as training time.
STALL_SECONDS = 10.0


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a run. Its length is `steps` if given, else `minutes` of training time, without compilation.

    With `stop_after` the run stops after that many steps and can be resumed; the schedule stays that of the whole
    length. A run gives the same weights again only with `steps`: then its schedule does not depend on the clock.
    `micro_batches` make up a step, whatever the number of processes: each takes as many of them.
    """

    folder: Path
    minutes: float = 60.0
    steps: int | None = None
    stop_after: int | None = None
    micro_batches: int = 2
    warmup_steps: int = 60
    hold: float = 0.3
    final_scale: float = 0.03
    compile: bool = True
    seed: int = 0
    log_every: int = 20
    judge_every: int = 200
    save_seconds: float = 120.0
    save_steps: int | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def scale(self, step: int, progress: float) -> float:
        """Factor of the learning rates: warm-up, a plateau, then a straight line down to `final_scale`."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        down = max(0.0, (progress - self.hold) / (1 - self.hold))
        return warm * (1 - (1 - self.final_scale) * min(1.0, down))


class Task(Protocol):
    """A training stage. `module` has the model as its attribute `model`, and gives the loss and named figures of a
    batch; in eval mode, of held-out text."""

    @property
    def module(self) -> Any:
        """An `nn.Module` whose `loss` may be compiled, and which calls it."""

    def layers(self) -> Iterable[nn.Module]:
        """Modules that are large enough to be gathered one by one where the model is sharded."""

    def ignored(self) -> Iterable[nn.Parameter]:
        """Parameters that every process holds whole."""

    def batch(self, step: int, group: int, groups: int) -> dict[str, Tensor]:
        """Micro-batch `group` of the `groups` of a step. It depends on the arguments alone."""

    def held_out(self) -> Iterable[dict[str, Tensor]]:
        """Batches of held-out text, always the same."""

    def checkpoint(self, step: int, progress: float) -> None:
        """Called on every process after each save."""


def train(config: LoopConfig, task: Task, world: World) -> None:
    """Run the loop in this process, one of `world`."""
    config.folder.mkdir(parents=True, exist_ok=True)
    world.shard(task.module, task.layers(), task.ignored())
    _Run(config, task, world).go()


def fast_matmul() -> None:
    """Compute fp32 matrix products by oneDNN. On processors that MKL does not favor, this doubles their speed.

    On a processor with bf16 matrix units the factors may be rounded to bf16. Elsewhere the products stay fp32.
    """
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]


class _Run:
    def __init__(self, config: LoopConfig, task: Task, world: World) -> None:
        self._config, self._task, self._world = config, task, world
        self._module = task.module
        self._optimizer = Optimizer(self._module, config.optimizer)
        self._before = Length.read(config.folder)
        if self._before.steps:
            self._restore()
        if config.compile:
            # Not the module: what gathers its parameters runs outside.
            self._module.loss = torch.compile(self._module.loss, dynamic=False)
        self._compiles = config.compile

    def go(self) -> None:
        config, world, before = self._config, self._world, self._before
        step, seconds, clock = before.steps, before.seconds, before.seconds
        processor = before.processor_seconds
        if world.rank == 0:
            _truncate_log(config.folder / "curve.jsonl", step)
        saved = time.monotonic()
        sums: dict[str, float] = {}
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>5.1f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            disable=world.rank != 0,
            refresh_per_second=1,
        ) as bar:
            line = bar.add_task(config.folder.name, total=1.0, figures="compiling" if self._compiles else "")
            while self._progress(step, seconds) < 1.0 and step != config.stop_after:
                began = time.monotonic()
                figures, made = self._gradients(step)
                # All processes use the first one's clock, and log the means of all.
                names = sorted(figures)
                own = [clock if world.rank == 0 else 0.0, time.process_time(), float(made)]
                if world.rank == 0:
                    own[1] += before.processor_seconds
                shared = world.total(torch.tensor([*own, *(figures[name] for name in names)], dtype=torch.float64))
                seconds, processor, made = float(shared[0]), float(shared[1]), int(shared[2])
                means = dict(zip(names, (shared[3:] / world.size).tolist(), strict=True))
                progress = self._progress(step, seconds)
                means["norm"] = self._optimizer.step(config.scale(step, progress))
                step += 1
                _check_finite(means, step)
                took = time.monotonic() - began
                if not self._compiles or step > before.steps + 1:
                    clock += min(took, STALL_SECONDS)
                for name, value in {**means, "bytes_per_second": made / took}.items():
                    sums[name] = sums.get(name, 0.0) + value
                ended = step == config.stop_after or self._progress(step, seconds) >= 1.0
                if step % config.log_every == 0:
                    logged = {name: round(value / config.log_every, 5) for name, value in sums.items()}
                    sums.clear()
                    if step % config.judge_every == 0:
                        logged |= self._judge()
                    if world.rank == 0:
                        row = {"step": step, "seconds": round(seconds, 1), "progress": round(progress, 5), **logged}
                        with (config.folder / "curve.jsonl").open("a") as log:
                            log.write(json.dumps(row) + "\n")
                        bar.update(line, completed=progress, figures=_line(logged))
                if ended or self._save_is_due(step, time.monotonic() - saved):
                    self._save(Length(step, clock, processor))
                    self._task.checkpoint(step, progress)
                    saved = time.monotonic()

    def _gradients(self, step: int) -> tuple[dict[str, float], int]:
        """Run this process's micro-batches. Returns the means of their figures, and how many bytes they had."""
        mine = self._world.mine(self._config.micro_batches)
        sums: dict[str, float] = {}
        made = 0
        for group in mine:
            batch = self._on_device(self._task.batch(step, group, self._config.micro_batches))
            loss, figures = self._module(batch)
            (loss / len(mine)).backward()
            made += batch["ids"].numel()
            for name, value in {**figures, "loss": loss.detach()}.items():
                sums[name] = sums.get(name, 0.0) + float(value) / len(mine)
        return sums, made

    @torch.no_grad()
    def _judge(self) -> dict[str, float]:
        """Means of the figures of held-out text, which every process computes alike."""
        self._module.eval()
        sums: dict[str, list[float]] = {}
        for batch in self._task.held_out():
            for name, value in self._module(self._on_device(batch))[1].items():
                sums.setdefault(f"held_out_{name}", []).append(float(value))
        self._module.train()
        return {name: round(sum(values) / len(values), 5) for name, values in sums.items()}

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self._world.device) for name, value in batch.items()}

    def _progress(self, step: int, seconds: float) -> float:
        """The share of the run that is done. All processes must pass the same `seconds`."""
        config = self._config
        return step / config.steps if config.steps is not None else seconds / (60 * config.minutes)

    def _save_is_due(self, step: int, since: float) -> bool:
        if self._config.save_steps:
            return step % self._config.save_steps == 0
        # The processes must agree.
        return bool(self._world.total(torch.tensor([float(since > self._config.save_seconds)]))[0] > 0)

    def _save(self, length: Length) -> None:
        tensors: list[tuple[str, Tensor]] = [(f"model.{name}", one) for name, one in trained(self._module)]
        tensors += [(f"optimizer.{name}", one) for name, one in self._optimizer.state()]
        state.save(self._config.folder, tensors, length, self._world)

    @torch.no_grad()
    def _restore(self) -> None:
        saved = Saved(self._config.folder)
        named: dict[str, Tensor] = dict(trained(self._module))
        if {f"model.{name}" for name in named} != {name for name in saved.names() if name.startswith("model.")}:
            raise StateError(f"{self._config.folder} has a run that trained other parts; name another --work")
        for full in saved.names():
            kind, _, name = full.partition(".")
            if kind == "model":
                state.own_rows(named[name]).copy_(saved.local(full, named[name], self._world))
                continue
            key, _, name = name.partition(".")
            parameter = named[name]
            value = saved.whole(full) if key == "step" else torch.zeros_like(parameter, requires_grad=False)
            if key != "step":
                state.own_rows(value).copy_(saved.local(full, parameter, self._world))
            self._optimizer.restore(name, key, value)


def _check_finite(figures: Mapping[str, float], step: int) -> None:
    """Raises StateError: no later step mends weights that have become NaN."""
    if wrong := [name for name, value in figures.items() if not math.isfinite(value)]:
        raise StateError(f"step {step}: the {wrong[0]} is no number any more; begin again with lower rates (--lr, "
                         "--muon-lr) and another --work")  # fmt: skip


def _line(figures: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in figures.items())


def _truncate_log(path: Path, step: int) -> None:
    """Drop the rows that a resumed run will write again, and a last row that is incomplete."""
    if not path.is_file():
        return
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            rows.append(line)
    write_atomically(path, lambda to: to.write_text("".join(f"{line}\n" for line in rows)))


def describe(config: LoopConfig) -> dict[str, Any]:
    """The settings as plain values, to be written as JSON."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
