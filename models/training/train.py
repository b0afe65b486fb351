"""Makes the shipped checkpoint, from nothing or from an earlier one: corpus, entropy model, threshold, BLT-D, export.

Each stage leaves its result in the working folder, and a command that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from fastblt.models.blt import Blt, Patcher
from fastblt.models.checkpoint import CheckpointError, checkpoint_folder, load_checkpoint, read_config, save_checkpoint
from fastblt.models.config import BltConfig
from fastblt.models.training import corpus
from fastblt.models.training.attention import TILE
from fastblt.models.training.data import load_array, save_corpus
from fastblt.models.training.entropy import EntropyTask, choose_threshold, measure
from fastblt.models.training.layout import BLOCK_ROWS, LayoutConfig
from fastblt.models.training.loop import Length, LoopConfig, describe, fast_matmul, train, write_atomically
from fastblt.models.training.optimizer import OptimizerConfig
from fastblt.models.training.recipe import BltTask, shape

#: The file in an exported checkpoint's folder that describes its corpus and the runs that made it.
RUNS_FILE = "training.json"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's options. For an invalid option, ends the process with a message that names it.

    Raises CheckpointError if the checkpoint of --from cannot be trained further.
    """
    parser = argparse.ArgumentParser(prog="fastblt train", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/blt"), help="working folder (default: %(default)s)")
    parser.add_argument("--export", type=Path, help="folder of the finished checkpoint (default: WORK/checkpoint)")
    parser.add_argument(
        "--from", dest="start", type=Path, help="go on from this checkpoint's weights and entropy model"
    )
    parser.add_argument("--minutes", type=_above_zero, default=80.0, help="training time of the BLT-D")
    parser.add_argument("--entropy-minutes", type=_above_zero, default=9.0, help="training time of the entropy model")
    parser.add_argument("--steps", type=_count, help="steps of the BLT-D instead of minutes: a repeatable run")
    parser.add_argument("--stop-after", type=_count, help="stop after so many of them; the same command goes on later")
    parser.add_argument("--entropy-steps", type=_count, help="steps of the entropy model instead of minutes")
    parser.add_argument(
        "--bytes-per-patch", type=_above_zero, default=4.5, help="mean patch size the threshold aims at"
    )
    parser.add_argument(
        "--max-patch-length", type=_count, help="bytes of a patch at most (default: 8, or as in --from)"
    )
    parser.add_argument(
        "--block-sizes", type=_count, nargs="+", help="of the diffusion head (default: 4 8 16, or as in --from)"
    )
    parser.add_argument("--masked-weight", type=_not_negative, default=0.5, help="weight of the diffusion loss")
    parser.add_argument("--closed-starts", type=_share, default=0.7, help="share of blocks that start as drafts do")
    parser.add_argument("--forced-starts", type=_share, default=0.0, help="share of blocks that start as BLT-D's do")
    parser.add_argument("--full-blocks", type=_share, default=0.5, help="share of blocks that are masked altogether")
    parser.add_argument(
        "--old-latents", type=_share, default=0.0, help="share of closed starts that read an older latent, as BLT-DSV"
    )
    parser.add_argument(
        "--refined-blocks", type=_share, default=0.0, help="share of other blocks that show what the model is surest of"
    )
    parser.add_argument(
        "--decay", type=_share, default=0.8, help="of the loss from position to position of such blocks"
    )
    parser.add_argument(
        "--distill", type=_share, default=0.0, help="share of their loss that is aimed at the causal head's prediction"
    )
    parser.add_argument("--length", type=_count, default=1024, help="bytes of a training sequence")
    parser.add_argument("--batch", type=_count, default=2, help="sequences per process and step (entropy model: twice)")
    parser.add_argument("--processes", type=_count, default=2, help="data-parallel processes")
    parser.add_argument("--threads", type=_count, default=1, help="torch threads of each process")
    parser.add_argument("--muon-lr", type=_not_negative, default=0.02)
    parser.add_argument("--lr", type=_not_negative, default=3e-3, help="peak rate of AdamW")
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train without torch.compile")
    args = parser.parse_args(argv)
    if args.length % TILE:
        parser.error(f"--length must be a multiple of {TILE}, not {args.length}")
    if args.closed_starts + args.forced_starts > 1:
        parser.error("--closed-starts and --forced-starts are shares of the same blocks: together at most 1")
    try:
        _settle_shape(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _settle_shape(args: argparse.Namespace) -> None:
    """Set block sizes and the longest patch, as given or as the checkpoint of --from has them.

    Raises ValueError for values that do not fit, CheckpointError for a checkpoint that cannot be trained further.
    """
    sizes, longest = [4, 8, 16], 8
    if args.start is not None:
        config = read_config(checkpoint_folder(args.start))
        if not config.has_diffusion:
            raise CheckpointError(f"--from {args.start} has no diffusion head to go on from")
        if config.max_patch_length is None:
            raise CheckpointError(f"--from {args.start} has no max_patch_length, which training needs")
        for name in ("patcher", "encoder", "decoder"):
            if getattr(config, name).window is None:
                raise CheckpointError(f"--from {args.start}: the {name} has no attention window, which training needs")
        sizes, longest = list(config.block_sizes), config.max_patch_length
    args.block_sizes = args.block_sizes or sizes
    if wrong := [size for size in args.block_sizes if BLOCK_ROWS % size]:
        raise ValueError(f"--block-sizes must divide {BLOCK_ROWS}: {wrong[0]} does not")
    if args.start is not None and args.max_patch_length not in (None, longest):
        raise ValueError(
            f"--max-patch-length is {args.max_patch_length}, but the checkpoint's patches have at most {longest} bytes"
        )
    args.max_patch_length = args.max_patch_length or longest


def _number(text: str, allowed: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and allowed(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def _above_zero(text: str) -> float:
    return _number(text, lambda value: value > 0, "a number above 0")


def _not_negative(text: str) -> float:
    return _number(text, lambda value: value >= 0, "a number of at least 0")


def _share(text: str) -> float:
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _whole(text: str, least: int) -> int:
    if not text.isascii() or not text.isdecimal() or not least <= int(text[:20]) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 2^31")
    return int(text)


def _count(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    console = Console()
    torch.set_num_threads(args.threads)
    fast_matmul()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    try:
        prepare_corpus(work / "data", args.length, console)
    except corpus.CorpusError as error:
        raise SystemExit(f"fastblt train: {error}") from error
    earlier = read_runs(args.start) if args.start is not None else []
    config = shape(max_patch_length=args.max_patch_length, block_sizes=tuple(args.block_sizes))
    optimizer = OptimizerConfig(muon_lr=args.muon_lr, lr=args.lr)
    common = LoopConfig(
        work, processes=args.processes, threads=args.threads, compile=args.compile, seed=args.seed, optimizer=optimizer
    )
    first = replace(common, folder=work / "entropy", minutes=args.entropy_minutes, steps=args.entropy_steps)
    if args.start is not None:
        started = load_checkpoint(args.start)
        config, patcher = replace(started.config, block_sizes=tuple(args.block_sizes)), started.patcher.state_dict()
        patching = choose_patching(config, patcher, work, args.bytes_per_patch, console, config.patching_threshold)
    else:
        if not (work / "patching.json").is_file():
            train(first, EntropyTask, config.patcher, work / "data", 2 * args.batch, args.seed)
        patcher = weights(work / "entropy" / "state.safetensors")
        patching = choose_patching(config, patcher, work, args.bytes_per_patch, console)
        config = config.with_patching(threshold=patching["threshold"])
    layout = LayoutConfig(
        patching["patches"],
        args.max_patch_length,
        config.block_sizes,
        closed_starts=args.closed_starts,
        forced_starts=args.forced_starts,
        full_blocks=args.full_blocks,
        decay=args.decay,
        old_latents=args.old_latents,
        refined_blocks=args.refined_blocks,
    )
    second = replace(common, folder=work / "blt", minutes=args.minutes, steps=args.steps, stop_after=args.stop_after)
    snapshots = work / "snapshot"
    make = (config, patcher, work / "data", layout, args.batch, args.masked_weight, args.seed, snapshots, args.start)
    settings = {"entropy": describe(first), "blt": describe(second), "patching": patching, "command": vars(args)}
    _write_json(work / "settings.json", json.loads(json.dumps(settings, default=str)))
    train(second, BltTask, *make, args.distill)
    if length_of_run(work / "blt" / "state.safetensors").steps == args.stop_after:
        console.print(f"stopped after {args.stop_after} steps; the same command without --stop-after goes on")
        return 0
    export: Path = args.export or work / "checkpoint"
    model = Blt(config)
    model.load_state_dict(weights(work / "blt" / "state.safetensors"), strict=False)
    model.patcher.load_state_dict(patcher)
    save_checkpoint(model, export, torch.bfloat16)
    entropy_state = None if args.start is not None else work / "entropy" / "state.safetensors"
    run = describe_run(work / "blt" / "state.safetensors", entropy_state, args)
    corpus_record = json.loads((work / "data" / "corpus.json").read_text())
    _write_json(export / RUNS_FILE, {"corpus": corpus_record, "runs": [*earlier, run]})
    console.print(
        f"exported to {export}; measure it with: python -m fastblt.benchmarks.checkpoint.tables {export} --write"
    )
    return 0


def describe_run(state: Path, entropy_state: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """The cost and the settings of a finished run. Processor minutes are of all processes, compilation included."""
    length = length_of_run(state)
    own = ("work", "export", "start", "minutes", "entropy_minutes", "steps", "stop_after", "entropy_steps")
    return {
        "from": "new weights" if args.start is None else "the weights of the run before",
        "steps": length.steps,
        "megabytes": round(length.steps * args.processes * args.batch * args.length / 1e6, 1),
        "minutes": round(length.seconds / 60, 1),
        "processor_minutes": round(length.processor_seconds / 60, 1),
        "entropy_minutes": round(length_of_run(entropy_state).seconds / 60, 1) if entropy_state else 0.0,
        "settings": {name: value for name, value in vars(args).items() if name not in own},
    }


def read_runs(checkpoint: Path) -> list[dict[str, Any]]:
    """The runs that made an exported checkpoint, oldest first. Empty if it does not record them."""
    record = checkpoint / RUNS_FILE
    return json.loads(record.read_text())["runs"] if record.is_file() else []


def prepare_corpus(folder: Path, length: int, console: Console) -> None:
    record = folder / "corpus.json"
    if not record.is_file():
        built = corpus.build(length=length)
        save_corpus(folder, built)
        _write_json(
            record,
            {
                "sha256": built.sha256,
                "train_bytes": built.train_bytes,
                "held_out_bytes": built.held_out_bytes,
                "train_chunks": len(built.train),
                "held_out_chunks": len(built.held_out),
            },
        )
    console.print(f"corpus {record.read_text()}")


def choose_patching(
    config: BltConfig,
    patcher: dict[str, Tensor],
    work: Path,
    bytes_per_patch: float,
    console: Console,
    threshold: float | None = None,
) -> dict[str, Any]:
    """Choose the threshold (nats), unless given, and how many patches of a sequence are kept: 1.25 times the mean.

    That number is fixed so that one compiled graph fits all sequences. Bytes that need a later patch have no loss. The
    result is kept in `work`, and read from there by a resumed run.
    """
    record = work / "patching.json"
    if not record.is_file():
        model = Patcher(config.patcher)
        model.load_state_dict(patcher)
        held_out = load_array(work / "data" / "held_out.npy")
        entropy, bits = measure(model, config.patcher, held_out)
        if threshold is None:
            threshold = choose_threshold(entropy, bytes_per_patch, config.max_patch_length)
        patches = -(-int(1.25 * held_out.shape[1] / bytes_per_patch) // 32) * 32
        _write_json(record, {"threshold": threshold, "patches": patches, "patcher_bits_per_byte": round(bits, 4)})
    console.print(f"patching {record.read_text()}")
    return json.loads(record.read_text())


def weights(state: Path) -> dict[str, Tensor]:
    """The model's weights in a loop's state file."""
    with safe_open(state, "pt") as file:
        names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
        return {name.removeprefix("model."): file.get_tensor(name) for name in names}


def length_of_run(state: Path) -> Length:
    """The `Length` in a loop's state file."""
    with safe_open(state, "pt") as file:
        return Length.read(file.metadata())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, lambda to: to.write_text(json.dumps(value, indent=2) + "\n"))


if __name__ == "__main__":
    raise SystemExit(main())
