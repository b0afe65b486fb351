"""What holds of the shipped checkpoint, whichever run made it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from fastblt.benchmarks.checkpoint.tables import drafters, held_out_chunks
from fastblt.benchmarks.harness import complete
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.savings.batches import engine_of
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.config import SAMPLED
from fastblt.models.patching import PatchRule
from fastblt.models.training.entropy import measure, patch_starts
from fastblt.models.training.evaluate import leak_check
from fastblt.models.training.layout import Start
from fastblt.models.vocabulary import EOS_ID, NEVER_PRODUCED
from fastblt.server.request import SamplingParams
from fastblt.server.settings import PRETRAINED

PROMPTS, BYTES = 20, 64
#: Rows in which the two best bytes are nearer than this may fall either way on another machine.
NEAR = 1e-4


@pytest.fixture(scope="module")
def model() -> Blt:
    return load_checkpoint(PRETRAINED)


def test_transformers_gives_the_same_greedy_bytes(model: Blt) -> None:
    """Row by row: its argmax after each prefix of prompt and answer is the answer's next byte.

    One byte more stands behind them, for with a maximum patch length its last row drops the patch that the next byte
    would start.
    """
    theirs = transformers.BltForCausalLM.from_pretrained(PRETRAINED, dtype=torch.float32).eval()
    prompts = held_out_prompts(PROMPTS, 128)
    params = [SamplingParams(max_tokens=BYTES, temperature=0.0, ignore_eos=True) for _ in prompts]
    outputs = complete(engine_of(model, prompts, BYTES), prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output.ids) == BYTES
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + output.ids + [10]]), use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -2]
        rows[:, [*NEVER_PRODUCED, EOS_ID]] = float("-inf")
        found, best = rows.argmax(-1), rows.topk(2).values
        differs = found != torch.tensor(output.ids)
        assert (best[differs, 0] - best[differs, 1] < NEAR).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_training_and_inference_predict_alike(model: Blt, size: int) -> None:
    """Masked accuracy over the same blocks, latents and t within two points, whatever the start."""
    ids = held_out_chunks()[::150, :384]
    rule = PatchRule(model.config.patching_threshold, model.config.max_patch_length)
    starts = patch_starts(measure(model.patcher, model.config.patcher, ids)[0], rule)
    for kind in Start:
        leak = leak_check(model, ids, starts, kind, size, blocks=4)
        assert leak.asked > 5
        assert abs(leak.trained - leak.served) <= 0.02 * leak.asked
        assert leak.largest < 1e-3


def test_its_folder(model: Blt) -> None:
    assert (PRETRAINED / "model.safetensors").stat().st_size <= 25_000_000
    one_pass = {drafter.name for drafter in drafters(model.config.block_sizes) if not drafter.paper}
    settings = one_pass | {"blt-s k32", "blt-dsv-4 k32", "blt-dsv-8 k32"}
    assert set(model.config.acceptance) == settings | {name + SAMPLED for name in settings}
    assert all(0 < acceptance <= 1 for acceptance in model.config.acceptance.values())
    assert np.isfinite(model.config.patching_threshold)


def test_a_model_is_made_without_torch_s_compiler() -> None:
    """Its import takes seconds, which every start would take longer."""
    code = (
        "import sys; from fastblt.models.checkpoint import load_checkpoint; "
        "from fastblt.server.engine.engine import Engine; from fastblt.server.settings import *; "
        "Engine(load_checkpoint(PRETRAINED), EngineSettings(cache_bytes=2**26)).calibrate(); "
        "assert 'torch' in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
