"""Conversion of folders in the official layout, written here from a model of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastblt.models.blt import Blt
from fastblt.models.checkpoint import WEIGHTS_FILE, CheckpointError, load_checkpoint
from fastblt.models.config import BltConfig
from fastblt.models.convert import convert
from tests.tiny import random_ids, tiny_model

# Ours -> official.
PARTS = [
    (".self_attn.", ".attention."),
    (".mlp.", ".feed_forward."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    ("embed_tokens.", "tok_embeddings."),
    (".q_norm.", ".cross_attn_norm_q."),
    (".k_norm.", ".cross_attn_norm_kv."),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
    (".q_proj.", ".wq."),
    (".k_proj.", ".wk."),
    (".v_proj.", ".wv."),
    (".o_proj.", ".wo."),
]


def official(name: str) -> str:
    if name == "lm_head.weight":
        return "local_decoder.output.weight"
    for ours, theirs in PARTS:
        name = name.replace(ours, theirs)
    return name


def make(seed: int, **overrides: Any) -> Blt:
    """A model that the official layout can hold: one head count, theta and eps for both local models, and one encoder
    layer where every one has a cross-attention."""
    model = tiny_model(seed, block_sizes=(), decoder_input="encoder", **overrides)
    config = model.config
    decoder = replace(config.decoder, num_kv_heads=config.decoder.num_heads)
    encoder = replace(config.encoder, num_kv_heads=config.encoder.num_heads)
    if config.encoder_cross_attn_all_layers:
        encoder = replace(encoder, num_layers=1)
    full = Blt(replace(config, encoder=encoder, decoder=decoder))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in full.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    return full.eval().requires_grad_(False)


def write(model: Blt, folder: Path, *, old: bool = False, **changed: Any) -> tuple[Path, Path]:
    """The model in the official layout: (folder of the model, folder of its entropy model)."""
    config, source, entropy = model.config, folder / "blt", folder / "entropy"
    source.mkdir()
    entropy.mkdir()
    main: dict[str, torch.Tensor] = {"global_transformer.rope_embeddings.freqs_cis": torch.zeros(3)}
    small: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("patcher."):
            small[official(name).removeprefix("patcher.").replace("lm_head", "output")] = tensor
        elif name == "encoder_hash_tok_embedding.weight":
            for index, table in enumerate(tensor.split(config.hash_group_vocab)):
                main[f"encoder_hash_tok_embedding.{index}.weight"] = table.clone()
        else:
            main[official(name)] = tensor
    save_file({name: tensor.bfloat16() for name, tensor in main.items()}, source / WEIGHTS_FILE)
    save_file(small, entropy / WEIGHTS_FILE)
    args = {
        "vocab_size": 260.0,
        "dim_global": config.global_.hidden_size,
        "n_layers_global": config.global_.num_layers,
        "n_heads_global": config.global_.num_heads,
        "n_kv_heads_global": config.global_.num_kv_heads,
        "cross_attn_encoder": True,
        "cross_attn_decoder": True,
        "cross_attn_init_by_pooling": True,
        "cross_attn_k": config.cross_attn_k,
        "cross_attn_nheads": config.encoder.num_heads,
        "cross_attn_all_layers_encoder": config.encoder_cross_attn_all_layers,
        "cross_attn_all_layers_decoder": config.decoder_cross_attn_all_layers,
        "encoder_hash_byte_group_size": list(config.hash_group_sizes),
        "encoder_hash_byte_group_vocab": config.hash_group_vocab,
        "encoder_hash_byte_group_nb_functions": config.hash_functions,
        "local_attention_window_len": config.encoder.window,
        "rope_theta": 500000.0,
        "norm_eps": 1e-5,
        "max_patch_length": None,
        "patching_threshold": 9.0,
        "patch_size": 4.5,
        "downsampling_by_pooling": "max",
        "pm_size": 0,
    }
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        args |= {f"dim_local_{side}": stack.hidden_size, f"n_layers_local_{side}": stack.num_layers}
        args |= {f"n_heads_local_{side}": float(stack.num_heads)}
    args |= changed
    patcher = {"patching_mode": "entropy", "threshold": config.patching_threshold, "threshold_add": None}
    data = {"patcher_args": {**patcher, "max_patch_length": config.max_patch_length, "monotonicity": False}}
    shape = config.patcher
    small_args = {"dim": shape.hidden_size, "n_layers": shape.num_layers, "n_heads": shape.num_heads, "vocab_size": 260}
    if old:
        dump(source / "params.json", {"model": args, "data": data})
        dump(entropy / "params.json", {"entropy_model": {**small_args, "rope_theta": None}})
    else:
        dump(source / "config.json", {"args": args})
        dump(source / "train_args.json", {"model": {}, "data": data})
        dump(entropy / "config.json", {"args": {**small_args, "rope_theta": 10000.0, "sliding_window": shape.window}})
    return source, entropy


def dump(path: Path, raw: Any) -> None:
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("seed", "overrides"),
    [
        (21, {"hash_functions": 1}),
        (22, {"hash_functions": 3, "max_patch_length": 5, "cross_attn_k": 4}),
        (23, {"encoder_cross_attn_all_layers": True, "decoder_cross_attn_all_layers": False, "window": None}),
    ],
)
@pytest.mark.parametrize("shard", [10**9, 60_000])
def test_official_folders(seed: int, overrides: dict[str, Any], shard: int, tmp_path: Path) -> None:
    model = make(seed, **overrides)
    source, entropy = write(model, tmp_path)
    config = convert(source, entropy, tmp_path / "out", max_shard_bytes=shard)
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.config == config == model.config
    for name, tensor in model.state_dict().items():
        expected = tensor if name.startswith("patcher.") else tensor.bfloat16().float()
        assert torch.equal(loaded.state_dict()[name], expected), name
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert tensor.dtype == (torch.float32 if name.startswith("model.patcher.") else torch.bfloat16)
        assert file.stat().st_size < max(shard, 200_000) + 100_000
    with torch.no_grad():
        assert loaded(torch.tensor([random_ids(1, 20)])).logits.isfinite().all()


def test_older_folders(tmp_path: Path) -> None:
    model = make(24)
    config = convert(*write(model, tmp_path, old=True), tmp_path / "out")
    # What the older entropy model's file does not say.
    expected = replace(model.config, patcher=replace(model.config.patcher, window=512))
    assert config == expected
    assert load_checkpoint(tmp_path / "out").config == expected


def test_rule_from_the_model_arguments(tmp_path: Path) -> None:
    source, entropy = write(make(24), tmp_path, patching_threshold=1.25, max_patch_length=8)
    (source / "train_args.json").unlink()
    config = convert(source, entropy, tmp_path / "out")
    assert (config.patching_threshold, config.max_patch_length) == (1.25, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patching_mode": "space"}, "argument patching_mode = 'space' is not supported"),
        ({"monotonicity": True}, "argument monotonicity = True is not supported"),
        ({"patching_threshold_add": 0.5}, "argument patching_threshold_add = 0.5 is not supported"),
        ({"cross_attn_nheads": 64}, "argument cross_attn_nheads = 64 is not supported"),
        ({"cross_attn_decoder": False}, "argument cross_attn_decoder = False is not supported"),
        ({"dim_global": "wide"}, "argument dim_global is 'wide', not a positive integer"),
        ({"n_layers_global": 7}, "is missing; use a whole official release"),
        ({"encoder_hash_byte_group_nb_functions": 9}, "is missing; the arguments ask for"),
        ({"encoder_hash_byte_group_vocab": 9}, "encoder_hash_tok_embedding.0.weight' has shape"),
        ({"cross_attn_k": 3}, "has shape .* the arguments say"),
        ({"cross_attn_window_decoder": 4}, "argument cross_attn_window_decoder = 4 is not supported"),
        ({"cross_attn_window_encoder": 4}, "argument cross_attn_window_encoder = 4 is not supported"),
        ({"cross_attn_init_by_pooling": None}, "argument cross_attn_init_by_pooling = None is not supported"),
        ({"downsampling_by_pooling": "mean"}, "argument downsampling_by_pooling = 'mean' is not supported"),
        ({"encoder_enable_byte_ngrams": True}, "argument encoder_enable_byte_ngrams = True is not supported"),
        ({"encoder_hash_byte_group_size": None}, "encoder_hash_byte_group_size is None, not a list"),
        ({"encoder_hash_byte_group_size": "3,x"}, "encoder_hash_byte_group_size is '3,x', not a list"),
        ({"n_layers_global": float("inf")}, "n_layers_global is inf, not a positive integer"),
    ],
)
def test_arguments_that_cannot_be_served(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    source, entropy = write(make(25), tmp_path, **changed)
    with pytest.raises(CheckpointError, match=message):
        convert(source, entropy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_cross_attention_in_all_layers(layers: int, tmp_path: Path) -> None:
    """The official encoder adds up what its layers pool, ours has the last one's: the same only where there is one."""
    config = make(28).config
    encoder = replace(config.encoder, num_layers=layers)
    model = Blt(replace(config, encoder=encoder, encoder_cross_attn_all_layers=True)).requires_grad_(False)
    source, entropy = write(model, tmp_path)
    if layers == 1:
        assert convert(source, entropy, tmp_path / "out").encoder_cross_attn_all_layers
    else:
        with pytest.raises(CheckpointError, match="argument cross_attn_all_layers_encoder = True is not supported"):
            convert(source, entropy, tmp_path / "out")


def test_older_entropy_models_are_read_as_the_official_loader_reads_them(tmp_path: Path) -> None:
    """Sizes alone: other arguments of the older file are written there and used nowhere."""
    model = make(24)
    source, entropy = write(model, tmp_path, old=True)
    raw = json.loads((entropy / "params.json").read_text())
    raw["entropy_model"] |= {"sliding_window": None, "rope_theta": 5.0, "norm_eps": 0.5, "attn_bias_type": "causal"}
    dump(entropy / "params.json", raw)
    patcher = convert(source, entropy, tmp_path / "out").patcher
    assert (patcher.window, patcher.rope_theta, patcher.rms_norm_eps) == (512, 10000.0, 1e-5)


def test_an_entropy_model_without_its_window(tmp_path: Path) -> None:
    source, entropy = write(make(29), tmp_path)
    raw = json.loads((entropy / "config.json").read_text())
    raw["args"] |= {"attn_bias_type": "causal", "sliding_window": 512}
    dump(entropy / "config.json", raw)
    with pytest.raises(CheckpointError, match="argument attn_bias_type = 'causal' is not supported"):
        convert(source, entropy, tmp_path / "out")
    raw["args"]["sliding_window"] = None
    dump(entropy / "config.json", raw)
    assert convert(source, entropy, tmp_path / "out").patcher.window is None


def test_the_rule_of_generation_hides_that_of_the_model(tmp_path: Path) -> None:
    """Generation reads patcher_args: its null is no limit, whatever the model's own arguments say."""
    source, entropy = write(make(24, max_patch_length=None), tmp_path, max_patch_length=8)
    assert convert(source, entropy, tmp_path / "out").max_patch_length is None


def test_files_that_are_not_there(tmp_path: Path) -> None:
    source, entropy = write(make(26), tmp_path)
    with pytest.raises(CheckpointError, match="no such folder; download the official repository"):
        convert(tmp_path / "nowhere", entropy, tmp_path / "out")
    tensors = load_file(source / WEIGHTS_FILE)
    save_file({**tensors, "local_encoder.pos_embeddings.weight": torch.zeros(2)}, source / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"tensor 'local_encoder\.pos_embeddings\.weight' has no place"):
        convert(source, entropy, tmp_path / "out")
    name = "local_encoder.layers.0.attention.wq.weight"
    save_file({**tensors, name: tensors[name].int()}, source / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"attention\.wq\.weight is I32; save it as"):
        convert(source, entropy, tmp_path / "out")
    save_file(tensors, source / WEIGHTS_FILE)
    (entropy / WEIGHTS_FILE).rename(entropy / "consolidated.pth")
    with pytest.raises(CheckpointError, match="pickled weights, which are never read; use a release"):
        convert(source, entropy, tmp_path / "out")
    (entropy / "consolidated.pth").rename(entropy / WEIGHTS_FILE)
    (entropy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"params\.json is missing"):
        convert(source, entropy, tmp_path / "out")
    dump(entropy / "config.json", {"args": {}})
    required = dict.fromkeys(("cross_attn_encoder", "cross_attn_decoder", "cross_attn_init_by_pooling"), True)
    required |= {"downsampling_by_pooling": "max"}
    (source / "train_args.json").unlink()
    dump(source / "config.json", {"args": {**required, "n_heads_local_encoder": 2, "n_heads_local_decoder": 2}})
    with pytest.raises(CheckpointError, match="no patching threshold"):
        convert(source, entropy, tmp_path / "out")


def test_config_is_readable_by_both(tmp_path: Path) -> None:
    convert(*write(make(27), tmp_path), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert BltConfig.from_dict(raw).to_dict() == raw
