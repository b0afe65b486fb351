"""The shape of a BLT, read from and written to the `config.json` of `transformers`' BLT."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from fastblt.models.vocabulary import VOCAB_SIZE

DECODER_INPUTS = ("encoder", "embedding")


class ConfigError(ValueError):
    """A `config.json` that does not describe a BLT this project can run; the message names the field."""


@dataclass(frozen=True)
class StackConfig:
    """One stack of pre-norm transformer layers. `window` is in rows; None means full causal."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rope_theta: float
    window: int | None = None
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


#: Behind the name of a draft setting: in sampled text.
SAMPLED = " sampled"


@dataclass(frozen=True)
class BltConfig:
    """All that is needed to build and run a BLT (the fields of `BltConfig` in `transformers`, and our own).

    `patching_threshold` is in nats. `block_sizes` are those the diffusion head was trained for: empty for a plain
    BLT. `acceptance` maps a draft setting to its measured acceptance in greedy text (of BLT-DSV: what its filter
    keeps), and its name with SAMPLED behind it to that in text of temperature 0.8; it may be empty.
    """

    patcher: StackConfig
    encoder: StackConfig
    global_: StackConfig
    decoder: StackConfig
    cross_attn_k: int = 2
    encoder_cross_attn_all_layers: bool = False
    decoder_cross_attn_all_layers: bool = True
    hash_group_sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    hash_group_vocab: int = 500002
    hash_functions: int = 1
    patching_threshold: float = 1.335442066192627
    max_patch_length: int | None = None
    decoder_input: str = "encoder"
    block_sizes: tuple[int, ...] = ()
    acceptance: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # `transformers` reads an empty list as the default one, so no file could say it.
        _require(self.hash_group_sizes, "encoder_hash_byte_group_size must name at least one size")

    @property
    def num_hash_tables(self) -> int:
        return self.hash_functions * len(self.hash_group_sizes)

    @property
    def has_diffusion(self) -> bool:
        return bool(self.block_sizes)

    def with_patching(self, threshold: float | None = None, max_patch_length: int | None = None) -> BltConfig:
        """The same model under another threshold (nats) or maximum patch length (0 means none)."""
        config = self
        if threshold is not None:
            config = replace(config, patching_threshold=threshold)
        if max_patch_length is not None:
            config = replace(config, max_patch_length=max_patch_length or None)
        return config

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> BltConfig:
        """Read a `config.json`. Raises ConfigError naming the field that is missing or cannot be run."""
        _require(raw.get("model_type", "blt") == "blt", f"model_type is {_shown(raw.get('model_type'))}, not 'blt'")
        _require(raw.get("vocab_size", VOCAB_SIZE) == VOCAB_SIZE, f"vocab_size must be {VOCAB_SIZE}")
        _require(
            raw.get("patch_in_forward", True) is True and raw.get("patching_mode", "entropy") == "entropy",
            "only patching_mode 'entropy' with patch_in_forward true can be served",
        )
        patcher, encoder, decoder, global_ = (
            _object(raw.get(name), name)
            for name in ("patcher_config", "encoder_config", "decoder_config", "global_config")
        )
        window = raw.get("local_attention_window_len", 512)
        k = _positive(_default(raw.get("cross_attn_k"), 2), "cross_attn_k")
        for name, sub in (("encoder_config", encoder), ("decoder_config", decoder)):
            _require(_default(sub.get("cross_attn_k"), k) == k, f"{name}.cross_attn_k differs from cross_attn_k")
        longest = raw.get("max_patch_length")
        config = cls(
            patcher=_stack(patcher, "patcher_config", (768, 14, 12, 2048, 10000.0), patcher.get("sliding_window", 512)),
            encoder=_stack(encoder, "encoder_config", (1024, 1, 16, None, 500000.0), window),
            global_=_stack(global_, "global_config", (2048, 25, 16, 5632, 500000.0), None),
            decoder=_stack(decoder, "decoder_config", (1024, 9, 16, 2816, 500000.0), window),
            cross_attn_k=k,
            encoder_cross_attn_all_layers=_flag(encoder, "encoder_config.cross_attn_all_layers", False),
            decoder_cross_attn_all_layers=_flag(decoder, "decoder_config.cross_attn_all_layers", True),
            hash_group_sizes=_integers(
                _default(raw.get("encoder_hash_byte_group_size"), [3, 4, 5, 6, 7, 8]),
                "encoder_hash_byte_group_size",
                _LONGEST_GROUP,
            ),
            hash_group_vocab=_positive(
                raw.get("encoder_hash_byte_group_vocab", 500002), "encoder_hash_byte_group_vocab"
            ),
            hash_functions=_positive(
                raw.get("encoder_hash_byte_group_nb_functions", 1), "encoder_hash_byte_group_nb_functions"
            ),
            patching_threshold=_number(raw.get("patching_threshold", 1.335442066192627), "patching_threshold"),
            max_patch_length=None if longest is None else _positive(longest, "max_patch_length"),
            decoder_input=raw.get("decoder_input", "encoder"),
            block_sizes=_integers(raw.get("block_sizes", []), "block_sizes", _LARGEST_BLOCK),
            acceptance={
                name: _number(value, f"acceptance.{_shown(name)}", 0, 1)
                for name, value in _object(raw.get("acceptance", {}), "acceptance").items()
            },
        )
        _require(config.decoder_input in DECODER_INPUTS, f"decoder_input must be one of {DECODER_INPUTS}")
        _require(
            config.num_hash_tables <= _MOST_TABLES,
            f"encoder_hash_byte_group_nb_functions x encoder_hash_byte_group_size make {config.num_hash_tables} hash "
            f"tables, and at most {_MOST_TABLES} can be",
        )
        _require(encoder_matches(config), "encoder_config.hidden_size and decoder_config.hidden_size differ")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that `transformers` reads too; its own fields and ours."""

        def stack(sub: StackConfig, **more: Any) -> dict[str, Any]:
            return {
                "hidden_size": sub.hidden_size,
                "num_hidden_layers": sub.num_layers,
                "num_attention_heads": sub.num_heads,
                "num_key_value_heads": sub.num_kv_heads,
                "intermediate_size": sub.intermediate_size,
                "rms_norm_eps": sub.rms_norm_eps,
                "rope_parameters": {"rope_theta": sub.rope_theta, "rope_type": "default"},
                **more,
            }

        local = {"cross_attn_k": self.cross_attn_k, "hidden_size_global": self.global_.hidden_size}
        return {
            "model_type": "blt",
            "architectures": ["BltForCausalLM"],
            "vocab_size": VOCAB_SIZE,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "patching_mode": "entropy",
            "patch_in_forward": True,
            "patching_threshold": self.patching_threshold,
            "max_patch_length": self.max_patch_length,
            "local_attention_window_len": self.encoder.window,
            "cross_attn_k": self.cross_attn_k,
            "encoder_hash_byte_group_size": list(self.hash_group_sizes),
            "encoder_hash_byte_group_vocab": self.hash_group_vocab,
            "encoder_hash_byte_group_nb_functions": self.hash_functions,
            "patcher_config": stack(self.patcher, sliding_window=self.patcher.window),
            "encoder_config": stack(self.encoder, cross_attn_all_layers=self.encoder_cross_attn_all_layers, **local),
            "decoder_config": stack(self.decoder, cross_attn_all_layers=self.decoder_cross_attn_all_layers, **local),
            "global_config": stack(self.global_),
            "decoder_input": self.decoder_input,
            "block_sizes": list(self.block_sizes),
            "acceptance": self.acceptance,
        }


def encoder_matches(config: BltConfig) -> bool:
    """Decoder rows start from encoder states under `encoder` input, so both widths must agree there."""
    return config.decoder_input == "embedding" or config.encoder.hidden_size == config.decoder.hidden_size


#: No size of a model comes near it, and products of a few stay exact in 64 bits.
_LARGEST = 2**31
#: Every layer is an object with tensors of its own, before a weight is read.
_MOST_LAYERS = 1024
#: Hash tables likewise: functions times group sizes.
_MOST_TABLES = 1024
#: Bytes that a hash looks at. One costs a power of a number.
_LONGEST_GROUP = 256
_LARGEST_BLOCK = 1024
#: No float32 is larger.
_FLOAT32 = 3e38
#: Characters of a wrong value that a message quotes.
_QUOTED = 60


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ConfigError(f"config.json: {message}")


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _object(value: Any, name: str) -> dict[str, Any]:
    _require(isinstance(value, dict), f"{name} is missing or not an object")
    return dict(value)


def _positive(value: Any, name: str) -> int:
    _require(
        isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _LARGEST,
        f"{name} must be a positive integer below 2^31, not {_shown(value)}",
    )
    return int(value)


def _integers(value: Any, name: str, most: int) -> tuple[int, ...]:
    _require(isinstance(value, list | tuple), f"{name} must be a list of positive integers, not {_shown(value)}")
    for one in value:
        _require(_positive(one, name) <= most, f"{name} must be at most {most}, not {one}")
    return tuple(value)


def _number(value: Any, name: str, least: float = -_FLOAT32, most: float = _FLOAT32) -> float:
    """A number that float32 can hold, from `least` to `most`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    limits = f"from {least:g} to {most:g}"
    _require(number and least <= value <= most, f"{name} must be a number {limits}, not {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def _flag(raw: dict[str, Any], name: str, default: bool) -> bool:
    value = raw.get(name.rsplit(".", 1)[-1], default)
    _require(isinstance(value, bool), f"{name} must be true or false, not {_shown(value)}")
    return bool(value)


def _stack(
    raw: dict[str, Any], name: str, defaults: tuple[int, int, int, int | None, float], window: int | None
) -> StackConfig:
    hidden, layers, heads, inter, theta = defaults
    hidden = _positive(raw.get("hidden_size", hidden), f"{name}.hidden_size")
    heads = _positive(raw.get("num_attention_heads", heads), f"{name}.num_attention_heads")
    kv_heads = _positive(_default(raw.get("num_key_value_heads"), heads), f"{name}.num_key_value_heads")
    inter = _default(raw.get("intermediate_size"), _default(inter, int(8 * hidden / 3)))
    _require(hidden % heads == 0, f"{name}.hidden_size must be a multiple of num_attention_heads")
    head_dim = _default(raw.get("head_dim"), hidden // heads)
    _require(head_dim == hidden // heads, f"{name}.head_dim must be hidden_size / num_attention_heads")
    _require(head_dim % 2 == 0, f"{name}: the head size must be even (RoPE turns pairs)")
    _require(heads % kv_heads == 0, f"{name}.num_attention_heads must be a multiple of num_key_value_heads")
    _require(raw.get("hidden_act", "silu") == "silu", f"{name}.hidden_act must be 'silu'")
    rope = _object(_default(raw.get("rope_parameters"), {}), f"{name}.rope_parameters")
    scaling = _object(_default(raw.get("rope_scaling"), {}), f"{name}.rope_scaling")
    for where in (rope, scaling):
        for kind in (where.get("rope_type"), where.get("type")):
            _require(kind in (None, "default"), f"{name}: rope_type must be 'default', not {_shown(kind)}")
    theta = _number(_default(rope.get("rope_theta"), _default(raw.get("rope_theta"), theta)), f"{name}.rope_theta")
    eps = _number(raw.get("rms_norm_eps", 1e-5), f"{name}.rms_norm_eps", 0, 1)
    _require(theta > 0, f"{name}.rope_theta must be positive")
    layers = _positive(raw.get("num_hidden_layers", layers), f"{name}.num_hidden_layers")
    _require(layers <= _MOST_LAYERS, f"{name}.num_hidden_layers must be at most {_MOST_LAYERS}, not {layers}")
    if window is not None:
        _positive(window, f"{name}: attention window")
    return StackConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=_positive(inter, f"{name}.intermediate_size"),
        rope_theta=theta,
        window=window,
        rms_norm_eps=eps,
    )
