"""From the official BLT repositories' layout to the one `fastblt.models.checkpoint` reads.

An official folder (facebook/blt-1b, facebook/blt-entropy) holds `config.json` = {"args": {...}} and `model.safetensors`
with names of its own; a model also has `train_args.json`, whose data.patcher_args are the patch rule. Older
releases hold `params.json` with the arguments under `model` or `entropy_model`, and data.patcher_args. Widths of
feed-forward layers and numbers of key heads are read from the tensors, since the arguments only imply them. Only
safetensors and JSON are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastblt.models.blt import Blt
from fastblt.models.checkpoint import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    WEIGHTS_FILE,
    CheckpointError,
    TensorFiles,
    read_json,
    stored_name,
    write_checkpoint,
)
from fastblt.models.config import BltConfig

#: Parts of names, official -> ours.
RENAMES = {
    "attention": "self_attn",
    "feed_forward": "mlp",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "embed_tokens",
    "cross_attn_norm_q": "q_norm",
    "cross_attn_norm_kv": "k_norm",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "output": "lm_head",
}
_HASH_TABLE = "encoder_hash_tok_embedding"
_FUSED = f"{_HASH_TABLE}.weight"
# The official default of a patch rule (nats).
_PATCHING_THRESHOLD = 1.335442066192627
# The entropy model was trained with these and its older `params.json` does not say so.
_ENTROPY_WINDOW = 512
_ENTROPY_THETA = 10000.0


def convert(
    source_folder: str | Path,
    entropy_folder: str | Path,
    output: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> BltConfig:
    """Write the official model of `source_folder` and its entropy model of `entropy_folder` to the folder `output`.

    Weights keep their dtype; the entropy model is written as float32. Returns the configuration. Raises CheckpointError
    naming the file, argument or tensor that is missing, wrong or not supported.
    """
    source, entropy = _tensor_files(Path(source_folder)), _tensor_files(Path(entropy_folder))
    names = {_renamed(name): (source, name) for name in source if not name.endswith(".freqs_cis")}
    for name in entropy:
        if not name.endswith(".freqs_cis"):
            names[f"patcher.{_renamed(name)}"] = (entropy, name)
    config = BltConfig.from_dict(_config(Path(source_folder), Path(entropy_folder), names))
    tables = _hash_tables(config, names)

    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Blt(config).state_dict().items()}
    have = {name: files.shape(original) for name, (files, original) in names.items()}
    if tables:
        have[_FUSED] = (sum(files.shape(original)[0] for files, original in tables), config.encoder.hidden_size)
    _check(expected, have, names)

    def read(stored: str) -> Tensor:
        name = stored.removeprefix("model.")
        if name == _FUSED:
            return torch.cat([files.read(original) for files, original in tables])
        files, original = names[name]
        tensor = files.read(original)
        return tensor.float() if name.startswith("patcher.") else tensor

    sizes = {}
    for name, shape in expected.items():
        files, original = tables[0] if name == _FUSED else names[name]
        size = 4 if name.startswith("patcher.") else files.itemsize(original)
        sizes[stored_name(name)] = size * torch.Size(shape).numel()
    write_checkpoint(output, config.to_dict(), sizes, read, max_shard_bytes)
    return config


def _tensor_files(folder: Path) -> TensorFiles:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; download the official repository first")
    if not (folder / WEIGHTS_FILE).exists() and not (folder / INDEX_FILE).exists() and list(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} holds pickled weights, which are never read; use a release that has {WEIGHTS_FILE}, such as"
            " facebook/blt-1b and facebook/blt-entropy"
        )
    return TensorFiles(folder)


def _renamed(name: str) -> str:
    """An official tensor's name in `Blt`."""
    ours = ".".join(RENAMES.get(part, part) for part in name.split("."))
    return ours.removeprefix("local_decoder.") if ours == "local_decoder.lm_head.weight" else ours


def _arguments(folder: Path, key: str) -> dict[str, Any]:
    """A model's arguments, of either layout."""
    path, key = (folder / "config.json", "args") if (folder / "config.json").exists() else (folder / "params.json", key)
    found = read_json(path).get(key)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} has no object {key}; use an official release's file")
    return found


def _patcher_arguments(source: Path, entropy: Path) -> dict[str, Any]:
    """What the official generation reads its patch rule from; empty where no file says."""
    for path in (source / "train_args.json", source / "params.json", entropy / "params.json"):
        if path.exists():
            found = (read_json(path).get("data") or {}).get("patcher_args")
            if isinstance(found, dict):
                return found
    return {}


class _Arguments:
    """Official arguments, with messages that name the file and the argument."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self._path = path
        self._raw = raw

    def __bool__(self) -> bool:
        return bool(self._raw)

    def raw(self, name: str, default: Any) -> Any:
        """The value, which may be null; `default` only where the file does not have the name."""
        return self._raw.get(name, default)

    def only(self, *names: str) -> _Arguments:
        """The same file's arguments of these names."""
        return _Arguments(self._path, {name: self._raw[name] for name in names if name in self._raw})

    def sizes(self, name: str) -> list[int]:
        """A list of positive integers, which some files write as text with commas."""
        value = self._raw.get(name)
        found = [part for part in value.split(",") if part] if isinstance(value, str) else value
        try:
            sizes = [int(size) for size in found or ()]
        except (TypeError, ValueError):
            sizes = []
        if not sizes or min(sizes) < 1:
            raise CheckpointError(f"{self._path}: argument {name} is {value!r}, not a list of positive integers")
        return sizes

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._raw.get(name)
        if value is None:
            value = default
        # Some releases store whole numbers as 8.0.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 1 <= value < 2**31
            or value != int(value)
        ):
            raise CheckpointError(f"{self._path}: argument {name} is {value!r}, not a positive integer")
        return int(value)

    def get(self, name: str, default: Any = None) -> Any:
        value = self._raw.get(name)
        return default if value is None else value

    def refuse(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = self._raw.get(name)
        if value not in allowed:
            raise CheckpointError(f"{self._path}: argument {name} = {value!r} is not supported")


def _config(source: Path, entropy: Path, names: dict[str, tuple[TensorFiles, str]]) -> dict[str, Any]:
    """A `config.json` of ours from the official arguments and the shapes of the tensors."""
    args, small = (
        _Arguments(source, _arguments(source, "model")),
        _Arguments(entropy, _arguments(entropy, "entropy_model")),
    )
    patching = _Arguments(source, _patcher_arguments(source, entropy))
    _refuse_unsupported(args, patching, small)
    heads = {side: args.whole(f"n_heads_local_{side}") for side in ("encoder", "decoder")}
    for count in heads.values():
        # Ours and that of `transformers` give a cross-attention the heads of its stack.
        args.refuse("cross_attn_nheads", (None, count))

    # Generation takes its patch rule from patcher_args where there are some, and nothing of it from the model's own.
    rule = patching if patching else args
    threshold = rule.get("threshold", _PATCHING_THRESHOLD) if patching else args.get("patching_threshold")
    if threshold is None:
        raise CheckpointError(f"{source}: no patching threshold; add the released value (nats) to config.json's args")
    k = args.whole("cross_attn_k")
    sizes = args.sizes("encoder_hash_byte_group_size")

    def stack(prefix: str, found: _Arguments, hidden: int, layers: int, heads: int, theta: float) -> dict[str, Any]:
        head_dim = hidden // heads
        return {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": _rows(names, f"{prefix}.layers.0.self_attn.k_proj.weight") // head_dim,
            "intermediate_size": _rows(names, f"{prefix}.layers.0.mlp.gate_proj.weight"),
            "rms_norm_eps": found.get("norm_eps", 1e-5),
            "rope_parameters": {"rope_theta": found.get("rope_theta", theta), "rope_type": "default"},
        }

    def local(side: str) -> dict[str, Any]:
        hidden, layers = args.whole(f"dim_local_{side}"), args.whole(f"n_layers_local_{side}")
        every = bool(args.get(f"cross_attn_all_layers_{side}", False))
        common = stack(f"local_{side}", args, hidden, layers, heads[side], 10000.0)
        return {**common, "cross_attn_k": k, "cross_attn_all_layers": every}

    wide, layers = args.whole("dim_global"), args.whole("n_layers_global")
    if (entropy / "config.json").exists():
        window = small.raw("sliding_window", _ENTROPY_WINDOW)
        if window is not None:
            # Under other masks the official model leaves the window out, or stops.
            small.refuse("attn_bias_type", ("local_block_causal", None))
    else:
        # The official loader of this layout reads sizes alone: window, theta and eps are always these.
        window, small = _ENTROPY_WINDOW, small.only("dim", "n_layers", "n_heads")
    small_stack = (small.whole("dim"), small.whole("n_layers"), small.whole("n_heads"), _ENTROPY_THETA)
    return {
        "model_type": "blt",
        "patching_threshold": threshold,
        "max_patch_length": rule.get("max_patch_length"),
        "local_attention_window_len": args.get("local_attention_window_len"),
        "cross_attn_k": k,
        "encoder_hash_byte_group_size": sizes,
        "encoder_hash_byte_group_vocab": args.whole("encoder_hash_byte_group_vocab", 30000),
        "encoder_hash_byte_group_nb_functions": args.whole("encoder_hash_byte_group_nb_functions", 3),
        "encoder_config": local("encoder"),
        "decoder_config": local("decoder"),
        "global_config": stack("global_transformer", args, wide, layers, args.whole("n_heads_global"), 10000.0),
        "patcher_config": {**stack("patcher", small, *small_stack), "sliding_window": window},
    }


#: Arguments of the official model that change what it computes, and the values that a model of ours has. A name that
#: is missing has the official default, which None stands for where that is allowed.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "patching_mode": ("entropy", None),
    "patching_threshold_add": (None,),
    "monotonicity": (False, None),
    "weight_tying": (False, None),
    "tie_local_encoder_decoder_logits": (False, None),
    "pm_size": (0, None),
    "cross_attn_encoder": (True,),
    "cross_attn_decoder": (True,),
    "cross_attn_init_by_pooling": (True,),
    "cross_attn_window_encoder": (None,),
    "cross_attn_window_decoder": (None,),
    "downsampling_by_pooling": ("max",),
    "encoder_enable_byte_ngrams": (False, None),
    "use_rope": (True, None),
    # The two differ only behind an EOS, where a text has ended.
    "attn_bias_type": ("causal", "block_causal", None),
}


def _refuse_unsupported(args: _Arguments, patching: _Arguments, small: _Arguments) -> None:
    """Raises CheckpointError for an argument whose model would not be the one that is written."""
    for name, allowed in _SUPPORTED.items():
        args.refuse(name, allowed)
    for name in ("patching_mode", "monotonicity"):
        patching.refuse(name, _SUPPORTED[name])
    patching.refuse("threshold_add", (None,))
    if args.get("cross_attn_all_layers_encoder", False) and args.whole("n_layers_local_encoder") > 1:
        # Ours and `transformers` pool anew at every layer, the official model adds to what the layer before pooled.
        args.refuse("cross_attn_all_layers_encoder", (False, None))
    small.refuse("weight_tying", (None, False))


def _rows(names: dict[str, tuple[TensorFiles, str]], name: str) -> int:
    if name not in names:
        raise CheckpointError(f"tensor {name} (our name) is missing; use a whole official release")
    files, original = names[name]
    return files.shape(original)[0]


def _hash_tables(config: BltConfig, names: dict[str, tuple[TensorFiles, str]]) -> list[tuple[TensorFiles, str]]:
    """Take the separate hash tables out of `names`, in their order; ours stand in one table."""
    tables = []
    for index in range(config.num_hash_tables):
        name = f"{_HASH_TABLE}.{index}.weight"
        if name not in names:
            count = config.num_hash_tables
            raise CheckpointError(f"tensor {name} is missing; the arguments ask for {count} hash tables")
        files, original = names.pop(name)
        wanted = (config.hash_group_vocab, config.encoder.hidden_size)
        if files.shape(original) != wanted:
            raise CheckpointError(f"tensor {original!r} has shape {list(files.shape(original))}, not {list(wanted)}")
        tables.append((files, original))
    return tables


def _check(
    expected: dict[str, tuple[int, ...]],
    have: dict[str, tuple[int, ...]],
    names: dict[str, tuple[TensorFiles, str]],
) -> None:
    for name, shape in expected.items():
        if name not in have:
            raise CheckpointError(f"tensor {name} (our name) is missing; use a whole official release")
        if have[name] != shape:
            raise CheckpointError(
                f"tensor {name} (our name) has shape {list(have[name])}, the arguments say {list(shape)}"
            )
    for name in have:
        if name not in expected:
            files, original = names[name]
            raise CheckpointError(
                f"{files.path(original)}: tensor {original!r} has no place in a model of these arguments"
            )
