"""Models with packed maps compute what they did before: exactly where weights only lie otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastblt.kernels.cpu import linear as kernel
from fastblt.kernels.cpu.linear import Storage
from fastblt.models import packed
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint, save_checkpoint
from fastblt.models.layers import Layer
from fastblt.models.packed import PackedLinear, is_packed, pack_maps, storage_of, weight_bytes
from tests.models.test_fused import make, rows_of
from tests.tiny import random_ids, tiny_model

PRETRAINED = Path(packed.__file__).parent / "pretrained"


def narrowed(seed: int, storage: Storage) -> Blt:
    """A model whose weights have values of that type, in fp32, but for the entropy model's."""
    model = tiny_model(seed, block_sizes=(4, 8))
    for name, weight in model.named_parameters():
        if not name.startswith("patcher."):
            weight.copy_(weight.to(storage.dtype))
    return model


def kinds(model: Blt) -> set[str]:
    maps = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    return {module.weights.storage for name, module in maps.items() if not name.startswith("patcher.")}


@torch.inference_mode()
def logits(model: Blt) -> torch.Tensor:
    return model(torch.tensor([random_ids(3, 60), random_ids(4, 60)])).logits


def test_packed_maps_agree() -> None:
    model = make("encoder")
    with torch.inference_mode():
        plain = rows_of(model)
        pack_maps(model)
        assert not [module for module in model.modules() if isinstance(module, nn.Linear)]
        pack_maps(model)
        for name, value in plain.items():
            torch.testing.assert_close(rows_of(model)[name], value, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("storage", [Storage.BFLOAT16, Storage.FLOAT16])
def test_narrow_files_give_the_bits_of_wide_ones(storage: Storage, tmp_path: Path) -> None:
    model = narrowed(5, storage)
    save_checkpoint(model, tmp_path / "wide")
    save_checkpoint(model, tmp_path / "narrow", storage.dtype)
    wide = load_checkpoint(tmp_path / "wide", weights="float32")
    assert kinds(wide) == {Storage.FLOAT32}
    for folder, weights in (("narrow", "auto"), ("wide", storage), ("narrow", storage)):
        narrow = load_checkpoint(tmp_path / folder, weights=weights)
        assert kinds(narrow) == {storage} and narrow.dtype == torch.float32
        assert narrow.encoder_hash_tok_embedding.weight.dtype == storage.dtype
        assert 2 * weight_bytes(narrow) == weight_bytes(wide)
        assert torch.equal(logits(narrow), logits(wide))
        # The entropy model has no narrow values here: it stays as it was.
        assert weight_bytes(narrow.patcher) >= 4
    torch.testing.assert_close(logits(wide), logits(load_checkpoint(tmp_path / "narrow")), atol=1e-4, rtol=1e-4)


def test_auto_takes_sixteen_bits_where_they_say_all(tmp_path: Path) -> None:
    model = narrowed(5, Storage.BFLOAT16)
    save_checkpoint(model, tmp_path)
    assert kinds(load_checkpoint(tmp_path, weights="auto")) == {Storage.BFLOAT16}
    model.lm_head.weight[-1, -1] = 1 / 3
    assert storage_of("lm_head.weight", model.lm_head.weight, "auto") == Storage.FLOAT32
    assert storage_of("patcher.lm_head.weight", model.patcher.lm_head.weight, "int8") == Storage.FLOAT32


def test_int8_is_near_and_keeps_heads(tmp_path: Path) -> None:
    model = tiny_model(5)
    save_checkpoint(model, tmp_path)
    small = load_checkpoint(tmp_path, weights="int8")
    assert kinds(small) == {Storage.INT8, Storage.BFLOAT16} and isinstance(small.lm_head, PackedLinear)
    assert small.lm_head.weights.storage == Storage.BFLOAT16
    assert small.encoder_hash_tok_embedding.weight.dtype == torch.bfloat16
    plain = logits(model)
    assert 0 < (logits(small) - plain).norm() < 0.05 * plain.norm()


def test_maps_that_int8_would_spoil_stay_in_sixteen_bits() -> None:
    model = tiny_model(5)
    stack = model.global_transformer.layers[0]
    # Beside such a weight nothing is left of the others of its group.
    stack.mlp.up_proj.weight[3, 7] = 1e4
    pack_maps(model, "int8")
    assert stack.mlp.up_proj.weights.storage == Storage.BFLOAT16
    assert stack.mlp.gate_proj.weights.storage == Storage.INT8


def with_outliers(model: Blt, factor: float) -> Blt:
    """The same function with outlier channels: every hundredth input of every map in the layers is `factor` times as
    large, and its weights are as much smaller."""
    for layer in model.modules():
        if isinstance(layer, Layer):
            attention, mlp = layer.self_attn, layer.mlp
            fed: list[tuple[Tensor, tuple[nn.Linear, ...]]] = [
                (layer.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj)),
                (mlp.up_proj.weight, (mlp.down_proj,)),
            ]
            values = torch.ones(attention.v_proj.weight.shape[0])
            values[5::100] = factor
            attention.v_proj.weight *= values[:, None]
            # Several query heads read one head of values.
            heads = attention.o_proj.weight.shape[1] // len(values)
            attention.o_proj.weight /= (
                values.unflatten(0, (-1, attention.head_dim)).repeat_interleave(heads, 0).flatten()
            )
            for before, maps in fed:
                before[5::100] *= factor
                for one in maps:
                    one.weight[:, 5::100] /= factor
    return model


@torch.inference_mode()
@pytest.mark.parametrize("factor", [1, 8, 64, 512, 2**14])
def test_a_checkpoint_with_outlier_channels_is_handled(
    factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole, read from its file. What looks at the weights of each output alone makes another model of it."""
    plain = logits(load_checkpoint(PRETRAINED))
    save_checkpoint(with_outliers(load_checkpoint(PRETRAINED), factor), tmp_path)

    def error(weights: str) -> float:
        return float((logits(load_checkpoint(tmp_path, weights=weights)) - plain).norm() / plain.norm())

    assert error("float32") < 1e-5
    assert error("int8") < 0.05
    if factor == 1:
        model = load_checkpoint(tmp_path, weights="int8")
        maps = [module.weights.storage for module in model.modules() if isinstance(module, PackedLinear)]
        assert maps.count(Storage.INT8) > 4 * maps.count(Storage.BFLOAT16)
    if factor >= 64:
        monkeypatch.setattr(packed, "rounds_away", lambda *_: False)
        assert error("int8") > 0.1


def test_what_is_no_kind_of_weights() -> None:
    with pytest.raises(ValueError, match="weights must be auto, float32, bfloat16, float16, int8, not 'int4'"):
        pack_maps(tiny_model(5), "int4")


def test_without_c(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {weights: narrowed(5, Storage.BFLOAT16) for weights in ("float32", "bfloat16", "int8")}
    plain = logits(models["float32"])
    for module in (packed, kernel):
        monkeypatch.setattr(module, "library", lambda: None)
    for weights, model in models.items():
        pack_maps(model, weights)
        tolerance = 0.05 if weights == "int8" else 1e-5
        assert (logits(model) - plain).norm() < tolerance * plain.norm()
    assert not is_packed(models["float32"]), "torch multiplies plain weights best"
