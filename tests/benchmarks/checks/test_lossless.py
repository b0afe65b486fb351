from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastblt.benchmarks.checks import lossless
from fastblt.benchmarks.checks.lossless import GREEDY, SAMPLED, compare, drafting_settings
from fastblt.kernels.cpu.decoder_steps import Decoded, DecoderSteps, Plans
from fastblt.models.blt import Blt
from fastblt.server.engine.device.forward import ModuleForward
from fastblt.server.engine.runner import sampler


@pytest.mark.parametrize("parameters", [GREEDY, {name: SAMPLED[name] for name in ("penalties", "ends")}])
def test_drafting_equals_blt(model: Blt, prompts: list[list[int]], parameters: dict[str, dict[str, Any]]) -> None:
    tallies = compare(model, dict(enumerate(prompts[:2])), 12, parameters)
    assert list(tallies) == list(drafting_settings(model.config.block_sizes))
    for name, tally in tallies.items():
        assert not tally.differences, name
        assert tally.outputs == 2 * len(parameters)
    if parameters is GREEDY:
        assert {tally.bytes for tally in tallies.values()} == {24}


def test_a_method_that_takes_every_draft_is_found_out(
    model: Blt, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "verify", lambda targets, drafts, lengths: (lengths, targets[:, 0]))
    decode_steps = ModuleForward.decode_steps

    def takes_all(forward: ModuleForward, call: DecoderSteps, plans: Plans, **kinds: bool) -> Decoded:
        decoded = decode_steps(forward, call, plans, **kinds)
        decoded.accepted = [max(selected - 1, 0) for selected in plans.column("selects")]
        decoded.lines = [-1] * len(decoded.lines)
        return decoded

    monkeypatch.setattr(ModuleForward, "decode_steps", takes_all)
    # The bytes committed are the verification's own, each right only where those before it were.
    tallies = compare(model, dict(enumerate(prompts)), 16, GREEDY)
    assert sum(len(tally.differences) for tally in tallies.values()) > 10
    assert all(0 < one.position < 16 for tally in tallies.values() for one in tally.differences)


def test_an_error_is_a_difference() -> None:
    jobs = [(0, "greedy", "blt"), (0, "greedy", "blt-s k4"), (0, "greedy", "blt-s k8")]
    ends: list[tuple[str, object]] = [("length", None), ("length", None), ("error", "broken")]
    tallies = lossless._compare(["blt", "blt-s k4", "blt-s k8"], jobs, [[5, 6]] * 3, ends)
    assert [len(tally.differences) for tally in tallies.values()] == [0, 1]


def test_the_command(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lossless.json"
    sizes = ["--prompts", "2", "--sampled", "0", "--prompt-length", "24", "--bytes", "8", "--processes", "1"]
    monkeypatch.setattr("sys.argv", ["lossless", "--model", checkpoint, *sizes, "--json", str(file)])
    with pytest.raises(SystemExit) as end:
        lossless.main()
    assert not end.value.code
    rows = json.loads(file.read_text())["greedy"]
    assert rows["blt-dv-8 1step"] == {"outputs": 2, "bytes": 16, "differences": []}
