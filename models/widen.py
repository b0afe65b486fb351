"""A model widened to a larger shape that still computes the same function.

Every pass of the wide model reads the weights of its shape and costs what such a model costs, while its logits, patches
and accepted drafts are those of the small one: speed measured on it is speed at real acceptance.

How: residual channels are zero-padded, by one map a stack. RMSNorm divides by the mean over more channels, so gains
shrink by sqrt(d/D) and eps by d/D. A head of size e becomes one of E: a rotary pair goes where its frequency is, and
queries grow by sqrt(E/e), the factor that attention divides by. Added heads have zero output columns, added
feed-forward units zero down columns, added layers both, which makes them identities; an added *decoder* layer doubles
the stream (the cross-attention adds its input twice), so they stand last, where the final norm cancels it. Weights that
only meet zeros are noise: a matrix of zeros is cheaper to read and to multiply than a model's.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastblt.models.blt import Blt, _hash_powers
from fastblt.models.checkpoint import CheckpointError, checkpoint_folder, load_checkpoint, stored_name, write_checkpoint
from fastblt.models.config import BltConfig, StackConfig
from fastblt.models.packed import MapPacker


@dataclass(frozen=True)
class StackShape:
    """The size of one stack of layers, as in `StackConfig`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class Shape:
    """The stacks of a target; without `patcher` the entropy model stays as it is."""

    encoder: StackShape
    global_: StackShape
    decoder: StackShape
    patcher: StackShape | None = None


_ENCODER = StackShape(1024, 1, 16, 16, 2816)
_DECODER = StackShape(1024, 9, 16, 16, 2816)
#: The first two are those of arXiv 2605.08044 §4.1, derived from the gigabytes and passes of its tables, as it does not
#: list them.
SHAPES = {
    "1b": Shape(_ENCODER, StackShape(2048, 25, 16, 16, 5632), _DECODER),
    "3b": Shape(_ENCODER, StackShape(3072, 28, 24, 8, 8192), _DECODER),
    # Not in the paper: about as many weights as its relatives among token-level models.
    "7b": Shape(_ENCODER, StackShape(4096, 32, 32, 32, 11008), _DECODER),
}
#: The published entropy model of about 100 million weights.
PAPER_PATCHER = StackShape(768, 14, 12, 12, 2048)


def paper_shape(name: str, *, patcher: bool = False) -> Shape:
    """The shape of that name, with the published entropy model's size too if `patcher`. Raises ValueError."""
    if name not in SHAPES:
        raise ValueError(f"no shape {name!r}; there are {', '.join(SHAPES)}")
    return replace(SHAPES[name], patcher=PAPER_PATCHER if patcher else None)


def widen(small: Blt, shape: Shape, weights: str | None = None) -> Blt:
    """The wide model in memory, frozen, in the dtype and on the device of `small`.

    With `weights`, one of `packed.WEIGHTS`, it is for serving on a CPU: its large tensors are kept in that type, and
    maps are packed as they are made. Raises ValueError where `shape` cannot hold the function of `small`.
    """
    plan = _Plan(small, shape)
    with torch.device("meta"):
        wide = Blt(plan.config)
    packer = MapPacker(wide, weights) if weights is not None else None
    tensors: dict[str, Tensor] = {}
    for name in wide.state_dict():
        tensor = plan.tensor(name)
        if packer is not None and packer.takes(name):
            packer.take(name, tensor)
        elif packer is not None and packer.large(name):
            tensors[name] = tensor.to(packer.dtype(name, tensor))
        else:
            tensors[name] = tensor
    wide.load_state_dict(tensors, strict=True, assign=True)
    device = small.device
    wide._hash_powers = _hash_powers(plan.config.hash_group_sizes, plan.config.hash_functions).to(device)
    wide._hash_offsets = small._hash_offsets.clone()
    return wide.eval().requires_grad_(False)


def widen_checkpoint(
    source: str | Path, output: str | Path, shape: Shape, dtype: torch.dtype = torch.float32
) -> BltConfig:
    """Write the wide model of a checkpoint to a folder, one shard at a time, in a dtype, the entropy model in float32;
    returns its configuration."""
    if Path(output).exists() and checkpoint_folder(source).samefile(output):
        raise CheckpointError(f"{output} is the checkpoint itself; choose another folder to write")
    plan = _Plan(load_checkpoint(source), shape)
    with torch.device("meta"):
        expected = Blt(plan.config).state_dict()

    def kind(name: str) -> torch.dtype:
        return torch.float32 if name.startswith("patcher.") else dtype

    sizes = {stored_name(name): tensor.numel() * kind(name).itemsize for name, tensor in expected.items()}

    def read(name: str) -> Tensor:
        own = name.removeprefix("model.")
        return plan.tensor(own).to(kind(own))

    write_checkpoint(output, plan.config.to_dict(), sizes, read)
    return plan.config


class _Heads:
    """Where the heads of a small stack stand in a wide one.

    Rows of a projection [heads * size, ...] are named by indices: `small` of the small one and `wide` of the wide one,
    pairwise, for queries and for keys and values. Where the wide stack shares a KV head among fewer queries than the
    small one, KV heads are repeated.
    """

    def __init__(self, small: StackConfig, wide: StackShape, name: str) -> None:
        size, wide_size = small.head_dim, wide.hidden_size // wide.num_heads
        _require(
            wide.hidden_size % wide.num_heads == 0 and wide_size % size == 0,
            f"{name}: heads of {wide.hidden_size}/{wide.num_heads} channels cannot hold the rotary pairs of heads of"
            f" {size}; choose a multiple of {size}",
        )
        group, wide_group = small.num_heads // small.num_kv_heads, wide.num_heads // wide.num_kv_heads
        copies = -(-group // wide_group)
        _require(
            copies * small.num_kv_heads <= wide.num_kv_heads,
            f"{name}: {small.num_heads} heads over {small.num_kv_heads} KV heads need {copies * small.num_kv_heads} KV"
            f" heads of {wide_group} queries each, and there are {wide.num_kv_heads}",
        )
        self.scale = (wide_size / size) ** 0.5
        # Pair i turns by theta^(-2i/e), which is pair i * E/e of the wide head.
        within = torch.arange(size)
        self._inside = (within // 2) * 2 * (wide_size // size) + within % 2
        self._size, self._wide_size = size, wide_size
        heads = range(small.num_heads)
        kv_of = [(head // group) * copies + head % group // wide_group for head in heads]
        q_of = [kv * wide_group + head % group % wide_group for head, kv in zip(heads, kv_of, strict=True)]
        self.queries = self._rows(list(heads), q_of)
        sources = {kv: head // group for head, kv in zip(heads, kv_of, strict=True)}
        self.keys = self._rows(list(sources.values()), list(sources))

    def _rows(self, small: list[int], wide: list[int]) -> tuple[Tensor, Tensor]:
        inside = torch.arange(self._size)
        rows = (torch.tensor(small)[:, None] * self._size + inside).flatten()
        wide_rows = (torch.tensor(wide)[:, None] * self._wide_size + self._inside).flatten()
        return rows, wide_rows

    def whole(self, rows: Tensor) -> Tensor:
        """All rows of the wide heads that `rows` are in."""
        heads = (rows // self._wide_size).unique()
        return (heads[:, None] * self._wide_size + torch.arange(self._wide_size)).flatten()


class _Stack:
    """One stack's maps: residual channels [d] -> [D], heads, and its wide configuration."""

    def __init__(self, small: StackConfig, wide: StackShape, channels: Tensor, name: str) -> None:
        for field in ("hidden_size", "num_layers", "intermediate_size"):
            have, wanted = getattr(small, field), getattr(wide, field)
            _require(wanted >= have, f"{name}.{field} is {wanted}, less than the {have} of the model to widen")
        self.small, self.channels = small, channels
        self.gain = (small.hidden_size / wide.hidden_size) ** 0.5
        self.heads = _Heads(small, wide, name)
        self.config = replace(
            small,
            hidden_size=wide.hidden_size,
            num_layers=wide.num_layers,
            num_heads=wide.num_heads,
            num_kv_heads=wide.num_kv_heads,
            intermediate_size=wide.intermediate_size,
            rms_norm_eps=small.rms_norm_eps * small.hidden_size / wide.hidden_size,
        )

    def fill(self, part: str, wide: Tensor, small: Tensor | None) -> Tensor:
        """A tensor of a layer or a cross-attention; `part` is the end of its name, `small` None in an added layer."""
        kind = part.split(".")[-2]
        if kind.endswith("norm"):
            # Gains of channels that are zero, and of layers that do nothing, mean nothing.
            wide.fill_(self.gain)
            if small is not None:
                wide[self.channels] = small * self.gain
        elif kind in ("q_proj", "k_proj", "v_proj"):
            _noise(wide, part)
            if small is not None:
                rows, places = self.heads.queries if kind == "q_proj" else self.heads.keys
                wide[self.heads.whole(places)] = 0
                scale = self.heads.scale if kind == "q_proj" else 1.0
                _put(wide, places, self.channels, small[rows] * scale)
        elif kind in ("gate_proj", "up_proj"):
            _noise(wide, part)
            if small is not None:
                units = torch.arange(small.shape[0])
                wide[units] = 0
                _put(wide, units, self.channels, small)
        else:
            wide.zero_()
            if small is not None:
                rows, places = self.heads.queries if kind == "o_proj" else (torch.arange(small.shape[1]),) * 2
                _put(wide, self.channels, places, small[:, rows])
        return wide


class _Plan:
    """How to fill each tensor of the wide model from the small one's."""

    def __init__(self, small: Blt, shape: Shape) -> None:
        self._small_config = config = small.config
        k = config.cross_attn_k
        self._state = small.state_dict()
        local = torch.arange(config.encoder.hidden_size)
        decoder = torch.arange(config.decoder.hidden_size)
        # The k vectors of a patch lie one behind the other.
        self._vectors = _concatenated(config.encoder.hidden_size, shape.encoder.hidden_size, k)
        self._latents = _concatenated(config.decoder.hidden_size, shape.decoder.hidden_size, k)
        projected = k * shape.encoder.hidden_size != shape.global_.hidden_size
        was_projected = k * config.encoder.hidden_size != config.global_.hidden_size
        _require(
            projected or not was_projected,
            "global_.hidden_size: this model projects patch vectors; choose a width other than"
            f" {k} x {shape.encoder.hidden_size}, where there is no projection",
        )
        global_ = torch.arange(config.global_.hidden_size) if projected else self._vectors
        self._stacks = {
            "local_encoder": _Stack(config.encoder, shape.encoder, local, "encoder"),
            "global_transformer": _Stack(config.global_, shape.global_, global_, "global_"),
            "local_decoder": _Stack(config.decoder, shape.decoder, decoder, "decoder"),
        }
        patcher = config.patcher
        if shape.patcher is not None:
            channels = torch.arange(patcher.hidden_size)
            self._stacks["patcher"] = _Stack(patcher, shape.patcher, channels, "patcher")
            patcher = self._stacks["patcher"].config
        self.config = replace(
            config,
            patcher=patcher,
            encoder=self._stacks["local_encoder"].config,
            global_=self._stacks["global_transformer"].config,
            decoder=self._stacks["local_decoder"].config,
        )
        if config.decoder_input == "encoder":
            _require(
                shape.encoder.hidden_size == shape.decoder.hidden_size,
                "encoder and decoder need one hidden_size: this model's decoder starts from encoder states",
            )
        with torch.device("meta"):
            self._wide = Blt(self.config).state_dict()

    def tensor(self, name: str) -> Tensor:
        """The wide model's tensor of that name."""
        stack_name, _, part = name.partition(".")
        source = self._source(stack_name, part)
        small = self._state.get(source) if source else None
        like = self._state["lm_head.weight" if stack_name != "patcher" else "patcher.lm_head.weight"]
        stack = self._stacks.get(stack_name)
        if stack_name == "patcher" and stack is None:
            return self._state[name].clone()
        wide = torch.empty(self._wide[name].shape, dtype=like.dtype, device=like.device)
        if stack is not None and part.startswith(("layers.", "cross_attn_layers.", "norm.")):
            return stack.fill(part, wide, small)
        wide.zero_()
        rows, columns = self._maps(name)
        if small is None:
            # Vectors that went into the global transformer as they are now go through a projection.
            wide[rows, columns] = 1
            return wide
        _put(wide, torch.arange(small.shape[0]) if rows is None else rows, columns, small)
        return wide

    def _source(self, stack: str, part: str) -> str | None:
        """The small model's tensor that fills one of the wide model's."""
        if stack == "local_encoder" and part.startswith("cross_attn_layers."):
            # Only the last one has any effect.
            _, index, rest = part.split(".", 2)
            if int(index) != _crosses(self.config) - 1:
                return None
            part = f"cross_attn_layers.{_crosses(self._small_config) - 1}.{rest}"
        name = f"{stack}.{part}"
        return name if name in self._state else None

    def _maps(self, name: str) -> tuple[Tensor | None, Tensor]:
        """Rows (None: as they are) and columns of the tensors around the layers."""
        encoder, decoder = self._stacks["local_encoder"].channels, self._stacks["local_decoder"].channels
        global_ = self._stacks["global_transformer"].channels
        maps: dict[str, tuple[Tensor | None, Tensor]] = {
            "lm_head.weight": (None, decoder),
            "encoder_hash_tok_embedding.weight": (None, encoder),
            "local_encoder.embed_tokens.weight": (None, encoder),
            "local_encoder.patch_embedding_projection.weight": (self._vectors, encoder),
            "global_transformer.token_embedding_projection.weight": (global_, self._vectors),
            "local_decoder.embed_tokens.weight": (None, decoder),
            "local_decoder.patch_embedding_projection.weight": (self._latents, global_),
        }
        if "patcher" in self._stacks:
            channels = self._stacks["patcher"].channels
            maps |= {"patcher.embed_tokens.weight": (None, channels), "patcher.lm_head.weight": (None, channels)}
        return maps[name]


def _crosses(config: BltConfig) -> int:
    return config.encoder.num_layers if config.encoder_cross_attn_all_layers else 1


def _concatenated(small: int, wide: int, k: int) -> Tensor:
    """Channel a * small + b -> a * wide + b."""
    return (torch.arange(k)[:, None] * wide + torch.arange(small)).flatten()


def _put(wide: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    wide[rows.to(wide.device)[:, None], columns.to(wide.device)] = values.to(wide.dtype)


def _noise(wide: Tensor, name: str) -> None:
    generator = torch.Generator(wide.device).manual_seed(zlib.crc32(name.encode()))
    wide.uniform_(-1, 1, generator=generator).mul_((3 / wide.shape[1]) ** 0.5)


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(f"cannot widen to this shape: {message}")
