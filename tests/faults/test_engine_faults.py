"""What goes wrong in the engine process: passes that raise, NaN, no memory, death, standstill."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from tests.faults.faulty import ask, assert_one_end, run, serving
from tests.faults.injected import POISON
from tests.server.api.running import until

METHODS = [{"method": "blt"}, {"method": "blt-s"}, {"method": "blt-d"}, {"method": "blt-dv"}, {"method": "blt-dsv"}]


def test_passes_that_raise_nan_and_no_memory(checkpoint: str, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, poison=True, raise_at=[30, 75], oom_at=[90, 140]) as server:
        # All run in the passes that raise.
        bodies = [
            {"prompt": f"prompt {i}", "stream": i % 2 == 0, "decoding": METHODS[i % 5], "max_tokens": 300}
            for i in range(15)
        ]
        outcomes = run(*(ask(server, **body) for body in bodies))
        ends = assert_one_end(outcomes)
        assert ends.keys() <= {"pass_failed", "length"} and ends["pass_failed"] > 0
        assert {outcome.status for outcome in outcomes if outcome.code} <= {200, 500}
        # It goes on, and out of memory is nothing that anybody sees.
        while server.metrics()["fastblt_passes_total"] < 160:
            outcomes += run(*(ask(server, prompt=f"again {i}", stream=i == 0, max_tokens=80) for i in range(3)))
        assert_one_end(outcomes)
        assert server.log().count("memory ran out") >= 2 and server.log().count("a pass failed") == 2
        # NaN belongs to the request that made it, whatever its method and its neighbors.
        bodies = [
            {
                "prompt": f"neighbor {i}" + POISON * (i % 3 == 0),
                "decoding": METHODS[i % 5],
                "stream": i % 2 == 0,
                "seed": i,
            }
            for i in range(15)
        ]
        outcomes = run(*(ask(server, **body) for body in bodies))
        assert_one_end(outcomes)
        assert [outcome.code for outcome in outcomes] == ["not_finite" if i % 3 == 0 else None for i in range(15)]
        assert all(o.headers["x-should-retry"] == "false" for o in outcomes if o.code and o.status == 500)
        values = server.metrics()
        assert values["fastblt_corrupted_requests_total"] == 5
        assert values['fastblt_requests_failed_total{cause="not_finite"}'] == 5
        server.assert_sound()


def test_a_killed_engine_is_seen_by_everybody(checkpoint: str, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path) as server:

        async def kill() -> None:
            while server.metrics()["fastblt_num_requests_running"] < 16:
                await asyncio.sleep(0.05)
            os.kill(server.engine, signal.SIGKILL)

        bodies = [{"prompt": f"p{i}", "stream": i % 2 == 0, "max_tokens": 4000} for i in range(24)]
        *outcomes, _ = run(*(ask(server, **body) for body in bodies), kill())
        assert assert_one_end(outcomes) == {"engine_died": 24}
        start = time.monotonic()
        assert server.status("/health") == server.status("/ready") == 503
        answer = server.http.post("/v1/completions", json={"prompt": "Hi"})
        assert time.monotonic() - start < 1
        assert answer.status_code == 503 and answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"]["code"] == "dead"
        assert server.ended()["error"] == 24
        values = server.metrics()
        assert values["fastblt_num_requests_running"] == values["fastblt_kv_cache_usage_perc"] == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_a_killed_engine_is_replaced(checkpoint: str, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, "--on-engine-failure", "restart") as server:
        first = server.engine
        os.kill(first, signal.SIGKILL)
        until(lambda: server.http.get("/ready").json().get("error", {}).get("code") == "loading", 5)
        until(lambda: server.status() == 200, 60)
        assert server.engine != first and server.metrics()["fastblt_engine_restarts_total"] == 1
        server.assert_sound()


def test_a_stalled_engine(checkpoint: str, tmp_path: Path) -> None:
    limit = 2.0
    with serving(checkpoint, tmp_path, "--stall-timeout", str(limit)) as server:
        os.kill(server.engine, signal.SIGSTOP)
        start = time.monotonic()
        try:
            while (seconds := time.monotonic() - start) < limit and server.status("/ready") == 200:
                # It answers, whatever it says: the limit may be reached between the two.
                assert server.status("/health") in (200, 503)
                assert time.monotonic() - start - seconds < 1
            assert server.status("/ready") == 503 and time.monotonic() - start < limit
            # It may come back; until then nobody is to wait for it.
            answer = server.http.post("/v1/completions", json={"prompt": "Hi"})
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "stalled"
        finally:
            os.kill(server.engine, signal.SIGCONT)
        until(lambda: server.status() == 200)
        server.assert_sound()


def test_a_clock_that_jumps(checkpoint: str, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    args = ("--stall-timeout", "3", "--queue-timeout", "30", "--request-timeout", "60")
    with serving(checkpoint, tmp_path, *args, clock=str(clock), pause=0.004) as server:

        async def jump(seconds: float) -> None:
            while server.metrics()["fastblt_num_requests_running"] < 4:
                await asyncio.sleep(0.05)
            clock.write_text(str(seconds))

        for seconds in (-86400.0, 86400.0):
            asked = [ask(server, prompt=f"p{i}", stream=True, max_tokens=200) for i in range(4)]
            *outcomes, _ = run(*asked, jump(seconds))
            assert assert_one_end(outcomes) == {"length": 4}
        # Nor is it a hanging engine when both processes were suspended.
        for pid in (server.process.pid, server.engine):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)
        for pid in (server.process.pid, server.engine):
            os.kill(pid, signal.SIGCONT)
        assert server.status() == 200
        times = [value for name, value in server.metrics().items() if name.endswith("seconds_sum")]
        assert all(0 <= value < 1000 for value in times)
        server.assert_sound()
