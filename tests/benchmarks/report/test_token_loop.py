from __future__ import annotations

from pathlib import Path

import pytest

from fastblt.benchmarks.report.peers import write_gguf
from fastblt.benchmarks.report.token_loop import measure, token_loop


def test_sequences_together_are_sequences_alone(tmp_path: Path) -> None:
    """The loop gives each sequence its own tokens, so what is timed is what a user would run."""
    for package in ("llama_cpp", "gguf", "tokenizers"):
        pytest.importorskip(package)
    write_gguf(tmp_path / "m.gguf", 4_000_000)
    prompts = [[300, 400, 500], [600, 700, 800, 900, 1000], [1100, 1200]]
    with token_loop(tmp_path / "m.gguf", 3, 64, 1) as together, token_loop(tmp_path / "m.gguf", 1, 64, 1) as alone:
        made = together.complete(prompts, 8)
        assert [len(own) for own in made] == [8, 8, 8]
        assert made == together.complete(prompts, 8) == [alone.complete([prompt], 8)[0] for prompt in prompts]


def test_both_are_timed(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("llama_cpp", "gguf", "tokenizers"):
        pytest.importorskip(package)
    found = measure(model=checkpoint, requests=(2,), prompt_len=16, output_len=16, rounds=1)["requests"]["2"]
    assert all(rate > 0 for rate in found["bytes_per_second"].values())
    assert found["weights_read"]["theirs"] > 0 < found["weights_read"]["blt"]
