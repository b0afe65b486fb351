"""What log-probabilities take in a server's memory until somebody reads them (docs/operations.md, Memory)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastblt.server.request import Request, SamplingParams
from fastblt.server.request.results import ROUND_SIZE

#: Fills a stream that nobody reads with deltas as the engine's frames bring them; says how much memory that took.
_FILL = """
import asyncio, gc, random, sys
import msgspec
from fastblt.server.process.stream import DeltaStream
from fastblt.server.request import ByteLogprobs, Delta, Request, SamplingParams

top, count, length = map(int, sys.argv[1:])
wire, read = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Delta)
rng = random.Random(0)

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096

async def fill():
    params = SamplingParams(max_tokens=length, logprobs=top)
    requests = [Request(str(i), [1], params, 0.0) for i in range(count)]
    stream = DeltaStream(lambda *_: None, requests, whole=True)
    before = resident()
    for _ in range(length // 20):
        for request in requests:
            ids = rng.choices(range(260), k=20)
            best = [ByteLogprobs.of(-rng.random(), [(i, -rng.random()) for i in range(top)]) for _ in ids]
            stream.push(read.decode(wire.encode(Delta(request.request_id, ids, best))))
    print(resident() - before, stream.logprob_bytes)

asyncio.run(fill())
"""


@pytest.mark.parametrize(("top", "count", "length"), [(20, 8, 8000), (1, 16, 8000), (5, 4, 20000)])
def test_kept_logprobs_take_what_the_formula_says(top: int, count: int, length: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FILL, str(top), str(count), str(length)], capture_output=True, text=True, check=True
    )
    taken, formula = map(int, done.stdout.split())
    params = SamplingParams(max_tokens=length, logprobs=top)
    assert formula == count * Request("", [1], params, 0.0).logprob_bytes == count * length * (208 + 6 * top)
    assert 0.9 * formula < taken < 1.1 * formula


_FILL_ROUNDS = """
import gc
import msgspec
from fastblt.server.request import Delta, DecodingMethod, Origin, Round

wire, read = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Delta)

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096

kept, before = [], resident()
for at in range(1000, 21000):
    cost = 0.1 + at, at, at + 1, at + 2, at + 3, 0.1 * at, 0.2 * at
    one = Round(DecodingMethod.BLT, at, [100], [Origin.CAUSAL], [], 0, [], [0.5 + at], [at], *cost)
    kept.append(read.decode(wire.encode(Delta("r", [100], rounds=[one]))).rounds[0])
print((resident() - before) / len(kept))
"""


def test_kept_rounds_take_what_the_formula_says() -> None:
    done = subprocess.run([sys.executable, "-c", _FILL_ROUNDS], capture_output=True, text=True, check=True)
    params = SamplingParams(max_tokens=50, return_rounds=True)
    assert Request("", [1], params, 0.0).logprob_bytes == 50 * ROUND_SIZE
    assert 0.7 * ROUND_SIZE < float(done.stdout) < ROUND_SIZE
