"""The report, made of results as the commands leave them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastblt.benchmarks.load.client import Record
from fastblt.benchmarks.load.metrics import summarize
from fastblt.benchmarks.machine import measured_with
from fastblt.benchmarks.report.charts import draw_all
from fastblt.benchmarks.report.facts import best_lossless, headline
from fastblt.benchmarks.report.page import page, write_report
from fastblt.benchmarks.savings.methods import MOST_LOOPS, measure
from fastblt.benchmarks.settings import chosen
from fastblt.models.blt import Blt


def part(name: str, **result: Any) -> dict[str, Any]:
    command = {"command": ["fastblt", "bench", name], "checkpoint": "0123456789abcdef", "model": "tiny"}
    return {"part": command, **measured_with(), **result}


def load(streams: int, **more: Any) -> dict[str, Any]:
    records = [
        Record("blt", 10, start=0.1 * at, ttft=0.05, latency=0.25, chunks=[(0.05, 4), (0.25, 8)], output_tokens=12)
        for at in range(streams)
    ]
    figures = summarize(records, 1.0, levels={"ttft": 100.0}, detailed=False)
    return part("serve", **figures, goodput_ms={"ttft": 100.0}, num_prompts=streams, **more)


@pytest.fixture(scope="module")
def results(model: Blt, prompts: list[list[int]]) -> dict[str, dict[str, Any]]:
    run = measure(model, prompts, 16, settings=chosen((4,), "headline"), batch=2, budget=0.0)
    return {
        "methods-greedy-b8": part("methods", batches={"8": run}),
        "sweep-blt-c1": load(1),
        "sweep-blt-c16": load(16),
        "trace-code": load(5, trace_factors={"time": 2.5, "prompt": 0.05}, server_command="fastblt serve"),
        "peer-transformers": part(
            "peer", peer="theirs", output_byte_throughput=2.0, ours={"blt": 80.0, "auto": 120.0}, num_prompts=3,
            batches={"2": 1.0, "8": 3.0}, ours_together={"blt": 900.0, "auto": 1200.0}, together=32,
            over={"blt": 40.0, "auto": 60.0}, together_over={"blt": 300.0, "auto": 400.0},
            output_len=8, equal_bytes=24,
        ),
        "peer-llama-cpp-c1": load(2, weights=11e6, bytes_per_token=3.0, server="llama_cpp.server"),
    }  # fmt: skip


class Checker(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    text = write_report(tmp_path).read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == [] and "http" not in text.replace("through HTTP", "")
    assert len(checker.sources) >= 4 and all(source.startswith("data:image/png;base64,") for source in checker.sources)
    cpu = results["sweep-blt-c1"]["machine"]["cpu"]
    for wanted in (cpu, "0123456789abcdef", "sweep-blt-c16", "time 2.5", "not compared".capitalize(), "blt-dv-4 1step"):
        assert wanted in text, wanted
    # What was not run leaves no trace, and the same results make the same page.
    assert text == write_report(tmp_path).read_text()
    few = {"sweep-blt-c1": results["sweep-blt-c1"]}
    assert "<h2>Methods</h2>" not in page(few, {}) and "<h2>Load</h2>" in page(few, {})


def test_charts_follow_the_data(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert draw_all(results, tmp_path) == ["throughput.png", "savings.png", "predicted.png", "acceptance.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("throughput.png", "savings.png"))
    assert draw_all({}, tmp_path) == [] and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="bench all"):
        write_report(tmp_path)


def test_headlines_are_of_texts_that_do_not_loop(results: dict[str, dict[str, Any]]) -> None:
    run = json.loads(json.dumps(results["methods-greedy-b8"]["batches"]["8"]))
    for row in run["settings"].values():
        row["loops"], row["time_saved"] = 0.0, min(row["time_saved"], 0.8)
    run["settings"]["blt-s k8"]["time_saved"] = 0.9
    run["settings"]["blt-d-4 a0.7"]["time_saved"] = 0.95
    assert best_lossless(run) == ("blt-s k8", run["settings"]["blt-s k8"])
    run["settings"]["blt-s k8"]["loops"] = MOST_LOOPS
    name, row = best_lossless(run) or ("", {})
    assert name != "blt-s k8" and row["time_saved"] < 0.9
    run["settings"]["blt"]["loops"] = 0.5
    assert best_lossless(run) is None


def test_facts_are_figures_of_the_results(results: dict[str, dict[str, Any]]) -> None:
    facts = dict(headline(results))
    assert "192 bytes a second (`blt`, 16 clients" in facts["Most text through HTTP"]
    [trace] = [value for name, value in facts.items() if "code completion" in name]
    assert trace == "100 % are good: at most 100 ms to the first byte"
    assert "40 times" in facts["Against `transformers` with the same weights, one request"]
    assert headline({}) == []
