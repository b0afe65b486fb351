"""`fastblt bench serve` against servers: ours in its own process, and small ones that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastblt.benchmarks.cli import app
from fastblt.benchmarks.load.client import Record
from fastblt.benchmarks.load.drive import drive
from fastblt.benchmarks.load.names import Dataset, Ramp
from fastblt.benchmarks.load.serve import Load, run, table
from fastblt.benchmarks.load.serving import Server, serving
from fastblt.benchmarks.load.workload import Job
from tests.benchmarks.load.test_arrivals import TRACE


@pytest.fixture(scope="module")
def server(checkpoint: str) -> Iterator[Server]:
    with serving(checkpoint, ["--max-running", "8", "--cache-size", "16MiB"]) as running:
        yield running


def load(server: Server, **settings: object) -> Load:
    base = {"base_url": f"http://127.0.0.1:{server.port}", "input_len": 40, "output_len": 12, "num_prompts": 10}
    return Load(**(base | settings))  # type: ignore[arg-type]


def test_closed_loop_of_mixed_methods_counts_what_the_server_counts(server: Server) -> None:
    before = server.metrics()["fastblt_generation_tokens_total"]
    decoding = ("blt", "blt-s", '{"method": "blt-d", "block_size": 4}')
    result = run(load(server, decoding=decoding, max_concurrency=3, warm_up=0, num_prompts=12), show=False)
    assert (result["completed"], result["failed"], result["errors_by_cause"]) == (12, 0, {})
    made = server.metrics()["fastblt_generation_tokens_total"] - before
    # A server that seems idle asks its engine for a byte now and then, to see that it answers.
    assert result["total_output_bytes"] == result["total_output_tokens"] == 144 <= made <= 148
    assert result["max_concurrent_requests"] <= 3 and result["total_input_bytes"] == 480
    assert {part["completed"] for part in result["by_method"].values()} == {4} and len(result["by_method"]) == 3
    assert 0 < result["p50_ttft_ms"] <= result["p99_ttft_ms"] <= result["p99_e2el_ms"]
    assert result["versions"]["python"] and result["machine"]["cores"]


def test_open_loop_follows_its_arrivals(server: Server) -> None:
    result = run(load(server, request_rate=20.0, burstiness=float("inf"), goodput=("ttft:60000",)), show=False)
    gaps = [b - a for a, b in zip(result["start_times"], result["start_times"][1:], strict=False)]
    assert sum(gaps) == pytest.approx(9 / 20, abs=0.2)
    assert result["request_goodput"] == result["request_throughput"] and result["burstiness"] == "inf"
    ramped = run(load(server, request_rate=20.0, ramp=Ramp.LINEAR, ramp_end_rate=80.0), show=False)
    assert ramped["completed"] == 10


def test_trace_is_replayed(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    settings = {"trace": path, "num_prompts": 4, "trace_rate": 8.0, "max_prompt_bytes": 90, "output_factor": 0.1}
    result = run(load(server, **settings), show=False)
    assert result["input_lens"] == [90, 90, 90, 80] and result["output_lens"] == [4, 3, 11, 120]
    assert result["start_times"][-1] - result["start_times"][0] == pytest.approx(3 / 8, abs=0.2)
    assert "prompts_cut 3" in table(result)


def test_refusals_are_counted_by_cause(server: Server) -> None:
    result = run(load(server, extra_body={"n": 100000}, warm_up=0, num_prompts=3), show=False)
    assert result["completed"] == 0 and result["failed"] == 3
    [(cause, count)] = result["errors_by_cause"].items()
    assert cause.startswith("HTTP 400") and count == 3


def test_command_writes_its_result(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "sub" / "result.json"
    url = f"http://127.0.0.1:{server.port}"
    arguments = ["bench", "serve", "--base-url", url, "--num-prompts", "4", "--output-len", "8", "--json", str(out)]
    answer = CliRunner().invoke(app, [*arguments, "--dataset-name", Dataset.HUMANEVAL, "--input-len", "30"])
    assert answer.exit_code == 0, answer.output
    assert "Successful requests" in answer.output and json.loads(out.read_text())["completed"] == 4
    failed = CliRunner().invoke(app, ["bench", "serve", "--base-url", "http://127.0.0.1:9", "--quiet"])
    assert failed.exit_code == 1 and "start the server" in failed.output


def answers(*parts: bytes) -> list[Record]:
    """What a client makes of a server that answers any request so, and then closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.close()

    async def all_of_it() -> list[Record]:
        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with listening:
            done = await drive(url, [Job("a", 4, {})], None, model="m", warm_up=0, timeout=0.5, show=False)
        return done.records

    return asyncio.run(all_of_it())


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
CHUNK = b'data: {"choices": [{"index": 0, "text": "a\\u00e9", "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}\n\n'


@pytest.mark.parametrize(
    ("parts", "cause"),
    [
        ([HEAD, CHUNK], "stream ended early"),
        ([HEAD, CHUNK, b'data: {"error": {"code": "engine_dead"}}\n\n'], "error in the stream (engine_dead)"),
        ([HEAD, b"data: {nothing\n\n"], "an event that is no JSON"),
        ([b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n"], "HTTP 503"),
        ([b"HTTP/1.1 429 no\r\n\r\n" + b'{"error": {"code": "queue_full"}}'], "HTTP 429 queue_full"),
        ([b"HTTP/1.1 422 no\r\n\r\n" + b'{"detail": "unexpected: ignore_eos"}'], "HTTP 422 unexpected: ignore_eos"),
        ([b"HTTP/1.1 500 no\r\n\r\n" + b"no JSON"], "HTTP 500"),
        ([b"nothing like HTTP\r\n\r\n"], "connection lost (ClientResponseError)"),
    ],
)
def test_causes_of_failure(parts: list[bytes], cause: str) -> None:
    [record] = answers(*parts)
    assert record.error == cause


def test_a_stream_without_usage_or_done_is_an_answer() -> None:
    """As `transformers serve` ends it, with comments between events as llama.cpp's server sends them."""
    [record] = answers(HEAD, b": ping\n\n", CHUNK, CHUNK, LAST)
    assert record.error == "" and record.text_bytes == 6 and record.output_tokens is None
    assert 0 < record.ttft < record.latency and record.finish_reason == "stop"
