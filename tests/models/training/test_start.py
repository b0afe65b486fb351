"""From a checkpoint of `transformers` to one that serves every method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastblt.benchmarks.harness import complete, start, whole_length
from fastblt.benchmarks.settings import decoding
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint, save_checkpoint
from fastblt.models.training.objective import Objective, make_batch
from fastblt.models.training.optimizer import trained
from fastblt.models.training.start import begin
from fastblt.models.training.train import main
from fastblt.models.vocabulary import MASK_ID, encode, with_bos
from tests.models.training.toys import LAYOUT, toy_batch, toy_model, toy_sequences
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[3]


def folder_of_transformers(folder: Path) -> Path:
    from transformers import BltConfig, BltForCausalLM

    torch.manual_seed(0)
    sub = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    local = {**sub, "hidden_size_global": 64}
    config = BltConfig(
        patcher_config=sub,
        encoder_config=local,
        decoder_config=local,
        global_config={**sub, "hidden_size": 64},
        encoder_hash_byte_group_vocab=97,
        patching_threshold=5.3,
    )
    BltForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_random_folder_of_transformers_becomes_a_blt_d(tmp_path: Path) -> None:
    """It serves every method, drafts without loss, and is still a checkpoint of `transformers`."""
    from transformers import BltForCausalLM

    source = folder_of_transformers(tmp_path / "source")
    options = ["--from", str(source), "--text", str(ROOT / "docs" / "*.md"), "--held-out", "0.3", "--no-compile"]
    options += ["--work", str(tmp_path / "work"), "--length", "256", "--steps", "2", "--batch", "1"]
    assert main(options) == 0
    model = load_checkpoint(tmp_path / "work" / "checkpoint")
    assert model.config.block_sizes == (4, 8, 16)
    engine = start(model, requests=8)
    prompts = [with_bos(encode(b"def f(x):\n    return "))]
    written = {
        name: complete(engine, prompts, [whole_length(decoding(name), 12)])[0].ids
        for name in ("blt", "blt-s k4", "blt-dv-4 1step", "blt-dsv-4 k16", "blt-d-8 a0.7")
    }
    assert all(len(ids) == 12 for ids in written.values())
    assert written["blt"] == written["blt-s k4"] == written["blt-dv-4 1step"] == written["blt-dsv-4 k16"]
    theirs = BltForCausalLM.from_pretrained(tmp_path / "work" / "checkpoint", dtype=torch.float32).eval()
    ids = torch.tensor([with_bos(encode(b"import os, sys"))])
    ours = model.float()(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids, use_cache=False).logits.float(), ours, atol=1e-4, rtol=1e-4)


def test_a_new_head_changes_no_causal_logit(tmp_path: Path) -> None:
    save_checkpoint(toy_model(block_sizes=()), tmp_path / "start")
    ids, starts = toy_sequences()
    before = load_checkpoint(tmp_path / "start")(torch.from_numpy(ids), torch.from_numpy(starts)).logits
    model, teacher = begin(tmp_path / "start", (4, 8), ["global"], teach=True)
    assert teacher is not None
    assert teacher.global_transformer is model.global_transformer
    assert teacher.local_decoder is not model.local_decoder
    objective = Objective(model, ids.shape[1], keep=0.5, teacher=teacher)
    batch = toy_batch(ids, starts, [4, 8])
    clean, _ = objective.logits(batch)
    torch.testing.assert_close(clean, before, atol=1e-4, rtol=1e-4)
    _, figures = objective.loss(batch)
    assert abs(float(figures["drift"])) < 1e-5
    names = {name.split(".")[0] for name, _ in trained(objective)}
    assert names == {"encoder_hash_tok_embedding", "local_encoder", "local_decoder", "lm_head"}


def test_the_drift_is_the_divergence_from_the_start(tmp_path: Path) -> None:
    save_checkpoint(toy_model(), tmp_path / "start")
    ids, starts = toy_sequences()
    model, teacher = begin(tmp_path / "start", (4, 8), [], teach=True)
    with torch.no_grad():
        model.lm_head.weight *= 1.3
    batch = toy_batch(ids, starts, [4, 8])
    objective = Objective(model, ids.shape[1], masked_weight=0.0, keep=1.0, teacher=teacher)
    loss, figures = objective.loss(batch)
    ours, theirs = (
        torch.log_softmax(one(torch.from_numpy(ids), torch.from_numpy(starts)).logits[:, :-1], -1)
        for one in (model, load_checkpoint(tmp_path / "start"))
    )
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert float(figures["drift"].detach()) == pytest.approx(float(divergence), rel=1e-3)
    assert float(loss.detach()) == pytest.approx(float(-(theirs.exp() * ours).sum(-1).mean()), rel=1e-4)


def test_a_table_that_the_decoder_uses_stays(tmp_path: Path) -> None:
    """Only [MASK] is new in it."""
    before = toy_model(block_sizes=(), decoder_input="embedding")
    save_checkpoint(before, tmp_path / "start")
    one, other = (begin(tmp_path / "start", (4,), [], seed=seed)[0] for seed in (0, 1))
    tables = [model.local_decoder.embed_tokens.weight for model in (before, one, other)]
    assert all(torch.equal(table[:MASK_ID], tables[0][:MASK_ID]) for table in tables)
    assert not torch.equal(tables[1][MASK_ID], tables[2][MASK_ID])


@pytest.mark.parametrize("seed", range(6))
def test_every_shape_that_is_served_can_be_trained(seed: int, tmp_path: Path) -> None:
    """Windows or none, patches of any length, grouped heads, more encoder layers: as the model's own pass has it."""
    model: Blt = tiny_model(seed)
    save_checkpoint(model, tmp_path / "start")
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, 260, (2, 256))
    ids[:, 0] = 1
    learner, _ = begin(tmp_path / "start", (4, 8, 16), [])
    starts = rng.random((2, 257)) < 0.2
    starts[:, :2] = True
    longest = model.config.max_patch_length
    for row in starts:
        for at in range(2, 257):
            row[at] |= longest is not None and not row[max(0, at - longest + 1) : at + 1].any()
    layout = replace(LAYOUT, max_patch_length=longest, forced_starts=0.3)
    batch = make_batch(ids, starts, np.full(2, 0.5), np.array([4, 16]), layout, rng)
    objective = Objective(learner, 256)
    clean, _ = objective.logits(batch)
    plain = model(torch.from_numpy(ids), torch.from_numpy(starts)).logits
    torch.testing.assert_close(clean, plain, atol=1e-3, rtol=1e-3)
    loss, _ = objective.loss(batch)
    loss.backward()
    table = learner.local_decoder.embed_tokens.weight
    assert table.grad is not None and float(table.grad[MASK_ID].abs().sum()) > 0
