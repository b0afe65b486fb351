"""Names that users type. Nothing here imports anything heavy, for the command line needs them at once."""

from __future__ import annotations

from enum import StrEnum


class Dataset(StrEnum):
    """Where prompts come from."""

    HELD_OUT = "held-out"
    HUMANEVAL = "humaneval"
    SYNTHETIC = "synthetic"
    FILE = "file"


class Ramp(StrEnum):
    """How the rate grows from the first request to the last."""

    LINEAR = "linear"
    EXPONENTIAL = "exponential"
