"""Widened models compute what the small ones do, whatever the shapes."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastblt.models.config import StackConfig
from fastblt.models.reference import generate
from fastblt.models.reference_selection import SamplingOptions
from fastblt.models.widen import PAPER_PATCHER, SHAPES, Shape, StackShape, paper_shape, widen, widen_checkpoint
from fastblt.server.cli import app
from fastblt.server.settings import PRETRAINED
from tests.tiny import random_ids, tiny_model

TOLERANCE = 1e-4


def wider(rng: random.Random, small: StackConfig, hidden: int, size: int) -> StackShape:
    """A random shape of that width that holds a stack, with heads of `size` channels, as few KV heads as can be."""
    heads = hidden // size
    group = small.num_heads // small.num_kv_heads
    fitting = [
        kv for kv in range(1, heads + 1) if heads % kv == 0 and -(-group // (heads // kv)) * small.num_kv_heads <= kv
    ]
    kv_heads = rng.choice(fitting)
    layers = small.num_layers + rng.randint(0, 3)
    return StackShape(hidden, layers, heads, kv_heads, small.intermediate_size + rng.choice((0, 16, 50)))


def random_shape(rng: random.Random, model: Blt) -> Shape:
    config = model.config
    size = 16 * rng.choice((1, 2, 3))
    local = size * rng.randint(config.encoder.num_heads, config.encoder.num_heads + 3)
    other = local if config.decoder_input == "encoder" else local + size
    # Equal to the patches' width there is no projection, and with one there must not be.
    joined = config.cross_attn_k * config.encoder.hidden_size == config.global_.hidden_size and rng.random() < 0.5
    wide = config.cross_attn_k * local if joined else size * config.global_.num_heads + size * rng.randint(0, 3)
    if not joined and wide == config.cross_attn_k * local:
        wide += size
    patcher = None
    if rng.random() < 0.5:
        patcher = wider(rng, config.patcher, size * (config.patcher.num_heads + 1), size)
    return Shape(
        wider(rng, config.encoder, local, size),
        wider(rng, config.global_, wide, size),
        wider(rng, config.decoder, other, size),
        patcher,
    )


@torch.no_grad()
def difference(small: Blt, wide: Blt, length: int = 80) -> float:
    ids = torch.tensor([random_ids(3, length), random_ids(4, length)])
    expected = small(ids)
    # An entropy next to the threshold may fall on either side; what is compared is the function, not the tie.
    found = wide(ids, expected.starts)
    assert float((found.entropies - expected.entropies).abs().max()) < TOLERANCE
    return float((found.logits - expected.logits).abs().max())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), decoder_input=st.sampled_from(("encoder", "embedding")))
def test_logits_are_equal_at_any_shape(seed: int, decoder_input: str) -> None:
    rng = random.Random(seed)
    small = tiny_model(seed, decoder_input=decoder_input, block_sizes=(4, 8))
    shape = random_shape(rng, small)
    wide = widen(small, shape)
    assert wide.config.global_.num_layers == shape.global_.num_layers
    assert wide.lm_head.weight.shape[1] == shape.decoder.hidden_size
    assert difference(small, wide) < TOLERANCE


@pytest.mark.parametrize("method", ["blt", "blt-s", "blt-dv", "blt-d"])
@pytest.mark.parametrize("decoder_input", ["encoder", "embedding"])
def test_greedy_bytes_are_equal_by_every_method(method: str, decoder_input: str) -> None:
    small = tiny_model(7, decoder_input=decoder_input, block_sizes=(4, 8))
    wide = widen(small, random_shape(random.Random(5), small))
    prompt = random_ids(1, 24)
    one = generate(small, prompt, SamplingOptions(max_tokens=16), method)
    other = generate(wide, prompt, SamplingOptions(max_tokens=16), method)
    assert len(one.ids) == 16
    assert other.ids == one.ids
    assert (other.nfe, other.accepted, other.drafted) == (one.nfe, one.accepted, one.drafted)


def test_shipped_checkpoint_at_four_times_its_width() -> None:
    small = load_checkpoint(PRETRAINED)
    shape = Shape(StackShape(256, 1, 4, 4, 704), StackShape(512, 6, 8, 8, 1408), StackShape(256, 9, 4, 4, 704), None)
    assert difference(small, widen(small, shape)) < TOLERANCE


def test_weights_that_a_pass_reads_are_those_of_the_paper() -> None:
    """The counts that follow from the passes and gigabytes in the paper's tables; the [MASK] table is not among
    them."""
    wanted = {"1b": (157_852_672, 1_304_014_848), "3b": (159_949_824, 2_844_442_624)}
    small = load_checkpoint(PRETRAINED).config
    for name in wanted:
        shape = SHAPES[name]
        stacks = {
            field: replace(getattr(small, field), **vars(getattr(shape, field)))
            for field in ("encoder", "global_", "decoder")
        }
        counts = ModuleParameters.of(replace(small, **stacks))
        assert (counts.decoder, counts.encoder + counts.global_) == wanted[name]
    assert paper_shape("1b", patcher=True).patcher == PAPER_PATCHER


def test_folder_holds_the_same_model(tmp_path: Path) -> None:
    small = tiny_model(11, decoder_input="encoder", block_sizes=(4, 8))
    shape = random_shape(random.Random(2), small)
    save_checkpoint(small, tmp_path / "small")
    config = widen_checkpoint(tmp_path / "small", tmp_path / "wide", shape)
    loaded, wide = load_checkpoint(tmp_path / "wide"), widen(small, shape)
    assert loaded.config == config == wide.config
    for name, tensor in wide.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_narrow_weights_compute_nearly_the_same(weights: str, tmp_path: Path) -> None:
    small = load_checkpoint(PRETRAINED)
    shape = Shape(StackShape(512, 1, 4, 4, 704), StackShape(1024, 5, 8, 4, 1408), StackShape(512, 5, 4, 4, 704), None)
    wide = widen(small, shape, weights)
    assert wide.lm_head.weights.storage == ("float32" if weights == "float32" else "bfloat16")
    ids = torch.tensor([random_ids(3, 60)])
    with torch.inference_mode():
        expected = small(ids)
        found = wide(ids, expected.starts).logits
    error = float((found - expected.logits).norm() / expected.logits.norm())
    # The shipped weights are bf16, and so are those of a shape with heads four times as wide.
    assert error < (0.05 if weights == "int8" else 1e-5)
    if weights == "bfloat16":
        save = tmp_path / "wide"
        widen_checkpoint(PRETRAINED, save, shape, torch.bfloat16)
        with torch.inference_mode():
            assert torch.equal(load_checkpoint(save, weights="auto")(ids, expected.starts).logits, found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 16, "num_heads": 1, "num_kv_heads": 1}, "less than the 32"),
        ({"hidden_size": 64, "num_heads": 8}, "choose a multiple of 16"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"intermediate_size": 8}, "intermediate_size is 8"),
    ],
)
def test_shapes_that_cannot_hold_the_model_are_refused(change: dict[str, int], message: str) -> None:
    small = tiny_model(0, decoder_input="embedding", block_sizes=(4, 8))
    config = small.config
    stacks = {
        field: StackShape(*(getattr(getattr(config, field), part) for part in StackShape.__dataclass_fields__))
        for field in ("encoder", "global_", "decoder")
    }
    base = StackShape(32, config.patcher.num_layers, 2, 2, config.patcher.intermediate_size)
    shape = Shape(**stacks, patcher=replace(base, **change))
    with pytest.raises(ValueError, match=message):
        widen(small, shape)


def test_command_answers_in_one_line(tmp_path: Path) -> None:
    runner = CliRunner()
    refused = runner.invoke(app, ["widen", str(PRETRAINED), str(tmp_path), "--shape", "9b"])
    assert refused.exit_code == 1 and "there are 1b, 3b, 7b" in refused.output
    with pytest.raises(CheckpointError, match="choose another folder"):
        widen_checkpoint(PRETRAINED, PRETRAINED, SHAPES["1b"])
