"""Whether keys and values of 16 bits would pay on a CPU: what reading them costs, and what rounding them changes.

    python -m fastblt.benchmarks.savings.keys_values

A pass of the global transformer at the 1B shape, one row of each of `requests` requests, by how many patches of context
each has: all of the time beyond that without context is reading keys and values (fp32), of which half could be saved at
most. Encoder, decoder and entropy model read a window only. Then the shipped checkpoint's bits per byte on held-out
text, with keys and values as they are and rounded to bfloat16, and the share of positions with the same most probable
byte.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastblt.benchmarks.checks.weights import scores
from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import replaced, start
from fastblt.benchmarks.machine import measured_with
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.savings.cost_curve import _occupied, _spread
from fastblt.models.blt import CausalAttention
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.widen import paper_shape, widen
from fastblt.server.engine.device.cost import make_calls
from fastblt.server.settings import PRETRAINED

#: Bytes of a patch.
_PATCH = 4

Attend = Callable[[CausalAttention, int, Tensor, Tensor, Tensor], Tensor]


def _rounded(attend: Attend) -> Attend:
    def rounding(self: CausalAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A rotation does not change a key's size: rounded before it or after it, it loses as much.
        return attend(self, layer, q, k.bfloat16().float(), v.bfloat16().float())

    return rounding


@torch.inference_mode()
def measure(
    *,
    model: str = str(PRETRAINED),
    shape: str = "1b",
    weights: str = "int8",
    patches: Sequence[int] = (0, 256, 1024),
    requests: Sequence[int] = (1, 8),
    num_prompts: int = 8,
    length: int = 1024,
    rounds: int = 5,
) -> dict[str, Any]:
    """Print and return both."""
    blt = load_checkpoint(model)
    texts = held_out_prompts(num_prompts, length)
    found: list[torch.Tensor] = []
    bits, choices = scores(blt, texts, found)
    with replaced((CausalAttention, "__call__", _rounded)):
        rounded, others = scores(blt, texts, found)
    same = statistics.mean(a == b for a, b in zip(choices, others, strict=True))
    print(f"bits per byte {bits:.5f}, rounded {rounded:.5f}; {100 * same:.2f} % of the most probable bytes are equal\n")
    result: dict[str, Any] = {**measured_with(model), "bits": bits, "rounded": rounded, "same_choice": same, "ms": {}}
    wide = widen(blt, paper_shape(shape), weights)
    table = Table("requests", *(f"{count} patches, ms" for count in patches))
    for size in requests:
        longest = max(patches) * _PATCH
        caches = (
            2 * 4 * wide.config.global_.num_layers * wide.config.global_.num_kv_heads * wide.config.global_.head_dim
        )
        engine = start(wide, size, max_model_len=longest + 1024, cache_bytes=2**31 + size * max(patches) * caches)
        own = result["ms"][str(size)] = {}
        for count in patches:
            with _occupied(engine._caches, count * _PATCH, size) as owners:
                calls = make_calls(engine._runner._forward, size, count * _PATCH, count, owners=_spread(owners, size))
                taken = []
                for _ in range(rounds + 1):
                    began = time.perf_counter()
                    calls["global"]()
                    taken.append(1e3 * (time.perf_counter() - began))
            own[str(count)] = statistics.median(taken[1:])
        table.row(str(size), *(f"{value:.1f}" for value in own.values()))
    return result


app = command(measure)

if __name__ == "__main__":
    app()
