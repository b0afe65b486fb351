"""The stages of `fastblt train`: text, entropy model, threshold, BLT-D, export."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastblt.models.blt import Blt, Patcher, init_weights
from fastblt.models.checkpoint import TensorFiles, stored_name, write_checkpoint
from fastblt.models.config import BltConfig
from fastblt.models.patching import PatchRule
from fastblt.models.training import corpus, text
from fastblt.models.training.data import Chunks, Sequential, save_corpus
from fastblt.models.training.entropy import EntropyTask, NextByte, choose_threshold, measure, patch_starts
from fastblt.models.training.files import write_json
from fastblt.models.training.layout import LayoutConfig
from fastblt.models.training.loop import LoopConfig, describe, fast_matmul, train
from fastblt.models.training.memory import memory
from fastblt.models.training.objective import Objective
from fastblt.models.training.optimizer import Optimizer, OptimizerConfig
from fastblt.models.training.parallel import World, joined
from fastblt.models.training.recipe import BltTask, recompute, shape
from fastblt.models.training.record import Corpus, Record, Run, began, read_record
from fastblt.models.training.start import begin
from fastblt.models.training.state import Length, Saved

#: Held-out sequences that the number of kept patches is measured on.
_MEASURED = 64


def run(args: argparse.Namespace) -> int:
    """Run the stages in this process, and in the others that `torchrun` started. Returns the exit code.

    Raises CheckpointError, ConfigError, CorpusError and TextError for what a user can mend.
    """
    torch.set_num_threads(args.threads)
    fast_matmul()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    with joined(dtype) as world:
        return _Stages(args, world).run()


@dataclass(frozen=True)
class _Text:
    """Both sides of the text, and what is known of it."""

    train: Sequential
    held_out: Sequential
    record: dict[str, Any]


class _Stages:
    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world = args, world
        self.taken = most_memory(world)
        self.console = Console(quiet=world.rank > 0, soft_wrap=True)
        self.work: Path = args.work
        self.loop = LoopConfig(
            self.work / "blt",
            minutes=args.minutes,
            steps=args.steps,
            stop_after=args.stop_after,
            micro_batches=args.micro_batches,
            compile=args.compile,
            seed=args.seed,
            save_steps=args.save_steps,
            log_every=args.log_steps,
            optimizer=OptimizerConfig(muon_lr=args.muon_lr, lr=args.lr, parts=dict(args.scale_lr)),
        )

    def run(self) -> int:
        args, work = self.args, self.work
        work.mkdir(parents=True, exist_ok=True)
        self.keep_record()
        data = self.text()
        self.console.print(f"text {json.dumps(data.record)}")
        teacher = None
        if args.start is not None:
            model, teacher = begin(args.start, args.block_sizes, args.freeze, seed=args.seed, teach=args.keep > 0)
            patching = self.patching(model.config, model.patcher, data.held_out, model.config.patching_threshold)
        else:
            config = shape(max_patch_length=args.max_patch_length, block_sizes=tuple(args.block_sizes))
            patcher = self.entropy_model(config, data)
            patching = self.patching(config, patcher, data.held_out)
            model = Blt(config.with_patching(threshold=patching["threshold"]))
            init_weights(model, args.seed)
            model.patcher = patcher.requires_grad_(False)
        layout = LayoutConfig(
            patching["patches"],
            args.max_patch_length,
            model.config.block_sizes,
            closed_starts=args.closed_starts,
            forced_starts=args.forced_starts,
            full_blocks=args.full_blocks,
            decay=args.decay,
            old_latents=args.old_latents,
            refined_blocks=args.refined_blocks,
        )
        if args.recompute:
            recompute(model)
        model.to(self.world.device)
        if teacher is not None:
            teacher.to(self.world.device)
        objective = Objective(model, args.length, args.masked_weight, args.distill, args.keep, teacher)
        task = BltTask(objective, data.train, data.held_out, layout, args.batch, args.seed)
        if args.dry_run:
            return self.dry_run(task, model.config, layout)
        self.record_settings(patching)
        train(self.loop, task, self.world)
        self.export(model, data.record)
        return 0

    def text(self) -> _Text:
        args, folder = self.args, self.work / "data"
        if args.text is None:
            if self.world.rank == 0:
                prepare_corpus(folder, args.length, args.packages)
            self.world.wait()
            record = json.loads((folder / "corpus.json").read_text())
            return _Text(Chunks(folder / "train.npy"), Chunks(folder / "held_out.npy"), record)
        if self.world.rank == 0:
            text.prepare(folder, args.text, args.field, args.held_out, args.length)
        self.world.wait()
        record = json.loads((folder / text.RECORD).read_text())
        train, held_out = (text.Sequences(folder, part, args.length) for part in ("train", "held_out"))
        return _Text(train, held_out, record)

    def entropy_model(self, config: BltConfig, data: _Text) -> Patcher:
        """A new entropy model, trained unless `patching.json` says that it has been."""
        args = self.args
        loop = replace(
            self.loop,
            folder=self.work / "entropy",
            minutes=args.entropy_minutes,
            steps=args.entropy_steps,
            stop_after=None,
        )
        if not (self.work / "patching.json").is_file():
            module = NextByte(config.patcher, args.length, args.seed, self.world.device)
            train(loop, EntropyTask(module, data.train, data.held_out, 2 * args.batch, args.seed), self.world)
        patcher = Patcher(config.patcher)
        patcher.load_state_dict(weights(loop.folder))
        return patcher

    def patching(
        self, config: BltConfig, patcher: Patcher, held_out: Sequential, threshold: float | None = None
    ) -> dict[str, Any]:
        """The threshold (nats), chosen unless given, and how many patches of a sequence are kept: 1.25 times the mean.

        That number is fixed so that one compiled graph fits all sequences. Bytes that need a later patch have no loss.
        The result stands in the working folder, where a resumed run reads it.
        """
        record = self.work / "patching.json"
        if self.world.rank == 0 and not record.is_file():
            few = min(_MEASURED, len(held_out)) if self.args.text else len(held_out)
            chunks = held_out.take([number * len(held_out) // few for number in range(few)])
            entropy, bits = measure(patcher, config.patcher, chunks)
            mean = self.args.bytes_per_patch
            if threshold is None:
                threshold = choose_threshold(entropy, mean, config.max_patch_length)
            else:
                starts = patch_starts(entropy, PatchRule(threshold, config.max_patch_length))[:, :-1]
                mean = starts.size / starts.sum()
            patches = min(-(-int(1.25 * chunks.shape[1] / mean) // 32) * 32, chunks.shape[1])
            write_json(record, {"threshold": threshold, "patches": patches, "patcher_bits_per_byte": round(bits, 4)})
        self.world.wait()
        self.console.print(f"patching {record.read_text()}")
        return json.loads(record.read_text())

    def dry_run(self, task: BltTask, config: BltConfig, layout: LayoutConfig) -> int:
        """Say what a run would take: on paper, and as two steps here take it. They are not compiled, and change
        nothing."""
        args, world = self.args, self.world
        need = memory(
            config,
            processes=world.size,
            freeze=args.freeze,
            teach=args.keep > 0,
            muon=args.muon_lr > 0,
            low=world.dtype != torch.float32,
            batch=args.batch,
            length=args.length,
            patches=layout.patches,
            recompute=args.recompute,
        )
        world.shard(task.module, task.layers(), task.ignored())
        optimizer = Optimizer(task.module, self.loop.optimizer)
        seconds = []
        for _ in range(2):
            began = time.monotonic()
            for group in world.mine(args.micro_batches):
                batch = task.batch(0, group, args.micro_batches)
                loss, _ = task.module({name: value.to(world.device) for name, value in batch.items()})
                loss.backward()
                del loss
            # With rates of zero nothing changes.
            optimizer.step(0.0)
            seconds.append(time.monotonic() - began)
        for name in ("weights", "gradients", "optimizer", "gathered", "activations", "total"):
            self.console.print(f"memory of a process, {name}: {getattr(need, name) / 1e9:.3f} GB")
        self.console.print(f"most memory taken here: {(most_memory(world) - self.taken) / 1e9:.3f} GB")
        made = args.micro_batches * args.batch * args.length
        where = f"{world.size} {world.device.type} process(es)"
        self.console.print(f"a step of {made} bytes: {seconds[-1]:.2f} s, not compiled, on {where}")
        return 0

    def record_settings(self, patching: dict[str, Any]) -> None:
        if self.world.rank == 0:
            settings = {"blt": describe(self.loop), "patching": patching, "command": vars(self.args)}
            write_json(self.work / "settings.json", json.loads(json.dumps(settings, default=str)))

    def keep_record(self) -> None:
        """Keep what made the checkpoint that the run begins from: another may stand there when it ends."""
        first = self.world.rank == 0 and not (self.work / "settings.json").is_file()
        if first and self.args.start is not None and (record := read_record(self.args.start)) is not None:
            record.write(self.work)

    def export(self, model: Blt, text_record: dict[str, Any]) -> None:
        args = self.args
        folder: Path = args.export or self.work / "checkpoint"
        save_sharded(model, folder, self.world, args.start)
        if self.world.rank > 0:
            return
        earlier = read_record(self.work)
        fresh = self.work / "entropy" if args.start is None else None
        run = describe_run(Length.read(self.loop.folder), Length.read(fresh) if fresh else Length(), args, earlier)
        # The weights that it began from have seen their packages.
        seen = (earlier.corpus.packages if earlier else {}) | text_record.get("packages", {})
        own = Corpus.model_validate(text_record | {"packages": seen})
        Record(corpus=own, runs=[*(earlier.runs if earlier else []), run]).write(folder)
        self.console.print(f"exported to {folder}; serve it with: fastblt serve {folder}")


def most_memory(world: World) -> int:
    """Bytes of the device's memory that this process has held at most; on a CPU of all memory, with the program's."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not `ru_maxrss`, which counts the program that started this one.
    [line] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


def describe_run(length: Length, entropy: Length, args: argparse.Namespace, earlier: Record | None) -> Run:
    """The cost and the settings of a run that began at a checkpoint with the record `earlier`. Processor minutes are of
    all processes, compilation included."""
    own = ("work", "export", "start", "minutes", "entropy_minutes", "steps", "stop_after", "entropy_steps", "dry_run")
    settings = {name: value for name, value in vars(args).items() if name not in own and value not in (None, [])}
    return Run.model_validate(
        {
            "from": "new weights" if args.start is None else began(earlier),
            "steps": length.steps,
            "megabytes": round(length.steps * args.micro_batches * args.batch * args.length / 1e6, 1),
            "minutes": round(length.seconds / 60, 1),
            "processor_minutes": round(length.processor_seconds / 60, 1),
            "entropy_minutes": round(entropy.seconds / 60, 1),
            "settings": settings,
        }
    )


def prepare_corpus(folder: Path, length: int, packages: Sequence[str] = ()) -> None:
    """Write the text of the standard library and of `packages` as arrays, unless they are there.

    Raises CorpusError, also where the text that is there is of other packages.
    """
    record = folder / "corpus.json"
    if record.is_file():
        has = json.loads(record.read_text())["packages"]
        if sorted(has) != sorted(packages):
            raise corpus.CorpusError(
                f"{folder} has the text of other --packages ({', '.join(sorted(has)) or 'none'}): take another --work"
            )
        return
    built = corpus.build(length=length, packages=packages)
    save_corpus(folder, built)
    write_json(
        record,
        {
            "packages": {package: corpus.version(package) for package in packages},
            "sha256": built.sha256,
            "train_bytes": built.train_bytes,
            "held_out_bytes": built.held_out_bytes,
            "train_chunks": len(built.train),
            "held_out_chunks": len(built.held_out),
        },
    )


def save_sharded(model: Blt, folder: Path, world: World, start: Path | None) -> None:
    """Write a checkpoint of a model that may be sharded over the processes: the first one writes, and all gather one
    tensor after another.

    Every tensor has the type that it has in the checkpoint `start`, so that what was frozen is the same bit for bit.
    New ones are in bf16, and the entropy model in fp32.
    """
    state = {stored_name(name): tensor for name, tensor in model.state_dict().items()}
    files = TensorFiles(start) if start is not None else None
    kinds = {name: files.dtype(name) for name in files} if files is not None else {}

    def kind(name: str) -> torch.dtype:
        if name.startswith("model.patcher."):
            return torch.float32
        return kinds.get(name, torch.bfloat16)

    def read(name: str) -> Tensor:
        tensor = state[name].detach()
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", kind(name))

    sizes = {name: tensor.numel() * kind(name).itemsize for name, tensor in state.items()}
    if world.rank == 0:
        write_checkpoint(folder, model.config.to_dict(), sizes, read)
        return
    for name in sizes:
        read(name)


def weights(folder: Path) -> dict[str, Tensor]:
    """The model's weights in the state of the run in a folder."""
    saved = Saved(folder)
    return {name.removeprefix("model."): saved.whole(name) for name in saved.names() if name.startswith("model.")}
