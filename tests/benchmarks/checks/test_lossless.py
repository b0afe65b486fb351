from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastblt.benchmarks.checks.lossless import GREEDY, SAMPLED, app, compare, drafting_settings, tally
from fastblt.benchmarks.harness import Output
from fastblt.kernels.cpu.decoder_steps import Decoded, DecoderSteps, Plans
from fastblt.models.blt import Blt
from fastblt.server.engine.device.forward import ModuleForward
from fastblt.server.engine.runner import sampler
from fastblt.server.request import FinishReason


@pytest.mark.parametrize("parameters", [GREEDY, {name: SAMPLED[name] for name in ("penalties", "ends")}])
def test_drafting_equals_blt(model: Blt, prompts: list[list[int]], parameters: dict[str, dict[str, Any]]) -> None:
    tallies = compare(model, dict(enumerate(prompts[:2])), 12, parameters)
    assert list(tallies) == list(drafting_settings(model.config.block_sizes))
    for name, own in tallies.items():
        assert not own.differences, name
        assert own.outputs == 2 * len(parameters)
    if parameters is GREEDY:
        assert {own.bytes for own in tallies.values()} == {24}


def test_a_method_that_takes_every_draft_is_found_out(
    model: Blt, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "verify", lambda targets, drafts, lengths: (lengths, targets[:, 0]))
    decode_steps = ModuleForward.decode_steps

    def takes_all(forward: ModuleForward, call: DecoderSteps, plans: Plans, **kinds: bool) -> Decoded:
        decoded = decode_steps(forward, call, plans, **kinds)
        selects = plans.column("selects")
        decoded.accepted = [max(selected - 1, 0) for selected in selects]
        # Who has no row that gives a byte asked for the draft alone.
        decoded.lines = [-1 if select else line for select, line in zip(selects, decoded.lines, strict=True)]
        return decoded

    monkeypatch.setattr(ModuleForward, "decode_steps", takes_all)
    # The bytes committed are the verification's own, each right only where those before it were.
    tallies = compare(model, dict(enumerate(prompts)), 16, GREEDY)
    assert sum(len(own.differences) for own in tallies.values()) > 10
    assert all(0 < one.position < 16 for own in tallies.values() for one in own.differences)


def test_an_error_is_a_difference() -> None:
    jobs = [(0, "greedy", "blt"), (0, "greedy", "blt-s k4"), (0, "greedy", "blt-s k8")]
    whole = Output([5, 6], finish_reason=FinishReason.LENGTH)
    broken = Output([5, 6], finish_reason=FinishReason.ERROR, error="broken")
    tallies = tally(jobs, [whole, whole, broken])
    assert [len(own.differences) for own in tallies.values()] == [0, 1]


def test_the_command(checkpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "lossless.json"
    sizes = ["--prompts", "2", "--sampled", "0", "--prompt-length", "24", "--length", "8", "--processes", "1"]
    answer = CliRunner().invoke(app, ["--model", checkpoint, *sizes, "--json", str(file)])
    assert answer.exit_code == 0, answer.output
    rows = json.loads(file.read_text())["greedy"]
    assert rows["blt-dv-8 1step"] == {"outputs": 2, "bytes": 16, "differences": []}
