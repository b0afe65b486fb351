"""Names for the command line. This imports no large packages, so that the command line starts fast."""

from __future__ import annotations

from enum import StrEnum


class Dataset(StrEnum):
    """The source of prompts."""

    HELD_OUT = "held-out"
    HUMANEVAL = "humaneval"
    SYNTHETIC = "synthetic"
    FILE = "file"


class Ramp(StrEnum):
    """How the rate grows from the first request to the last."""

    LINEAR = "linear"
    EXPONENTIAL = "exponential"
