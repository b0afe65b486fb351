"""How many patch boundaries move if the entropy model's products are computed less precisely than in fp32.

    python -m fastblt.benchmarks.checkpoint.patch_precision

Held-out text, as many bytes as asked for, in pieces. TF32 is emulated: inputs and weights of every product are rounded
to 10 bits of mantissa, sums are fp32, as tensor cores do. Of bf16 weights, inputs and results are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastblt.benchmarks.command import command
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.models.blt import CausalAttention, Patcher
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.patching import PatchRule, entropies
from fastblt.server.settings import PRETRAINED


def tf32(x: Tensor) -> Tensor:
    """fp32 rounded to nearest with 10 bits of mantissa."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def rounded(patcher: Patcher, by: Callable[[Tensor], Tensor], *, results: bool) -> Patcher:
    """The entropy model with its products' weights and inputs rounded; with `results` also what they give."""
    made = copy.deepcopy(patcher)
    for module in made.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(by(module.weight.detach()), requires_grad=False)
            module.register_forward_pre_hook(lambda _, given: tuple(by(x) for x in given))
            if results:
                module.register_forward_hook(lambda _, given, out: by(out))
    return made


@torch.inference_mode()
def measure(*, model: str = str(PRETRAINED), pieces: int = 40, length: int = 1000) -> dict[str, Any]:
    """Print and return boundaries that are gained or lost, of all there are."""
    blt = load_checkpoint(model)
    config = blt.config
    ids = torch.tensor(held_out_prompts(pieces, length))
    rule = PatchRule(config.patching_threshold, config.max_patch_length)
    ways = {"fp32": blt.patcher, "tf32": rounded(blt.patcher, tf32, results=False)}
    ways["bf16"] = rounded(blt.patcher, bf16, results=True)
    found: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, patcher in ways.items():
        rows = [
            entropies(patcher(row[None], CausalAttention(config.patcher, len(row), row.device)))[0] for row in ids
        ]  # fmt: skip
        values[name] = torch.stack(rows)
        found[name] = torch.tensor([rule.starts(row.tolist()) for row in rows])
    total = int(found["fp32"].sum())
    result: dict[str, Any] = {"bytes": ids.numel(), "boundaries": total, "moved": {}}
    table = Table("products in", "boundaries that moved", "of all", "largest difference, nats")
    for name in ("tf32", "bf16"):
        moved = int((found[name] != found["fp32"]).sum())
        far = float((values[name] - values["fp32"]).abs().max())
        result["moved"][name] = {"boundaries": moved, "share": moved / total, "nats": far}
        table.row(name, str(moved), f"{100 * moved / total:.2f} %", f"{far:.4f}")
    return result


app = command(measure)

if __name__ == "__main__":
    app()
