"""Memory on paper and memory taken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastblt.models.blt import Blt, init_weights
from fastblt.models.checkpoint import save_checkpoint
from fastblt.models.config import BltConfig, StackConfig
from fastblt.models.training.memory import memory
from tests.models.training.toys import toy_config

ROOT = Path(__file__).parents[3]
GB = 1e9
#: What is freed goes back at once: the allocator would keep as much as a tenth, as it happens to be cut.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def middle() -> BltConfig:
    """45 million parameters, so that weights outweigh everything else."""
    local = StackConfig(256, 2, 4, 4, 704, 500_000.0, window=128)
    return toy_config(
        encoder=replace(local, num_layers=1),
        decoder=local,
        global_=StackConfig(512, 10, 8, 8, 1408, 500_000.0),
        hash_group_vocab=4000,
        block_sizes=(),
    )


def dry_run(config: BltConfig, folder: Path, options: tuple[str, ...]) -> tuple[float, float]:
    """Gigabytes of a process on paper, and taken by a dry run, the program's own among them."""
    model = Blt(config)
    init_weights(model)
    save_checkpoint(model, folder / "start")
    command = [sys.executable, "-m", "fastblt.models.training.train", "--dry-run", "--work", str(folder / "work")]
    command += ["--from", str(folder / "start"), "--text", str(ROOT / "docs"), "--length", "128", "--batch", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **GIVE_BACK}
    ended = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    [total] = re.findall(r"of a process, total: ([\d.]+) GB", ended.stdout)
    [taken] = re.findall(r"most memory taken here: ([\d.]+) GB", ended.stdout)
    return float(total), float(taken)


@pytest.mark.parametrize("options", [(), ("--freeze", "encoder", "global"), ("--muon-lr", "0", "--keep", "0.5")])
def test_a_step_takes_what_the_formula_says(options: tuple[str, ...], tmp_path: Path) -> None:
    """Beyond what a tiny model takes, which is the program's own."""
    total, taken = dry_run(middle(), tmp_path / "middle", options)
    least, own = dry_run(toy_config(block_sizes=()), tmp_path / "tiny", options)
    assert taken - own == pytest.approx(total - least, rel=0.1)


def published(local: int, layers: int, wide: int, globally: int, heads: int, ff: int) -> BltConfig:
    """A published shape (arXiv 2412.09871, Table 10), with its hash tables and entropy model."""
    stack = StackConfig(local, 1, local // 64, local // 64, int(local * 2.75), 500_000.0, window=512)
    return BltConfig(
        patcher=StackConfig(768, 14, 12, 12, 2048, 10_000.0, window=512),
        encoder=stack,
        decoder=replace(stack, num_layers=layers),
        global_=StackConfig(wide, globally, heads, heads, ff, 500_000.0),
        cross_attn_k=wide // local if wide % local == 0 else 4,
        block_sizes=(4, 8, 16),
    )


ONE_B = published(1024, 9, 2048, 25, 16, 5632)
SEVEN_B = published(1280, 6, 4096, 32, 32, 11008)


def test_what_fits_a_gpu_of_80_gb() -> None:
    """And that docs/training.md says so: bf16 over fp32 weights, recomputation, a sequence of 4,096 bytes at once."""
    settings = {"low": True, "recompute": True, "length": 4096, "patches": 1152}
    decoder = {"freeze": ("encoder", "global"), **settings}
    assert memory(ONE_B, processes=1, **settings).total > 80 * GB  # type: ignore[arg-type]
    assert memory(ONE_B, processes=1, **decoder).total < 60 * GB  # type: ignore[arg-type]
    assert memory(ONE_B, processes=8, **settings).total < 80 * GB  # type: ignore[arg-type]
    assert memory(SEVEN_B, processes=8, **settings).total < 80 * GB  # type: ignore[arg-type]
    table = (ROOT / "docs" / "training.md").read_text()
    for config, name in ((ONE_B, "1B"), (SEVEN_B, "7B")):
        for processes, gpus in ((1, "1 GPU"), (8, "8 GPUs")):
            for options, what in ((settings, "all parts"), (decoder, "`--freeze encoder global`")):
                if name == "7B" and processes == 1 and options is settings:
                    continue
                need = memory(config, processes=processes, **options)  # type: ignore[arg-type]
                parts = (need.weights, need.gradients, need.optimizer, need.gathered, need.activations, need.total)
                assert f"| {name}, {gpus}, {what} | {' | '.join(f'{part / GB:.1f}' for part in parts)} |" in table


def test_shares_add_up() -> None:
    one, eight = (memory(ONE_B, processes=count) for count in (1, 8))
    assert eight.gradients == one.gradients // 8 and eight.optimizer == one.optimizer // 8
    assert one.gathered == 0 < eight.gathered
    assert memory(ONE_B, muon=False).optimizer > one.optimizer > memory(ONE_B, freeze=("global",)).optimizer
