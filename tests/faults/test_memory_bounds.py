"""What clients can make a server's two processes hold, beside the formulas of docs/operations.md (Memory)."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread

from fastblt.server.api.bodies import MAX_HELD_BYTES
from fastblt.server.api.body import MAX_PROMPT_IDS, max_body_bytes
from tests.faults.faulty import SAFE, private_bytes, serving
from tests.faults.test_client_faults import posted
from tests.server.api.running import until

LENGTH = 32768
#: Of a connection whose request is on its way: what is not counted of its body, and what has been received beyond it.
CONNECTION_BYTES = 192 * 2**10


def test_unfinished_bodies_take_what_they_may_and_no_more(checkpoint: str, tmp_path: Path) -> None:
    size = max_body_bytes(LENGTH)
    with serving(checkpoint, tmp_path, "--max-model-len", str(LENGTH)) as server:
        before = private_bytes(server.process.pid)
        # The second time it is the same memory.
        for _ in range(2):
            with ExitStack() as stack:
                sockets = [stack.enter_context(posted(server, b"", length=size)) for _ in range(40)]
                threads = [Thread(target=_send, args=(sock, b" " * (size - 1))) for sock in sockets]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                taken = private_bytes(server.process.pid) - before
                formula = MAX_HELD_BYTES + len(sockets) * CONNECTION_BYTES
                assert 0.9 * MAX_HELD_BYTES < taken < 1.1 * formula, (taken, formula)
                # Who sends little is served meanwhile.
                body = {"prompt": "Hi", "max_tokens": 2, **SAFE}
                assert server.http.post("/v1/completions", json=body).status_code == 200
        assert server.metrics()['fastblt_requests_rejected_total{cause="bodies_full"}'] >= 50


def _send(sock: socket.socket, data: bytes) -> None:
    sock.settimeout(20)
    # Who is refused is cut off.
    with suppress(OSError):
        sock.sendall(data)


def test_a_full_queue_takes_what_the_formula_says(checkpoint: str, tmp_path: Path) -> None:
    calls = 16
    limits = ("--max-model-len", str(LENGTH), "--max-running", "1", "--max-waiting", "1000", "--cache-size", "256MiB")
    with serving(checkpoint, tmp_path, *limits, pause=0.2) as server:
        length = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
        prompts = MAX_PROMPT_IDS // length
        first = [server.process.pid, server.engine]
        # Something runs, so that all that follows waits.
        running = json.dumps({"prompt": "Hi", "max_tokens": 4000, **SAFE}).encode()
        with ExitStack() as stack:
            stack.enter_context(posted(server, running))
            until(lambda: server.metrics()["fastblt_num_requests_running"] == 1)
            before = [private_bytes(pid) for pid in first]
            for call in range(calls):
                texts = [f"{call:04d}{i:04d}".ljust(length - 2, "x") for i in range(prompts)]
                stack.enter_context(posted(server, json.dumps({"prompt": texts, "max_tokens": 1, **SAFE}).encode()))
            until(lambda: server.metrics()["fastblt_num_requests_waiting"] == calls * prompts, 60)
            taken = [private_bytes(pid) - start for pid, start in zip(first, before, strict=True)]
        ids = calls * prompts * length
        formulas = [9 * ids, 16 * ids]
        assert all(0.9 * most < found < 1.1 * most for found, most in zip(taken, formulas, strict=True)), (
            taken, formulas
        )  # fmt: skip
