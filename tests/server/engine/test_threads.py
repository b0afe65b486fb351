"""Threads share a pass's requests, and change nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastblt.benchmarks.harness import complete
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.savings.batches import engine_of
from fastblt.benchmarks.settings import decoding
from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.threads import cores, set_threads, threads
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.request import SamplingParams
from fastblt.server.settings import PRETRAINED

METHODS = [decoding(name) for name in ("blt", "blt-s k8", "blt-dv-8 1step", "blt-d-8 a0.7")]


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 3), ("150000 100000", 2), ("50000 100000", 1), ("800000 100000", 3), ("", 3)]
)
def test_cores_within_a_quota(tmp_path: Path, quota: str, expected: int) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert cores(tmp_path / "cpu.max") == expected
        assert cores(tmp_path / "nowhere") == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(library() is None, reason="no C compiler")
def test_bytes_do_not_depend_on_threads() -> None:
    model = load_checkpoint(str(PRETRAINED))
    prompts = held_out_prompts(24, 200)
    params = [
        SamplingParams(
            max_tokens=24, temperature=0.7 * (at % 2), seed=at, ignore_eos=True, decoding=METHODS[at % len(METHODS)]
        )
        for at in range(len(prompts))
    ]
    texts = {}
    try:
        for count in (1, 2, 5):
            engine = engine_of(model, prompts, 24, threads=count)
            assert threads() == count and torch.get_num_threads() == 1, "a small model's operations stay whole"
            texts[count] = [output.ids for output in complete(engine, prompts, params)]
    finally:
        set_threads(None)
    assert texts[1] == texts[2] == texts[5]
