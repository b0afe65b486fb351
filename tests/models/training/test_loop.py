"""The loop: repeatable, resumable after a kill with any number of processes, and its schedule and optimizer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastblt.models.checkpoint import load_checkpoint, save_checkpoint
from fastblt.models.training.data import rows
from fastblt.models.training.loop import LoopConfig
from fastblt.models.training.optimizer import Optimizer, OptimizerConfig
from fastblt.models.training.state import Length, Saved
from fastblt.models.training.train import main
from tests.models.training.toys import toy_model

ROOT = Path(__file__).parents[3]
STEPS, SAVED = 3, 1
SETTINGS = ("--length", "256", "--steps", str(STEPS), "--save-steps", str(SAVED), "--log-steps", "1", "--no-compile")
SETTINGS += ("--micro-batches", "6", "--batch", "1", "--held-out", "0.3", "--keep", "0.5", "--distill", "1")

#: Runs the command, and is killed, as if by the machine, right after a save. Layers are gathered one by one, as in
#: large models are.
DYING = f"""
import os, signal
from fastblt.models.training import recipe, state
recipe.LARGE = 0
from fastblt.models.training.train import main
saving = state.save
def save(folder, tensors, length, world):
    saving(folder, tensors, length, world)
    if length.steps == {SAVED}:
        os.kill(os.getpid(), signal.SIGKILL)
state.save = save
main()
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a run: a plain BLT without a diffusion head, and text for it."""
    folder = tmp_path_factory.mktemp("start")
    model = toy_model(max_patch_length=None, block_sizes=())
    model.config = replace(model.config, patching_threshold=5.2)
    save_checkpoint(model, folder / "start")
    return ("--from", str(folder / "start"), "--text", str(ROOT / "models" / "training"), *SETTINGS)


def test_a_run_that_diverges_ends(
    begun: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Optimizer.step

    def diverges(self: Optimizer, scale: float) -> float:
        return step(self, scale * 1e38)

    monkeypatch.setattr(Optimizer, "step", diverges)
    assert main([*begun, "--work", str(tmp_path)]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert "is no number any more; begin again with lower rates" in last


def in_processes(count: int, options: tuple[str, ...], work: Path, script: str = "") -> subprocess.Popen[bytes]:
    path = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    program = ["-m", "fastblt.models.training.train"]
    if script:
        (work.parent / "script.py").write_text(script)
        program = [str(work.parent / "script.py")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(launcher if count > 1 else []), *program, *options, "--work", str(work)]
    # The launcher has -m of its own, and takes a script by its path.
    return subprocess.Popen(command, env=path, cwd=ROOT, stdout=subprocess.DEVNULL)


def curve(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "blt" / "curve.jsonl").read_text().splitlines()]


def test_any_number_of_processes_trains_alike_and_goes_on_from_any_other(
    begun: tuple[str, ...], tmp_path: Path
) -> None:
    """One process; and two that are killed, after which three go on."""
    one, killed = tmp_path / "one", tmp_path / "killed"
    reference = in_processes(1, begun, one)
    assert in_processes(2, begun, killed, DYING).wait(200) != 0
    assert reference.wait(200) == 0
    assert Length.read(killed / "blt").steps == SAVED
    assert in_processes(3, begun, killed).wait(200) == 0
    assert [row["step"] for row in curve(killed)] == list(range(1, STEPS + 1))
    for ours, theirs in zip(curve(killed), curve(one), strict=True):
        for name in ("bits", "drift", "masked", "loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    files = sorted(path.suffix for path in killed.rglob("state-*/*"))
    assert files == [".safetensors"] * 3
    whole = Saved(killed / "blt")
    for name in whole.names():
        assert torch.isfinite(whole.whole(name)).all()
    served = load_checkpoint(killed / "checkpoint")
    assert served.config.block_sizes == (4, 8, 16) and served.config.max_patch_length is None


def test_a_killed_run_goes_on_bit_for_bit(begun: tuple[str, ...], tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    reference = in_processes(1, begun, whole)
    assert in_processes(1, begun, killed, DYING).wait(200) == -signal.SIGKILL
    assert in_processes(1, begun, killed).wait(200) == 0
    assert reference.wait(200) == 0
    one, other = (Saved(work / "blt") for work in (killed, whole))
    assert sorted(one.names()) == sorted(other.names())
    assert all(torch.equal(one.whole(name), other.whole(name)) for name in one.names())
    losses = [[row["loss"] for row in curve(work)] for work in (killed, whole)]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]


def test_a_stopped_run_is_exported_and_goes_on(begun: tuple[str, ...], tmp_path: Path) -> None:
    work = tmp_path / "run"
    options = [*begun, "--work", str(work)]
    assert main([*options, "--stop-after", "1"]) == 0
    stopped = Length.read(work / "blt")
    assert stopped.steps == 1 and stopped.processor_seconds > 0
    assert json.loads((work / "checkpoint" / "training.json").read_text())["runs"][-1]["steps"] == 1
    assert main(options) == 0
    assert Length.read(work / "blt").steps == STEPS
    assert Length.read(work / "blt").processor_seconds > stopped.processor_seconds
    assert [row["progress"] for row in curve(work)] == [0.0, 0.33333, 0.66667]


def test_a_state_of_other_parts_is_refused(
    begun: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*begun, "--work", str(tmp_path / "run")]
    assert main([*options, "--stop-after", "1", "--freeze", "global"]) == 0
    capsys.readouterr()
    assert main(options) == 1
    assert capsys.readouterr().err.endswith("has a run that trained other parts; name another --work\n")


def test_what_is_frozen_stays(begun: tuple[str, ...], tmp_path: Path) -> None:
    """Bit for bit. The decoder is trained."""
    work = tmp_path / "run"
    options = [*begun, "--work", str(work), "--stop-after", "2", "--freeze", "global", "encoder"]
    assert main([*options, "--scale-lr", "decoder=0.5"]) == 0
    before = load_file(Path(begun[1]) / "model.safetensors")
    after = load_file(work / "checkpoint" / "model.safetensors")
    changed = {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith(("model.local_decoder.", "lm_head.")) for name in changed), changed


def test_bf16_over_fp32_weights_trains_alike(begun: tuple[str, ...], tmp_path: Path) -> None:
    """Also where activations are computed twice. The state is fp32."""
    assert main([*begun, "--work", str(tmp_path / "low"), "--dtype", "bfloat16", "--recompute"]) == 0
    assert main([*begun, "--work", str(tmp_path / "one")]) == 0
    for ours, theirs in zip(curve(tmp_path / "low"), curve(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["loss"] != theirs["loss"]
    saved = Saved(tmp_path / "low" / "blt")
    assert {saved.whole(name).dtype for name in saved.names()} == {torch.float32}


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


@pytest.mark.parametrize("muon_lr", [0.02, 0.0])
def test_every_parameter_is_updated_by_one_optimizer(muon_lr: float) -> None:
    model = toy_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = Optimizer(model, OptimizerConfig(muon_lr=muon_lr))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0)
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    kinds = {name.split(".")[0] for name, _ in optimizer.state()}
    assert kinds == {"exp_avg", "exp_avg_sq", "step"} | ({"momentum_buffer"} if muon_lr else set())


def test_a_part_has_a_rate_of_its_own() -> None:
    """Rates of zero leave a part as it is, decay included."""
    model = toy_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = Optimizer(model, OptimizerConfig(parts={"global": 0.0, "encoder": 0.0}))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0)
    same = {name.split(".")[0] for name, one in model.named_parameters() if torch.equal(one, before[name])}
    assert same == {"global_transformer", "local_encoder", "encoder_hash_tok_embedding"}
