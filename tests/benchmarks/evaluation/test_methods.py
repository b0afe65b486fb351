from __future__ import annotations

from fastblt.benchmarks.evaluation.methods import measure
from fastblt.benchmarks.report.method_tables import quality


def test_a_lossless_method_keeps_all_lines_and_single_places_are_left_out() -> None:
    result = measure(setting=["blt", "blt-s k8", "blt-d-16 a0.5"], prompts=8, length=16)
    rows = result["settings"]
    assert rows["blt"]["parses"] == rows["blt-s k8"]["parses"] and "parsed" not in rows["blt"]
    blt, drafted, diffused = quality({"quality": result}).splitlines()[2:]
    assert blt.split("|")[2:4] == drafted.split("|")[2:4] == [f" {100 * rows['blt']['parses']:.1f} ", " 100 "]
    assert " to " in diffused or diffused.split("|")[3] == " 100 "
