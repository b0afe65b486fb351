"""Parity with `transformers`' BltForCausalLM, from checkpoints that it saved and to those that it reads."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint, save_checkpoint
from fastblt.models.reference import generate, patch_margins
from fastblt.models.reference_selection import SamplingOptions
from tests.tiny import random_ids, tiny_model

transformers = pytest.importorskip("transformers")

CONFIGS = 14
NEW_BYTES = 64
TOLERANCE = 1e-4
FORBIDDEN = [0, 1, 2, 3]


@dataclass
class Pair:
    """One checkpoint as `transformers` and as we run it."""

    theirs: Any
    ours: Blt
    folder: Path
    window: int

    def prompts(self) -> list[list[int]]:
        """One shorter and one longer than the windows."""
        return [random_ids(1, max(2, self.window // 2)), random_ids(2, 2 * self.window + 5)]


def shape(index: int) -> dict[str, Any]:
    """A random configuration of `transformers`; the index makes sure that every feature is there several times."""
    rng = random.Random(index)
    k = (1, 2, 4)[index % 3]
    local, window = rng.choice((32, 48)), rng.choice((8, 13))

    def stack(hidden: int, layers: int, **more: Any) -> dict[str, Any]:
        heads = hidden // 8
        kv_heads = rng.choice([n for n in range(1, heads + 1) if heads % n == 0] + [None])
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": rng.choice((32, 96))}
        return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}

    # Where the width of k latents is not the global one there is a projection, as in the 7B.
    wide = local * k if index % 2 else 80
    return {
        "patcher_config": stack(32, rng.randint(1, 2), sliding_window=(window, 5, None)[index % 3]),
        "encoder_config": stack(
            local, 1 + index % 3, hidden_size_global=wide, cross_attn_k=k, cross_attn_all_layers=index % 4 == 1
        ),
        "decoder_config": stack(
            local, rng.randint(1, 3), hidden_size_global=wide, cross_attn_k=k, cross_attn_all_layers=index % 3 != 0
        ),
        "global_config": stack(wide, rng.randint(1, 2)),
        "cross_attn_k": k,
        "encoder_hash_byte_group_size": [[3, 4, 5, 6, 7, 8], [2, 5], [4]][rng.randrange(3)],
        "encoder_hash_byte_group_vocab": rng.choice((50, 127)),
        "encoder_hash_byte_group_nb_functions": 1 + index % 3,
        "local_attention_window_len": None if index == 5 else window,
    }


def make_theirs(index: int) -> tuple[Any, int]:
    """A random model with uneven gains and confident heads, and its window."""
    torch.manual_seed(index)
    fields = shape(index)
    model = transformers.BltForCausalLM(transformers.BltConfig(**fields)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += 0.2 * torch.randn_like(weight)
            elif "lm_head" in name:
                weight *= 3.0
    return model, fields["local_attention_window_len"] or 8


def mid_gap(values: Tensor) -> float:
    """A threshold between two neighbors of the sorted entropies, the widest gap near the upper third."""
    ordered = values.flatten().sort().values
    middle = 2 * len(ordered) // 3
    at = max(range(middle - 3, middle + 4), key=lambda i: float(ordered[i + 1] - ordered[i]))
    return float(ordered[at] + ordered[at + 1]) / 2


@pytest.fixture(scope="module", params=range(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    theirs, window = make_theirs(request.param)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    pair = Pair(theirs, load_checkpoint(folder), folder, window)
    with torch.no_grad():
        found = torch.cat([pair.ours(torch.tensor([ids])).entropies[0, 1:] for ids in pair.prompts()])
    theirs.config.patching_threshold = mid_gap(found)
    theirs.save_pretrained(folder)
    return Pair(transformers.BltForCausalLM.from_pretrained(folder).eval(), load_checkpoint(folder), folder, window)


def their_logits(model: Any, ids: list[int], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False, **more).logits[0]


def their_greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW_BYTES):
        row = their_logits(model, ids)[-1]
        row[FORBIDDEN] = float("-inf")
        ids.append(int(row.argmax()))
    return ids[len(prompt) :]


def test_logits(pair: Pair) -> None:
    for ids in pair.prompts():
        with torch.no_grad():
            found = pair.ours(torch.tensor([ids]))
        assert len(ids) < pair.window or found.starts.sum() > len(ids) / 6
        assert (their_logits(pair.theirs, ids) - found.logits[0]).abs().max() <= TOLERANCE


def test_greedy_bytes(pair: Pair) -> None:
    near, produced = 0, 0
    for prompt in pair.prompts():
        expected = their_greedy(pair.theirs, prompt)
        found = generate(pair.ours, prompt, SamplingOptions(max_tokens=NEW_BYTES, ignore_eos=True))
        # How near each byte was to another one: by its own margin or by a boundary decision up to it.
        nearest = list(itertools.accumulate(patch_margins(pair.ours, prompt + expected), min))[len(prompt) - 2 :]
        equal = 0
        while equal < NEW_BYTES and found.ids[equal] == expected[equal]:
            equal += 1
        if equal < NEW_BYTES:
            assert min(found.margins[equal], nearest[equal]) <= TOLERANCE
        near += sum(margin <= TOLERANCE for margin in found.margins) + (nearest[-1] <= TOLERANCE)
        produced += NEW_BYTES
    assert near <= 0.01 * produced


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_forced_patches(pair: Pair, dtype: torch.dtype) -> None:
    ours = load_checkpoint(pair.folder, dtype=dtype)
    theirs = transformers.BltForCausalLM.from_pretrained(pair.folder, dtype=dtype).eval()
    ids = pair.prompts()[1]
    with torch.no_grad():
        exact = pair.ours(torch.tensor([ids]))
        found = ours(torch.tensor([ids]), starts=exact.starts)
    at = exact.starts[0].nonzero().flatten().tolist()
    # Their lengths sum to T: a last one of 0 says that the next byte opens a patch.
    lengths = [b - a for a, b in itertools.pairwise(at)] + [len(ids) - at[-1]]
    expected = their_logits(theirs, ids, patch_lengths=torch.tensor([lengths]))
    scale = exact.logits.abs().max()
    allowed = 0.05 if dtype == torch.bfloat16 else 0.01
    assert (found.logits[0] - expected.float()).abs().max() <= allowed * scale
    assert (found.logits - exact.logits).abs().max() <= allowed * scale
    assert next(ours.patcher.parameters()).dtype == torch.float32
    assert torch.equal(found.entropies, exact.entropies)


@pytest.mark.parametrize("block_sizes", [(), (8,)])
def test_transformers_runs_what_we_save(block_sizes: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny_model(7, block_sizes=block_sizes, decoder_input="encoder", max_patch_length=None)
    save_checkpoint(model, tmp_path)
    theirs, info = transformers.BltForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    extra = {"model.local_decoder.embed_tokens.weight"} if block_sizes else set()
    assert set(info["unexpected_keys"]) == extra
    assert not info["missing_keys"] and not info["mismatched_keys"]
    ids = random_ids(7, 50)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert (their_logits(theirs.eval(), ids) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("longest", [2, 5])
def test_maximum_patch_length_on_all_but_the_last_row(longest: int, tmp_path: Path) -> None:
    # Their last row drops the patch that the next byte would start, so it cannot be compared.
    theirs, window = make_theirs(4)
    theirs.config.max_patch_length = longest
    theirs.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    ids = random_ids(5, 3 * window)
    with torch.no_grad():
        found = model(torch.tensor([ids]))
    assert found.starts.sum() > len(ids) // longest
    assert (their_logits(theirs, ids)[:-1] - found.logits[0, :-1]).abs().max() <= TOLERANCE
