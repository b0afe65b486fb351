"""The training loop of both stages: data-parallel processes, learning rate schedule, curves, and resumable state."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastblt.models.training.optimizer import Optimizer, OptimizerConfig

#: A step that takes longer than this was suspended from outside. Only this much of it counts as training time.
STALL_SECONDS = 10.0


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a run. Its length is `steps` if given, else `minutes` of training time, without compilation.

    With `stop_after` the run stops after that many steps and can be resumed; the schedule stays that of the whole
    length. A run gives the same weights again only with `steps`: then its schedule does not depend on the clock.
    """

    folder: Path
    minutes: float = 60.0
    steps: int | None = None
    stop_after: int | None = None
    warmup_steps: int = 60
    hold: float = 0.3
    final_scale: float = 0.03
    processes: int = 2
    threads: int = 1
    compile: bool = True
    seed: int = 0
    log_every: int = 20
    save_seconds: float = 120.0
    save_steps: int | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def scale(self, step: int, progress: float) -> float:
        """Factor of the learning rates: warm-up, a plateau, then a straight line down to `final_scale`."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        down = max(0.0, (progress - self.hold) / (1 - self.hold))
        return warm * (1 - (1 - self.final_scale) * min(1.0, down))


@dataclass(frozen=True)
class Length:
    """How far a run is: steps, seconds of training, and processor seconds of all processes, compilation included."""

    steps: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0

    def metadata(self) -> dict[str, str]:
        return {name: repr(value) for name, value in asdict(self).items()}

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Length:
        return cls(int(metadata["steps"]), float(metadata["seconds"]), float(metadata["processor_seconds"]))


class Task(Protocol):
    """A training stage: a model, batches that depend only on the arguments, a loss, and named figures to log."""

    @property
    def model(self) -> nn.Module: ...

    def batch(self, step: int, rank: int, processes: int) -> dict[str, Tensor]: ...

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]: ...

    def checkpoint(self, step: int, progress: float) -> None:
        """Called on the first process after each save."""


def train(config: LoopConfig, make_task: Callable[..., Task], *args: Any) -> None:
    """Run the loop in `config.processes` processes, of which this is the first.

    `make_task` and `args` must be picklable; each process calls `make_task(*args)`.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    rendezvous = config.folder / f"rendezvous-{os.getpid()}"
    context = mp.get_context("spawn")
    others = [
        context.Process(target=_process, args=(rank, rendezvous, config, make_task, args), daemon=True)
        for rank in range(1, config.processes)
    ]
    for process in others:
        process.start()
    try:
        _process(0, rendezvous, config, make_task, args)
        for process in others:
            process.join()
    finally:
        rendezvous.unlink(missing_ok=True)


def fast_matmul() -> None:
    """Compute fp32 matrix products by oneDNN. On processors that MKL does not favor, this doubles their speed.

    On a processor with bf16 matrix units the factors may be rounded to bf16. Elsewhere the products stay fp32.
    """
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]


def _process(rank: int, rendezvous: Path, config: LoopConfig, make_task: Callable[..., Task], args: tuple) -> None:
    torch.set_num_threads(config.threads)
    fast_matmul()
    if config.processes > 1:
        # A user may suspend a process for a long time. The others must wait for it.
        store = dist.FileStore(str(rendezvous), config.processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=config.processes, timeout=timedelta(days=1))
    try:
        _loop(rank, config, make_task(*args))
    finally:
        if config.processes > 1:
            dist.destroy_process_group()


def _loop(rank: int, config: LoopConfig, task: Task) -> None:
    optimizer = Optimizer(task.model, config.optimizer)
    state = config.folder / "state.safetensors"
    before = _restore(state, task.model, optimizer) if state.is_file() else Length()
    step, seconds = before.steps, before.seconds
    clock, processor = seconds, before.processor_seconds
    loss_function = torch.compile(task.loss, dynamic=False) if config.compile else task.loss
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    gradients = torch.zeros(sum(parameter.numel() for parameter in parameters) + 2)
    views, offset = [], 0
    for parameter in parameters:
        views.append(gradients[offset : offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()
    if rank == 0:
        _truncate_log(config.folder / "curve.jsonl", step)
    saved = time.monotonic()
    first = True
    sums: dict[str, float] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        disable=rank != 0,
        refresh_per_second=1,
    ) as bar:
        line = bar.add_task(config.folder.name, total=1.0, figures="compiling" if config.compile else "")
        while (progress := _progress(config, step, seconds)) < 1.0 and step != config.stop_after:
            began = time.monotonic()
            batch = task.batch(step, rank, config.processes)
            loss, figures = loss_function(batch)
            loss.backward()
            torch._foreach_copy_(views, [parameter.grad for parameter in parameters if parameter.grad is not None])
            # All processes use the first one's clock, which is sent along with the gradients.
            gradients[-1] = clock if rank == 0 else 0.0
            gradients[-2] = time.process_time() + (before.processor_seconds if rank == 0 else 0.0)
            if config.processes > 1:
                dist.all_reduce(gradients)
            seconds, processor = float(gradients[-1]), float(gradients[-2])
            progress = _progress(config, step, seconds)
            gradients /= config.processes
            for parameter, view in zip(parameters, views, strict=True):
                parameter.grad = view
            norm = optimizer.step(config.scale(step, progress))
            for parameter in parameters:
                parameter.grad = None
            step += 1
            if not first or not config.compile:
                clock += min(time.monotonic() - began, STALL_SECONDS)
            first = False
            for name, value in {**figures, "loss": loss, "norm": norm}.items():
                sums[name] = sums.get(name, 0.0) + float(torch.as_tensor(value).detach())
            if rank == 0 and step % config.log_every == 0:
                means = {name: round(value / config.log_every, 5) for name, value in sums.items()}
                row = {"step": step, "seconds": round(seconds, 1), "progress": round(progress, 5), **means}
                with (config.folder / "curve.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                bar.update(line, completed=progress, figures=" ".join(f"{k} {v:.3f}" for k, v in means.items()))
            if step % config.log_every == 0:
                sums.clear()
            due = step % config.save_steps == 0 if config.save_steps else time.monotonic() - saved > config.save_seconds
            if rank == 0 and due:
                _save(state, task.model, optimizer, Length(step, clock, processor))
                task.checkpoint(step, progress)
                saved = time.monotonic()
    if rank == 0:
        _save(state, task.model, optimizer, Length(step, clock, processor))


def _progress(config: LoopConfig, step: int, seconds: float) -> float:
    """The share of the run that is done. All processes must pass the same `seconds` (see `_loop`)."""
    return step / config.steps if config.steps is not None else seconds / (60 * config.minutes)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary file's path, flush that file to disk, and rename it to `path`."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _save(path: Path, model: nn.Module, optimizer: Optimizer, length: Length) -> None:
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.state().items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda to: save_file(tensors, to, length.metadata()))


def _restore(path: Path, model: nn.Module, optimizer: Optimizer) -> Length:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    prefix = "optimizer."
    optimizer.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return Length.read(metadata)


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


def describe(config: LoopConfig) -> Mapping[str, Any]:
    """The settings as plain values, to be written as JSON."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
