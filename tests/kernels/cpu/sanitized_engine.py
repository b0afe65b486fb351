"""An engine of the shipped checkpoint with requests of all methods at once, for `sanitized.py`: two threads, prompts in
chunks, draws, truncation, statistics, penalties."""

from __future__ import annotations

from fastblt.kernels.cpu.threads import set_threads
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams
from fastblt.server.settings import PRETRAINED, EngineSettings
from tests.server.harness import run

METHODS = (
    DecodingParams(DecodingMethod.BLT),
    DecodingParams(DecodingMethod.BLT_S, draft_length=8),
    DecodingParams(DecodingMethod.BLT_DV, block_size=8),
    DecodingParams(DecodingMethod.BLT_DSV, draft_length=12, block_size=4),
    DecodingParams(DecodingMethod.BLT_D, block_size=8, confidence_threshold=0.7),
)


def test_all_methods_at_once() -> None:
    prompt = [1, *(4 + byte for byte in (b"def add(a, b):\n    return a + b\n\n" * 4))]
    requests = []
    for at in range(12):
        params = SamplingParams(
            max_tokens=16,
            temperature=0.8 * (at % 3 != 0),
            top_p=0.9 if at % 3 == 1 else 1.0,
            frequency_penalty=0.1 * (at == 5),
            logprobs=2 if at == 6 else None,
            seed=at,
            ignore_eos=True,
            decoding=METHODS[at % len(METHODS)],
        )
        requests.append(Request(f"r{at}", prompt[: 20 + 9 * at], params, 0.0))
    settings = EngineSettings(model=str(PRETRAINED), threads=2, max_pass_rows=96, max_model_len=256)
    try:
        finished = run(Engine(load_checkpoint(str(PRETRAINED)), settings), requests)
    finally:
        set_threads(None)
    assert all(len(one.ids) == 16 for one in finished.values())
