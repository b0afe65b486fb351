"""A large model's maps with packed weights, for serving on a CPU: as narrow as they come, or as one asks for.

`weights` is one of `WEIGHTS`. `auto` keeps what the checkpoint has, and 16 bits where a float32 has no more to say:
that changes no result. The entropy model always gets that, since patches depend on it, and with `int8` the heads get 16
bits, since they are small and say which byte it is. So do maps that int8 would spoil: where beside few large weights of
an output more than `MOST_LOST` of them would be 0, and where an input that matters has small weights throughout, which
`MOST_ROUNDED` is about. Such are the outlier channels of LLM.int8 (arXiv 2208.07339): a few inputs far larger than the
others, with weights as much smaller. Eight bits hold neither their weights nor, beside them, the other inputs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastblt.kernels.cpu.linear import GROUP, NUMBERS, Storage, Weights, linear, pack_weights, quantize
from fastblt.kernels.cpu.native import library

#: How weights may be kept.
WEIGHTS = ("auto", *Storage)
#: A map with an output of whose weights int8 makes more than this share 0 is kept in 16 bits. Of random weights it
#: makes 1 % 0.
MOST_LOST = 0.05

#: An input whose column of weights int8 changes by more than this share is rounded away. Of random weights it is 0.01.
MOST_ROUNDED = 0.125
#: It matters from this share of the median input's part in the outputs on. Units that a model does not use have less.
_MATTERS = 0.1
#: Maps whose rows say how large the inputs of another one beside them are.
_BEFORE = {"down_proj": "up_proj", "o_proj": "v_proj"}

_DTYPES = {storage.dtype: storage for storage in Storage}
#: Rows of a matrix that are looked at together.
_SOME = 256


class PackedLinear(nn.Module):
    """A linear map without bias over packed weights: x [..., inputs] fp32 -> [..., outputs]. Inference only."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, self.weights.inputs)
        return linear(rows, self.weights).view(*x.shape[:-1], self.weights.outputs)

    def extra_repr(self) -> str:
        return f"{self.weights.inputs}, {self.weights.outputs}, {self.weights.storage}"


class InputSizes:
    """How large the inputs of a model's maps are beside each other, as far as the maps before them tell.

    Asked for the maps in their order in the model. `model` may be on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rows: dict[str, Tensor] = {}

    def of(self, name: str, weight: Tensor) -> Tensor | None:
        """Sizes [inputs] for the map of that name, of any scale; None: as far as is known they are alike."""
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        if own in _BEFORE.values():
            self._rows = {f"{parent}.{own}": torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32)}
        rows = self._rows.get(f"{parent}.{_BEFORE.get(own)}")
        if rows is None or len(rows) == weight.shape[1]:
            return rows
        # Several query heads read one head of values.
        attention = cast(Any, self._model.get_submodule(parent))
        heads = rows.unflatten(0, (-1, attention.head_dim))
        return heads.repeat_interleave(weight.shape[1] // len(rows), 0).flatten()


def rounds_away(weight: Tensor, sizes: Tensor | None) -> bool:
    """Whether int8 rounds away an input that matters, by a map's weights [outputs, inputs] and its inputs' sizes."""
    some = weight.detach()[:: max(1, weight.shape[0] // _SOME)].float()
    groups = F.pad(some, (0, -some.shape[1] % GROUP)).unflatten(-1, (-1, GROUP))
    whole, scales = quantize(groups)
    changed = (whole * scales[..., None] - groups).flatten(1)[:, : some.shape[1]].norm(dim=0)
    part = some.norm(dim=0)
    rounded = changed > MOST_ROUNDED * part
    if sizes is not None and rounded.any():
        products = part * sizes
        rounded &= products > _MATTERS * products[products > 0].median()
    return bool(rounded.any())


def pack_map(name: str, weight: Tensor, weights: str, sizes: Tensor | None = None) -> nn.Module:
    """The map of weights [outputs, inputs] whose name in the model is `name`; `sizes` [inputs] are as in InputSizes."""
    storage = storage_of(name, weight, weights)
    if storage == Storage.INT8 and rounds_away(weight, sizes):
        storage = storage_of(name, weight, Storage.BFLOAT16)
    if library() is None and storage == Storage.FLOAT32:
        # torch multiplies these as they are.
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
        return plain
    packed = pack_weights(weight, storage)
    if packed.lost > MOST_LOST:
        packed = pack_weights(weight, storage_of(name, weight, Storage.BFLOAT16))
    return PackedLinear(packed)


def storage_of(name: str, weight: Tensor, weights: str) -> Storage:
    """How the weights of that name are kept. Tables of embeddings, which are read a row at a time, have 16 bits at
    least. Raises ValueError for what is none of `WEIGHTS`."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be {', '.join(WEIGHTS)}, not {weights!r}")
    exact = _narrowest(weight)
    if weights == "auto" or name.startswith("patcher."):
        return exact
    if weights == Storage.INT8 and (name.endswith("lm_head.weight") or "embed" in name.split(".")[-2]):
        return exact if exact != Storage.FLOAT32 else Storage.BFLOAT16
    return Storage(weights)


def _narrowest(weight: Tensor) -> Storage:
    """The narrowest floats that have every value of `weight`."""
    if weight.dtype in (torch.bfloat16, torch.float16):
        return _DTYPES[weight.dtype]
    for rows in weight.detach().split(_SOME):
        if not torch.equal(rows.to(torch.bfloat16).to(rows.dtype), rows):
            return Storage.FLOAT32
    return Storage.BFLOAT16


def pack_maps(model: nn.Module, weights: str = "auto", prefix: str = "") -> None:
    """Pack all maps of a model on the CPU, one after the other: the model's own weights are given up.

    Its activations must be fp32. Maps that are packed stay as they are. `prefix` stands before the names of `model`'s
    parameters in the whole.
    """
    sizes = InputSizes(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = module.weight
            of_inputs = sizes.of(name, weight) if weights == Storage.INT8 else None
            # Otherwise the plain and the packed weights of a whole model would be there at once.
            module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
            model.set_submodule(name, pack_map(f"{prefix}{name}.weight", weight, weights, of_inputs))
            del weight


def is_packed(model: nn.Module) -> bool:
    """Whether maps of a model are packed."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def weight_bytes(model: nn.Module) -> float:
    """Mean bytes of a weight of a model's maps, which are what a pass reads, without an entropy model inside it."""
    numbers, total = 0, 0
    for name, module in model.named_modules():
        if name.startswith("patcher."):
            continue
        if isinstance(module, PackedLinear):
            numbers += module.weights.outputs * module.weights.inputs
            total += module.weights.nbytes
        elif isinstance(module, nn.Linear):
            numbers += module.weight.numel()
            total += module.weight.nbytes
    return total / numbers


class MapPacker:
    """Packs the maps of a model on the meta device as their weights are read, so that only one is there twice."""

    def __init__(self, model: nn.Module, weights: str) -> None:
        self._model, self._weights = model, weights
        self._sizes = InputSizes(model)
        self._maps = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def takes(self, name: str) -> bool:
        """Whether a parameter of that name is a map's."""
        return name in self._maps

    def large(self, name: str) -> bool:
        """Whether it is kept as `weights` say: maps, and the hash tables."""
        return self.takes(name) or name == "encoder_hash_tok_embedding.weight"

    def dtype(self, name: str, weight: Tensor) -> torch.dtype:
        """In which dtype these weights are kept until they are packed."""
        storage = storage_of(name, weight, self._weights)
        if storage != Storage.INT8:
            return storage.dtype
        # Rounded once, from what they were.
        return weight.dtype if weight.dtype in NUMBERS else torch.float32

    def take(self, name: str, weight: Tensor) -> None:
        """Put the map of these weights [outputs, inputs] into the model."""
        sizes = self._sizes.of(name, weight) if self._weights == Storage.INT8 else None
        self._model.set_submodule(name.removesuffix(".weight"), pack_map(name, weight, self._weights, sizes))
