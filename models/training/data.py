"""Prepared data on disk, memory-mapped, and the order in which training reads it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastblt.models.training.corpus import Corpus
from fastblt.models.training.files import write_atomically


class Sequential(Protocol):
    """Training or held-out sequences of one length."""

    def __len__(self) -> int: ...

    def take(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        """The sequences with these numbers: ids int64 [N, length]."""


class Chunks:
    """Sequences in a saved array [N, length], which is mapped."""

    def __init__(self, path: Path) -> None:
        self.array = load_array(path)

    def __len__(self) -> int:
        return len(self.array)

    def take(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        return self.array[numbers].astype(np.int64)


def save_array(path: Path, array: NDArray) -> None:
    def write(to: Path) -> None:
        with to.open("wb") as file:
            np.save(file, array)

    write_atomically(path, write)


def load_array(path: Path) -> NDArray:
    """A saved array, memory-mapped and read-only."""
    return np.load(path, mmap_mode="r")


def save_corpus(folder: Path, corpus: Corpus) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_array(folder / "held_out.npy", corpus.held_out)
    save_array(folder / "train.npy", corpus.train)


def rows(count: int, step: int, group: int, groups: int, batch: int, seed: int) -> list[int]:
    """The numbers, below `count`, of the sequences of micro-batch `group` of a step. Every epoch has its own
    permutation."""
    first = (step * groups + group) * batch
    return [int(_order(count, index // count, seed)[index % count]) for index in range(first, first + batch)]


@lru_cache(maxsize=2)
def _order(count: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)
