"""Checkpoints on disk: safetensors and `config.json` in the layout of `transformers`' BLT, and nothing else.

Names are those of `Blt` with `model.` in front, but for `lm_head.weight`. One file, `model.safetensors`, or shards
with `model.safetensors.index.json`. `transformers` does not know `model.local_decoder.embed_tokens.weight`, there only
for a diffusion head or `embedding` input: it reports the tensor as unexpected and runs without it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastblt.models.blt import Blt, _hash_offsets, _hash_powers
from fastblt.models.checkpoint_folder import (
    AGAIN,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    checkpoint_folder,
    read_config,
    read_json,
    require_file,
)
from fastblt.models.packed import MapPacker

MAX_SHARD_BYTES = 5_000_000_000

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Quantized floats (fp8 and the like) mean nothing without scales, which this layout does not have.
_STORED_DTYPES = (*_DTYPES, torch.float64)
_KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAVE_AS = "save it as float32, float16 or bfloat16"
_PICKLES = (".bin", ".pt", ".pth", ".pickle", ".pkl", ".ckpt")
#: What `tie_word_embeddings` makes one tensor.
_TIED = ("lm_head.weight", "model.local_encoder.embed_tokens.weight")


def load_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    weights: str | None = None,
    pack: bool = True,
) -> Blt:
    """The frozen model of a local folder or a Hub id (`owner/name`), in eval mode.

    `dtype` is float32, float16 or bfloat16; the entropy model is float32 whatever it says (design §2.2). `revision` and
    `token` go to the Hub. The weights are copies: files may be replaced, cut short or removed while the model is in
    use. Raises CheckpointError for files and tensors, ConfigError for `config.json`.

    `weights`, one of `packed.WEIGHTS`, is for serving on a CPU: the large tensors are kept in that type, whatever
    `dtype` is, and maps are packed as they are read (without `pack` they are left to be packed later). No more memory
    is taken than the model stays with, but for one tensor.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, not {dtype}")
    check_device(device)
    folder = checkpoint_folder(source, revision=revision, token=token)
    config = read_config(folder)
    # No memory and no initialization for weights that are about to be replaced.
    with torch.device("meta"):
        model = Blt(config)
    expected = {stored_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    files = TensorFiles(folder)
    sources = _sources(expected, files, tied=_tied(folder))
    packer = MapPacker(model, weights) if weights is not None else None
    read: dict[str, Tensor] = {}
    for name, shape in expected.items():
        own = name.removeprefix("model.")
        stored = _checked(name, files.read(sources[name]), shape)
        if packer is not None and packer.large(own):
            tensor = _cast(name, stored, packer.dtype(own, stored))
            if pack and packer.takes(own):
                packer.take(own, tensor)
                files.release(sources[name])
                continue
        else:
            wanted = torch.float32 if name.startswith("model.patcher.") else dtype
            tensor = _cast(name, stored, wanted).to(device)
        # What was read is mapped to its file, which somebody may write over.
        read[own] = tensor.clone() if tensor.data_ptr() == stored.data_ptr() else tensor
        del stored, tensor
        files.release(sources[name])
    model.load_state_dict(read, strict=True, assign=True)
    # These two are functions of the configuration and stand in no file.
    model._hash_powers = _hash_powers(config.hash_group_sizes, config.hash_functions).to(device)
    model._hash_offsets = _hash_offsets(config).to(device)
    return model.eval().requires_grad_(False)


def check_device(device: str | torch.device) -> None:
    """Raises ValueError for a device that torch does not have here; says what to do."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{str(device)!r} is no device; give cpu, cuda or cuda:N") from None
    if wanted.type != "cuda" or torch.cuda.is_available():
        count = torch.cuda.device_count() if wanted.type == "cuda" else 0
        if wanted.type == "cuda" and (wanted.index or 0) >= count:
            raise ValueError(f"there is no {wanted}: this machine has {count} GPUs, cuda:0 to cuda:{count - 1}")
        return
    if torch.version.cuda is None and torch.version.hip is None:
        raise ValueError(
            f"device {wanted} needs a build of torch for GPUs, and this one ({torch.__version__}) is for CPUs: "
            "install another build (docs/gpu.md), or leave --device out"
        )
    raise ValueError(f"torch sees no GPU here, so there is no {wanted}: check nvidia-smi, or leave --device out")


def save_checkpoint(
    model: Blt, folder: str | Path, dtype: torch.dtype = torch.float32, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `config.json` and the weights of `model` to `folder`; the entropy model is always written as float32."""
    state = {stored_name(name): tensor for name, tensor in model.state_dict().items()}

    def kind(name: str) -> torch.dtype:
        return torch.float32 if name.startswith("model.patcher.") else dtype

    sizes = {name: tensor.numel() * kind(name).itemsize for name, tensor in state.items()}
    write_checkpoint(
        folder, model.config.to_dict(), sizes, lambda name: state[name].detach().to("cpu", kind(name)), max_shard_bytes
    )


def stored_name(name: str) -> str:
    """The file's name of a parameter of `Blt`."""
    return name if name == "lm_head.weight" else f"model.{name}"


class TensorFiles:
    """The tensors of a checkpoint folder, read one at a time. Raises CheckpointError for files that cannot be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        if (folder / WEIGHTS_FILE).exists():
            listed = None
            files = [WEIGHTS_FILE]
        else:
            listed = self._index()
            files = sorted(set(listed.values()))
        for file in files:
            for name in self._names(file):
                self._file_of[name] = file
        for name, file in (listed or {}).items():
            if self._file_of.get(name) != file:
                raise CheckpointError(f"{folder / file} lacks tensor {name!r}, which {INDEX_FILE} places there{AGAIN}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self._file_of[name]

    def read(self, name: str) -> Tensor:
        try:
            return self._open[self._file_of[name]].get_tensor(name)
        except (SafetensorError, OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.path(name)}: tensor {name} cannot be read ({error}){AGAIN}") from error

    def release(self, name: str) -> None:
        """Let go of what was read of a tensor's file: what is mapped counts as this process's memory."""
        file = self._file_of[name]
        with contextlib.suppress(SafetensorError, OSError, ValueError):  # the file is gone: the next read says so
            self._open[file] = safe_open(self.folder / file, framework="pt")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The type that a tensor is stored in."""
        kind = self._open[self._file_of[name]].get_slice(name).get_dtype()
        if kind not in _KINDS:
            raise CheckpointError(f"{self.path(name)}: tensor {name} is {kind}; {_SAVE_AS}")
        return _KINDS[kind]

    def itemsize(self, name: str) -> int:
        """Bytes per element of a tensor."""
        return self.dtype(name).itemsize

    def _names(self, file: str) -> list[str]:
        path = self.folder / file
        require_file(path)
        try:
            self._open[file] = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, though {INDEX_FILE} lists it{AGAIN}") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is truncated or no safetensors file ({error}){AGAIN}") from error
        return list(self._open[file].keys())

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX_FILE
        if not path.exists():
            raise CheckpointError(self._without_weights())
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise CheckpointError(f"{path} has no weight_map{AGAIN}")
        for name, file in listed.items():
            # A file name is all that an index may hold: a path could lead out of the checkpoint.
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{path} places {name!r} in {file!r}, no name of a safetensors file{AGAIN}")
        return listed

    def _without_weights(self) -> str:
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix.lower() in _PICKLES)
        if pickles:
            return (
                f"{self.folder} holds pickled weights ({', '.join(pickles[:3])}), which can run code when loaded and"
                f" are never read; convert them to {WEIGHTS_FILE} with safetensors"
            )
        return f"{self.folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; give a folder that holds the weights"


def write_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors of `sizes` bytes, fetched by name one shard at a time, and then `config.json`.

    Every file is written under a temporary name and moved into place; weight files of an earlier call are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(sizes, max_shard_bytes)
    files = [WEIGHTS_FILE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for names, file in zip(shards, files, strict=True):
        tensors = {name: read(name).contiguous() for name in names}
        with _placed(folder / file) as path:
            save_file(tensors, path, metadata={"format": "pt"})
            # safetensors writes for its user alone; a checkpoint is read by others too, as the folder allows.
            path.chmod(folder.stat().st_mode & 0o666)
    for pattern in ("model-*.safetensors", WEIGHTS_FILE, INDEX_FILE):
        for path in folder.glob(pattern):
            if path.name not in files:
                path.unlink()
    if len(shards) > 1:
        listed = {name: file for names, file in zip(shards, files, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(listed.items()))}
        with _placed(folder / INDEX_FILE) as path:
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    with _placed(folder / CONFIG_FILE) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in runs of at most `limit` bytes; a tensor larger than that has a file of its own."""
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if shards[-1] and total + size > limit:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when all went well."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _tied(folder: Path) -> bool:
    """Whether the output layer and the encoder's embedding are one tensor, of which a file then holds one name."""
    value = read_json(folder / CONFIG_FILE).get("tie_word_embeddings")
    if value not in (None, True, False):
        raise CheckpointError(f"{folder / CONFIG_FILE}: tie_word_embeddings must be true or false, not {value!r}")
    return bool(value)


def _sources(expected: Mapping[str, object], files: TensorFiles, *, tied: bool) -> dict[str, str]:
    """The stored name of every tensor of the model. Raises CheckpointError if one is missing or has no place."""
    sources = {name: name for name in expected}
    if tied:
        present = [name for name in _TIED if name in files] or list(_TIED)
        sources |= {name: name if name in files else present[0] for name in _TIED}
    missing = [name for name, source in sources.items() if source not in files]
    if missing:
        raise CheckpointError(
            f"{files.folder}: tensor {missing[0]} is missing ({len(missing)} in all); {CONFIG_FILE} describes another"
            " shape, or the weights are incomplete"
        )
    extra = [name for name in files if name not in expected]
    if extra:
        raise CheckpointError(
            f"{files.path(extra[0])}: tensor {extra[0]!r} is not part of the model that {CONFIG_FILE} describes"
            f" ({len(extra)} such in all); correct {CONFIG_FILE} or remove them"
        )
    return sources


def _checked(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """`tensor`, once it is known to be what the model needs."""
    if tensor.dtype not in _STORED_DTYPES:
        raise CheckpointError(f"tensor {name} is {tensor.dtype}; {_SAVE_AS}")
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(tensor.shape)}, but {CONFIG_FILE} makes it {list(shape)}; one of them is"
            " of another model"
        )
    if not _finite(tensor):
        raise CheckpointError(f"tensor {name} holds NaN or infinite values; the checkpoint is broken, use another one")
    return tensor


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and not _finite(cast):
        raise CheckpointError(f"tensor {name} has values beyond the range of {dtype}; load as float32 or bfloat16")
    return cast


def _finite(tensor: Tensor) -> bool:
    # The extremes carry every NaN and infinity, and need no mask as large as the tensor.
    return tensor.numel() == 0 or all(torch.isfinite(extreme) for extreme in tensor.aminmax())
