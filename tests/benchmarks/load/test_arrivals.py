from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastblt.benchmarks.load.arrivals import arrivals, read_trace, scale_trace
from fastblt.benchmarks.load.names import Ramp

# Four requests in 3.6 seconds, in the format of the published files.
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:05.0781490,110,27
2023-11-16 18:17:07.5799600,20,300
"""


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, np.inf])
def test_rate_and_burstiness_are_what_was_asked_for(burstiness: float) -> None:
    times = arrivals(20_000, rate=5.0, burstiness=burstiness, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    # The coefficient of variation of a gamma distribution.
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, abs=0.05)


@pytest.mark.parametrize(("ramp", "middle"), [(Ramp.LINEAR, 5.5), (Ramp.EXPONENTIAL, 10**0.5)])
def test_a_ramp_goes_from_one_rate_to_the_other(ramp: Ramp, middle: float) -> None:
    times = arrivals(1001, 1.0, np.inf, ramp=ramp, end_rate=10.0)
    rates = 1 / np.diff(times)
    assert rates[0] == pytest.approx(1.0) and rates[-1] == pytest.approx(10.0, rel=0.01)
    assert rates[500] == pytest.approx(middle, rel=0.01)


def test_same_seed_same_arrivals_and_no_rate_is_at_once() -> None:
    assert (arrivals(50, 2.0, seed=3) == arrivals(50, 2.0, seed=3)).all()
    assert (arrivals(50, 2.0, seed=3) != arrivals(50, 2.0, seed=4)).any()
    assert not arrivals(50, np.inf).any() and len(arrivals(0, 1.0)) == 0


@pytest.mark.parametrize(("rate", "burstiness", "end"), [(0.0, 1.0, None), (1.0, 0.0, None), (np.inf, 1.0, 2.0)])
def test_what_means_nothing_is_refused(rate: float, burstiness: float, end: float | None) -> None:
    with pytest.raises(ValueError, match="rate"):
        arrivals(3, rate, burstiness, ramp=Ramp.LINEAR if end else None, end_rate=end)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    return file


def test_times_and_sizes(path: Path) -> None:
    trace = read_trace(path)
    assert trace.seconds == pytest.approx([0, 0.052, 1.098189, 3.6], abs=1e-5)
    assert trace.prompt_bytes.tolist() == [19232, 12720, 440, 80]
    assert trace.output_bytes.tolist() == [40, 32, 108, 1200]
    assert read_trace(path, first=1, count=2).seconds == pytest.approx([0, 1.046189], abs=1e-5)


def test_scaling_keeps_the_pattern_and_says_what_it_did(path: Path) -> None:
    trace = read_trace(path)
    scaled = scale_trace(trace, rate=0.5, prompt_factor=0.1, output_factor=0.5, max_prompt_bytes=1500)
    assert 3 / scaled.seconds[-1] == pytest.approx(0.5)
    assert np.diff(scaled.seconds) / np.diff(trace.seconds) == pytest.approx([scaled.factors["time"]] * 3)
    assert scaled.prompt_bytes.tolist() == [1500, 1272, 44, 8]
    assert scaled.output_bytes.tolist() == [20, 16, 54, 600]
    assert scaled.factors["prompts_cut"] == 1 and scaled.factors["outputs_cut"] == 0
    assert scaled.factors["recorded_rate"] == pytest.approx(3 / 3.6, rel=1e-4)


def test_files_that_are_no_trace_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 4 requests"):
        read_trace(path, count=9)
    for text, message in (("a,b\n1,2\n", "first line"), (TRACE + "yesterday,1,2\n", "cannot be read")):
        other = tmp_path / "other.csv"
        other.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_trace(other)
