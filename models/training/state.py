"""The resumable state of a run: one safetensors file for each process, and `state.json` that says which ones count.

A file has the process's rows of every tensor. Any number of processes can go on from it: each reads its own rows from
whatever files have them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastblt.models.training.files import write_atomically, write_json
from fastblt.models.training.parallel import World

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Length:
    """How far a run is: steps, seconds of training, and processor seconds of all processes, compilation included."""

    steps: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> Length:
        """That of the run in a folder; zero where none has been saved."""
        if not (folder / STATE_FILE).is_file():
            return cls()
        record = json.loads((folder / STATE_FILE).read_text())
        return cls(record["steps"], record["seconds"], record["processor_seconds"])


def save(folder: Path, tensors: Iterable[tuple[str, Tensor]], length: Length, world: World) -> None:
    """Save the tensors of all processes as the state of the run in `folder`. The state before is then removed."""
    name = f"state-{length.steps:08}"
    (folder / name).mkdir(parents=True, exist_ok=True)
    own: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for key, tensor in tensors:
        rows = tensor.shape[0] if tensor.ndim else 0
        first = _rows(rows, world)[0] if isinstance(tensor, DTensor) else 0
        own[key] = own_rows(tensor.detach()).cpu().contiguous()
        places[key] = json.dumps([first, rows])
    write_atomically(folder / name / _file(world.rank, world.size), lambda to: save_file(own, to, places))
    world.wait()
    if world.rank == 0:
        write_json(folder / STATE_FILE, {"folder": name, "processes": world.size, **asdict(length)})
        for old in folder.glob("state-*"):
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)
    world.wait()


class Saved:
    """The state of the run in a folder, as the processes of another run, or none, see it."""

    def __init__(self, folder: Path) -> None:
        record = json.loads((folder / STATE_FILE).read_text())
        files = [folder / record["folder"] / _file(rank, record["processes"]) for rank in range(record["processes"])]
        self._files = [safe_open(file, "pt") for file in files]
        self._places = [{key: json.loads(value) for key, value in file.metadata().items()} for file in self._files]

    def names(self) -> list[str]:
        return list(self._places[0])

    def whole(self, name: str) -> Tensor:
        """All of a tensor."""
        rows = self._places[0][name][1]
        return self._read(name, 0, rows) if rows else self._files[0].get_tensor(name)

    def local(self, name: str, like: Tensor, world: World) -> Tensor:
        """The rows of a tensor that this process has of `like`."""
        return self._read(name, *_rows(like.shape[0], world)) if isinstance(like, DTensor) else self.whole(name)

    def _read(self, name: str, first: int, end: int) -> Tensor:
        parts = []
        for file, places in zip(self._files, self._places, strict=True):
            cut = file.get_slice(name)
            begins = places[name][0]
            low, high = max(first, begins) - begins, min(end, begins + cut.get_shape()[0]) - begins
            if low < high:
                parts.append(cut[low:high])
            if len(parts) == 1 and begins == 0 and cut.get_shape()[0] == places[name][1]:
                break  # a tensor that is not sharded stands whole in every file
        return torch.cat(parts) if parts else self._files[0].get_slice(name)[0:0]


def own_rows(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process has: all, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows(count: int, world: World) -> tuple[int, int]:
    """The rows of a parameter that a process has: even shares rounded up, and the last ones what is left."""
    share = -(-count // world.size)
    return min(world.rank * share, count), min((world.rank + 1) * share, count)


def _file(rank: int, size: int) -> str:
    return f"process-{rank:05}-of-{size:05}.safetensors"
