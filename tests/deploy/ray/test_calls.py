"""What of a request decides where it goes, and the metrics of several replicas as one page."""

from __future__ import annotations

import json

from prometheus_client.parser import text_string_to_metric_families

from fastblt.deploy.ray.calls import AFFINITY_LENGTH, Call, affinity
from fastblt.deploy.ray.metrics import merge


def word(method: str = "POST", **body: object) -> str:
    return affinity(Call(method, "/v1/completions", b"", [], json.dumps(body).encode()))


def test_affinity_is_of_the_beginning_and_the_salt() -> None:
    head = "x" * AFFINITY_LENGTH
    assert word(prompt=head + "a") == word(prompt=head + "b", max_tokens=3) == word(prompt=[head + "c", "other"]) != ""
    assert word(prompt="a" + head) != word(prompt="b" + head)
    assert word(prompt=head, cache_salt="one") != word(prompt=head, cache_salt="two")
    assert word(prompt=[1, 40, 41]) == word(prompt=[[1, 40, 41], [1]]) != word(prompt=[1, 40, 42])


def test_without_affinity() -> None:
    assert word() == word(prompt="") == word(prompt=[]) == word(prompt={"a": 1}) == ""
    assert word("GET", prompt="a") == ""
    assert affinity(Call("POST", "/", b"", [], b"\xff{")) == affinity(Call("POST", "/", b"", [], b"[1]")) == ""


def test_merged_metrics() -> None:
    page = """# HELP fastblt_passes_total Decoder passes
# TYPE fastblt_passes_total counter
fastblt_passes_total %d.0
# HELP fastblt_wait_seconds Waiting
# TYPE fastblt_wait_seconds histogram
fastblt_wait_seconds_bucket{le="1.0"} 2.0
fastblt_wait_seconds_bucket{le="+Inf"} 3.0
fastblt_wait_seconds_count 3.0
fastblt_wait_seconds_sum 4.5
"""
    families = list(text_string_to_metric_families(merge({"a": page % 1, "b": page % 2}).decode()))
    assert [family.type for family in families] == ["counter", "histogram"]
    passes = {sample.labels["replica"]: sample.value for sample in families[0].samples}
    assert passes == {"a": 1.0, "b": 2.0}
    assert len(families[1].samples) == 8 and {s.labels["replica"] for s in families[1].samples} == {"a", "b"}
