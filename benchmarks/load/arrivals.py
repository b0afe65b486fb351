"""Arrival times of open-loop load, which does not wait for answers: random, or from recorded traces.

Recordings are the Azure LLM inference traces of 2023 (CC-BY 4.0), released with "Splitwise: Efficient generative LLM
inference using phase splitting" (ISCA 2024). Columns: TIMESTAMP, ContextTokens, GeneratedTokens. They hold no text;
sizes are in subword tokens.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastblt.benchmarks.load.names import Ramp


def arrivals(
    count: int,
    rate: float,
    burstiness: float = 1.0,
    seed: int = 0,
    *,
    ramp: Ramp | None = None,
    end_rate: float | None = None,
) -> NDArray[np.float64]:
    """Arrival times of requests at `rate` per second: seconds [count] after the start.

    Gaps are gamma-distributed with shape `burstiness`: 1 is a Poisson process, less gives bursts, more is more regular,
    and infinity gives constant gaps. An infinite `rate` sends everything at once. With a `ramp` the rate changes from
    `rate` to `end_rate` over the requests. Raises ValueError for rates and shapes that are not positive.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError("the request rate and the burstiness must be positive; inf is allowed")
    if ramp is None:
        rates = np.full(count, rate)
    elif end_rate is None or not 0 < end_rate < np.inf or rate == np.inf:
        raise ValueError("a ramp needs a positive, finite rate to begin with and another to end with")
    else:
        share = np.arange(count) / max(1, count - 1)
        rates = rate + (end_rate - rate) * share if ramp is Ramp.LINEAR else rate * (end_rate / rate) ** share
    if burstiness == np.inf:
        gaps = np.ones(count)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, count)
    gaps = gaps / rates
    # The first request starts the clock.
    return np.concatenate([[0.0], gaps.cumsum()[:-1]]) if count else gaps


#: The approximate number of bytes of a subword token.
BYTES_PER_TOKEN = 4.0
_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@dataclass(frozen=True)
class Trace:
    """Requests in order: seconds [n] after the first one, and sizes of prompts and outputs in bytes [n].

    `factors` describes how the recording was scaled. It is printed and kept with every figure.
    """

    seconds: NDArray[np.float64]
    prompt_bytes: NDArray[np.int64]
    output_bytes: NDArray[np.int64]
    factors: dict[str, float]


def read_trace(path: Path, first: int = 0, count: int | None = None) -> Trace:
    """`count` requests from number `first` on. Raises ValueError if the file is not such a trace or is too short."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        if next(rows, None) != _COLUMNS:
            raise ValueError(f"{path} is no Azure LLM inference trace: its first line is not {','.join(_COLUMNS)}")
        wanted = list(rows)[first : None if count is None else first + count]
    if not wanted or (count is not None and len(wanted) < count):
        raise ValueError(f"{path} has {len(wanted)} requests from number {first} on; ask for fewer or begin earlier")
    try:
        # Times have seven decimals. The standard library reads at most six.
        times = [datetime.fromisoformat(row[0][:26]).timestamp() for row in wanted]
        sizes = np.array([[int(row[1]), int(row[2])] for row in wanted])
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} has a line that cannot be read: {error}") from error
    seconds = np.array(times)
    in_bytes = np.maximum(1, sizes * BYTES_PER_TOKEN).astype(np.int64)
    return Trace(seconds - seconds[0], in_bytes[:, 0], in_bytes[:, 1], {"bytes_per_token": BYTES_PER_TOKEN})


def scale_trace(
    trace: Trace,
    *,
    rate: float | None = None,
    prompt_factor: float = 1.0,
    output_factor: float = 1.0,
    max_prompt_bytes: int | None = None,
    max_output_bytes: int | None = None,
) -> Trace:
    """The trace scaled to another speed and size.

    Arrivals are stretched or compressed to a mean of `rate` requests per second. Sizes are multiplied by the factors
    and then limited to the maxima. `factors` of the result records this: `time`, by which gaps were multiplied,
    `prompt`, `output`, and how many requests each maximum limited.
    """
    recorded = (len(trace.seconds) - 1) / trace.seconds[-1] if trace.seconds[-1] > 0 else np.inf
    time = 1.0 if rate is None else recorded / rate
    prompts, prompts_cut = _scaled(trace.prompt_bytes, prompt_factor, max_prompt_bytes)
    outputs, outputs_cut = _scaled(trace.output_bytes, output_factor, max_output_bytes)
    factors = trace.factors | {
        "recorded_rate": float(recorded),
        "time": float(time),
        "prompt": prompt_factor,
        "output": output_factor,
        "prompts_cut": prompts_cut,
        "outputs_cut": outputs_cut,
    }
    return Trace(trace.seconds * time, prompts, outputs, factors)


def _scaled(sizes: NDArray[np.int64], factor: float, maximum: int | None) -> tuple[NDArray[np.int64], int]:
    scaled = np.maximum(1, np.rint(sizes * factor)).astype(np.int64)
    if maximum is None:
        return scaled, 0
    return np.minimum(scaled, maximum), int((scaled > maximum).sum())
