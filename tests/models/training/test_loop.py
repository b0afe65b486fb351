"""The loop: repeatable, resumable after a kill, and its schedule and optimizer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastblt.models.training.data import rows, save_array
from fastblt.models.training.loop import Length, LoopConfig, train
from fastblt.models.training.optimizer import Optimizer, OptimizerConfig, orthogonalize
from fastblt.models.training.recipe import BltTask
from tests.models.training.toys import LAYOUT, LENGTH, toy_config, toy_model

ROOT = Path(__file__).parents[3]
STEPS, SAVED = 6, 3


class DyingTask(BltTask):
    """Is killed, as if by the machine, right after a save."""

    def checkpoint(self, step: int, progress: float) -> None:
        if step == SAVED and "DIE" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, processes: int) -> None:
    config = toy_config().with_patching(threshold=5.0)
    patcher = toy_model().patcher.state_dict()
    loop = LoopConfig(
        folder / "run", steps=STEPS, warmup_steps=2, processes=processes, compile=False, log_every=1, save_steps=SAVED
    )
    train(loop, DyingTask, config, patcher, folder, LAYOUT, 1, 0.5, 0)


def in_a_process(folder: Path, processes: int, **environment: str) -> subprocess.Popen[bytes]:
    # The second process imports the script again, so all of it stands under a guard.
    lines = (
        "if __name__ == '__main__':",
        "    from pathlib import Path",
        "    from tests.models.training.test_loop import run",
        f"    run(Path({str(folder)!r}), {processes})",
    )
    script = folder / "script.py"
    script.write_text("\n".join(lines) + "\n")
    path = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
        "OMP_WAIT_POLICY": "passive",
        **environment,
    }
    return subprocess.Popen([sys.executable, str(script)], env=path, cwd=ROOT)


def prepare(folder: Path) -> None:
    folder.mkdir()
    save_array(folder / "train.npy", np.random.default_rng(0).integers(4, 260, (12, LENGTH)).astype(np.uint16))


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    processes = 2
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    prepare(killed)
    prepare(whole)
    reference = in_a_process(whole, processes)
    assert in_a_process(killed, processes, DIE="1").wait(200) == -signal.SIGKILL
    assert in_a_process(killed, processes).wait(200) == 0
    assert reference.wait(200) == 0
    one, other = (load_file(folder / "run" / "state.safetensors") for folder in (killed, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [
        [line.split('"bits"')[1] for line in (folder / "run" / "curve.jsonl").read_text().splitlines()]
        for folder in (killed, whole)
    ]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]


def test_a_stopped_run_is_the_beginning_of_a_whole_one(tmp_path: Path) -> None:
    prepare(tmp_path / "run")
    config = toy_config().with_patching(threshold=5.0)
    loop = LoopConfig(tmp_path / "run", steps=5, warmup_steps=2, processes=1, compile=False, log_every=1)
    make = (BltTask, config, toy_model().patcher.state_dict(), tmp_path / "run", LAYOUT, 1, 0.5, 0)
    train(replace(loop, stop_after=2), *make)
    state = tmp_path / "run" / "state.safetensors"
    with safe_open(state, "pt") as file:
        stopped = Length.read(file.metadata())
    assert stopped.steps == 2
    assert stopped.processor_seconds > 0
    train(loop, *make)
    with safe_open(state, "pt") as file:
        whole = Length.read(file.metadata())
    assert whole.steps == 5
    assert whole.processor_seconds > stopped.processor_seconds
    rows = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert [row["progress"] for row in rows] == [0.0, 0.2, 0.4, 0.6, 0.8]


def test_schedule() -> None:
    config = LoopConfig(Path(), warmup_steps=10, hold=0.5, final_scale=0.1)
    assert config.scale(0, 0.0) == pytest.approx(0.1)
    assert config.scale(9, 0.2) == 1.0
    assert config.scale(100, 0.5) == 1.0
    assert config.scale(100, 0.75) == pytest.approx(0.55)
    assert config.scale(100, 1.0) == pytest.approx(0.1)
    assert config.scale(100, 1.2) == pytest.approx(0.1)


def test_every_epoch_reads_every_row_once() -> None:
    seen = [row for step in range(6) for rank in range(2) for row in rows(12, step, rank, 2, 2, seed=0)]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (1, 32, 32)])
def test_orthogonalize(shape: tuple[int, int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_every_parameter_is_updated() -> None:
    model = toy_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = Optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0)
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
