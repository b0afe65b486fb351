"""`fastblt train`: trains a diffusion head, and all else that is not frozen, of a BLT on any text.

    fastblt train --from CHECKPOINT --text FOLDER                 on one CPU or GPU
    torchrun --nproc-per-node 8 -m fastblt train ...              the same on several
    fastblt train                                                 the shipped checkpoint, from nothing

A command that was killed goes on where it was, also with another number of processes. Its results stand in the
working folder: the text (data/), the entropy model (entropy/), the patch threshold (patching.json), the training state
and its curve (blt/), the finished checkpoint (checkpoint/).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fastblt.models.checkpoint_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    checkpoint_folder,
    read_config,
)
from fastblt.models.config import ConfigError
from fastblt.models.training.layout import BLOCK_ROWS, PARTS, TILE
from fastblt.models.training.record import read_record

_WELCOME = """\
fastblt train: a corpus, 9 minutes for the entropy model, 80 for the BLT-D, unless --entropy-minutes and --minutes say \
otherwise. Ctrl-C stops it; the same command goes on."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the list of all options."""
        self.exit(2, f"fastblt train: {message}\n")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's options. For an invalid one, ends the process with a message that names it.

    Raises CheckpointError and ConfigError if the checkpoint of --from cannot be trained.
    """
    parser = _Parser(prog="fastblt train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _what(parser.add_argument_group("what is trained, on what"))
    _how_long(parser.add_argument_group("how long"))
    _blocks(parser.add_argument_group("the diffusion head's objective"))
    _rates(parser.add_argument_group("learning rates"))
    _machine(parser.add_argument_group("batches and machine"))
    args = parser.parse_args(argv)
    if args.length % TILE:
        parser.error(f"--length must be a multiple of {TILE}, not {args.length}")
    if args.closed_starts + args.forced_starts > 1:
        parser.error("--closed-starts and --forced-starts are shares of the same blocks: together at most 1")
    if args.text is not None and args.packages:
        parser.error("--packages come beside Python's own library: give their folders with --text instead")
    if args.start is None and (args.freeze or args.keep):
        parser.error("--freeze and --keep need the weights of --from")
    if args.lr == args.muon_lr == 0:
        parser.error("--lr and --muon-lr are 0: nothing would be trained")
    if args.micro_batches % (processes := int(os.environ.get("WORLD_SIZE", "1"))):
        parser.error(f"--micro-batches must be a multiple of the {processes} processes, not {args.micro_batches}")
    try:
        _settle_shape(args)
    except ValueError as error:
        if isinstance(error, CheckpointError | ConfigError):
            raise
        parser.error(str(error))
    return args


def _what(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--from", dest="start", type=Path, help="checkpoint to start from: any that is served; a folder or a Hub id")
    add("--text", nargs="+", help="files, folders, globs; also .gz, .zst (default: Python's own library)")
    add("--packages", nargs="+", default=[], help="installed packages whose sources come beside Python's own library")
    add("--field", default="text", help="the text of an object in .jsonl files (default: %(default)s)")
    add("--held-out", type=_share, default=0.01, help="share of --text that is held out (default: %(default)s)")
    add("--freeze", nargs="+", choices=PARTS, default=[], help="parts that stay as they are")
    add("--block-sizes", type=_count, nargs="+", help="of the diffusion head (default: 4 8 16, or as in --from)")
    add("--max-patch-length", type=_count, help="bytes of a patch at most (default: 8, or as in --from)")
    add("--bytes-per-patch", type=_patch_size, default=4.5, help="mean patch size of a new entropy model's threshold")
    add("--work", type=Path, default=Path("runs/blt"), help="working folder (default: %(default)s)")
    add("--export", type=Path, help="folder of the finished checkpoint (default: WORK/checkpoint)")
    add("--dry-run", action="store_true", help="say what it would take: memory, time of a step, size of the text")


def _how_long(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--steps", type=_count, help="steps: a run that can be repeated")
    add("--minutes", type=_minutes, default=80.0, help="training time, if no steps are given (default: %(default)s)")
    add("--stop-after", type=_count, help="stop and export after so many of the steps; the same command goes on later")
    add("--entropy-steps", type=_count, help="steps of a new entropy model")
    add("--entropy-minutes", type=_minutes, default=9.0, help="or its training time (default: %(default)s)")
    add("--log-steps", type=_count, default=20, help="steps that a point of the curve is the mean of (%(default)s)")
    add("--save-steps", type=_count, help="save after every so many steps (default: every two minutes)")


def _blocks(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--masked-weight", type=_weight, default=0.5, help="weight of the diffusion loss")
    add("--closed-starts", type=_share, default=0.7, help="share of blocks that start as drafts do")
    add("--forced-starts", type=_share, default=0.0, help="share of blocks that start as BLT-D's do")
    add("--old-latents", type=_share, default=0.0, help="share of closed starts with an older latent, as in BLT-DSV")
    add("--full-blocks", type=_share, default=0.5, help="share of blocks that are masked altogether")
    add("--refined-blocks", type=_share, default=0.0, help="share of others that show what the model is surest of")
    add("--decay", type=_share, default=0.8, help="of the loss from position to position of blocks masked altogether")
    add("--distill", type=_share, default=0.0, help="share of their loss that is aimed at the causal prediction")
    add("--keep", type=_share, default=0.0, help="share of the causal loss that is aimed at the prediction of --from")


def _rates(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--muon-lr", type=_rate, default=0.02, help="peak rate of Muon; 0: AdamW trains all (%(default)s)")
    add("--lr", type=_rate, default=3e-3, help="peak rate of AdamW (default: %(default)s)")
    add("--scale-lr", type=_factor, nargs="+", default=[], metavar="PART=FACTOR", help="of a part's rates: global=0.1")
    add("--seed", type=_seed, default=0)


def _machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--length", type=_count, default=1024, help="bytes of a sequence (default: %(default)s)")
    add("--batch", type=_count, default=2, help="sequences that a process runs at once (entropy model: twice)")
    add("--micro-batches", type=_count, default=2, help="of --batch sequences that make a step, over all processes")
    add("--dtype", choices=("float32", "bfloat16"), help="of a step's arithmetic (default: bfloat16 on a GPU)")
    add("--recompute", action="store_true", help="keep no activations of layers, and compute them twice")
    add("--threads", type=_count, default=1, help="torch threads of each process")
    add("--no-compile", dest="compile", action="store_false", help="train without torch.compile")


def _settle_shape(args: argparse.Namespace) -> None:
    """Set block sizes and the longest patch, as given or as the checkpoint of --from has them.

    Raises ValueError for values that do not fit, CheckpointError for a checkpoint that cannot be trained.
    """
    sizes, longest = [4, 8, 16], 8
    if args.start is not None:
        folder = checkpoint_folder(str(args.start))
        config = read_config(folder)
        if not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
            raise CheckpointError(f"--from {args.start} has {CONFIG_FILE} but no {WEIGHTS_FILE}")
        read_record(folder)
        args.start = folder
        sizes, longest = list(config.block_sizes) or sizes, config.max_patch_length  # type: ignore[assignment]
        if args.max_patch_length not in (None, longest):
            has = f"at most {longest} bytes" if longest else "no limit"
            raise ValueError(f"--max-patch-length is {args.max_patch_length}, but the checkpoint's patches have {has}")
        if set(args.freeze) == set(PARTS):
            raise ValueError("--freeze leaves nothing to train")
    args.block_sizes = args.block_sizes or sizes
    if wrong := [size for size in args.block_sizes if BLOCK_ROWS % size]:
        raise ValueError(f"--block-sizes must divide {BLOCK_ROWS}: {wrong[0]} does not")
    args.max_patch_length = args.max_patch_length or longest


def _number(text: str, allowed: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and allowed(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def _minutes(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1e7, "a number above 0, up to 10 million")


def _patch_size(text: str) -> float:
    return _number(text, lambda value: 1 <= value <= 1024, "a number from 1 to 1024")


def _rate(text: str) -> float:
    return _number(text, lambda value: value == 0 or 1e-12 <= value <= 10, "0 or a number from 1e-12 to 10")


def _weight(text: str) -> float:
    return _number(text, lambda value: 0 <= value <= 1000, "a number from 0 to 1000")


def _share(text: str) -> float:
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _factor(text: str) -> tuple[str, float]:
    part, _, factor = text.partition("=")
    if part not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not PART=FACTOR with one of {', '.join(PARTS)}")
    return part, _weight(factor)


def _whole(text: str, least: int) -> int:
    if not text.isascii() or not text.isdecimal() or not least <= int(text[:20]) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 2^31")
    return int(text)


def _count(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def main(argv: list[str] | None = None) -> int:
    """Run the command. What a user can mend ends in one line, most of it before torch is loaded."""
    from fastblt.models.training.corpus import CorpusError, installed, standard_library
    from fastblt.models.training.files import StateError
    from fastblt.models.training.text import TextError, find

    try:
        args = arguments(argv)
        if args.text is None:
            standard_library()
            for package in args.packages:
                installed(package)
        else:
            find(args.text)
        if os.environ.get("RANK", "0") == "0":
            print(_WELCOME, file=sys.stderr)
        from fastblt.models.training.stages import run

        return run(args)
    except (CheckpointError, ConfigError, CorpusError, StateError, TextError) as error:
        print(f"fastblt train: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
