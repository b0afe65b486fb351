"""The mean of checkpoints that were trained on from the same weights, as a rule better than each of them.

Weights that go different ways from one place by a low rate stay in one basin, and their errors partly cancel (Wortsman
et al. 2022, "Model soups"). Means of models that never met are worth nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastblt.models.checkpoint import TensorFiles, write_checkpoint
from fastblt.models.checkpoint_folder import CONFIG_FILE, CheckpointError, checkpoint_folder, read_json
from fastblt.models.training.record import RUNS_FILE, merged, read_record

#: Keys of a configuration that may differ: they follow from the weights.
_OF_THE_WEIGHTS = ("acceptance",)


def average(sources: Sequence[str], output: Path) -> None:
    """Write the mean of the checkpoints `sources`, folders or Hub ids, tensor by tensor, in the first one's dtypes.

    What was measured of their acceptance is left out. Raises CheckpointError for fewer than two, and where one has
    another configuration or other tensors.
    """
    if len(sources) < 2:
        raise CheckpointError("give two checkpoints at least: a mean of one is that one")
    folders = [checkpoint_folder(source) for source in sources]
    configs = [_config(folder) for folder in folders]
    first, *others = files = [TensorFiles(folder) for folder in folders]
    for folder, config, own in zip(folders[1:], configs[1:], others, strict=True):
        if different := sorted(key for key in config.keys() | configs[0] if config.get(key) != configs[0].get(key)):
            raise CheckpointError(f"{folder} has another {different[0]} than {folders[0]}: they are no two ways of one")
        if {name: own.shape(name) for name in own} != {name: first.shape(name) for name in first}:
            raise CheckpointError(f"{folder} has other tensors than {folders[0]}")

    records = [record for folder in folders if (record := read_record(folder)) is not None]
    # Runs that nobody recorded are not to be told as if there were none.
    record = merged(records) if len(records) == len(folders) else None

    def read(name: str) -> Tensor:
        total = torch.zeros(first.shape(name), dtype=torch.float64)
        for one in files:
            total += one.read(name)
        return (total / len(files)).to(first.dtype(name))

    sizes = {name: first.read(name).numel() * first.itemsize(name) for name in first}
    write_checkpoint(output, configs[0], sizes, read)
    if record is not None:
        record.write(output)
    else:
        (output / RUNS_FILE).unlink(missing_ok=True)


def _config(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in read_json(folder / CONFIG_FILE).items() if key not in _OF_THE_WEIGHTS}
