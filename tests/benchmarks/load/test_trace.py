from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastblt.benchmarks.load.trace import read_trace, scale_trace

# Four requests in 3.6 seconds, in the format of the published files.
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:05.0781490,110,27
2023-11-16 18:17:07.5799600,20,300
"""


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
