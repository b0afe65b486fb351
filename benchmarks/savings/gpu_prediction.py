"""Predicts bytes a second on GPUs: no line of this project has run on one, so this is arithmetic, not measurement.

    python -m fastblt.benchmarks.savings.gpu_prediction                          every method, shape and chip
    python -m fastblt.benchmarks.savings.gpu_prediction --shape 1b --chip H200   some

What a round does is counted by the program itself, run on a CPU as on a GPU (`FASTBLT_KERNELS=apart`, the shipped
checkpoint, held-out prompts): its passes with their rows, its launches between them, its copies, and how often the host
waits. The kernels of a pass are counted on a model with the shape's numbers of layers, whose Triton kernels are counted
and not run. A wide model that computes the same function (`models/widen.py`) makes the same rounds.

    kernel = the longest of: `node`, its weights or keys over the bandwidth, its products over the rate
    device = the kernels of all passes, and of the launches outside of graphs
    giving = `launch` for every launch outside of graphs, `replay` for every pass
    round  = device or giving, whichever is longer, + `host` for every time that the host waits

`floor` is what reading the weights of the round's passes would take, and nothing else.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Both must be set before triton is imported; but not where this module is only imported, since child processes
    # would have them too.
    os.environ.setdefault("FASTBLT_KERNELS", "triton")
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastblt.kernels.backend
from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import complete, replaced, start, whole_length
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import decoding
from fastblt.kernels.request_ids import RequestIds
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.config import BltConfig, StackConfig
from fastblt.models.vocabulary import VOCAB_SIZE
from fastblt.models.widen import PAPER_PATCHER, SHAPES, Shape, StackShape
from fastblt.server.engine.device import drafting, rounds
from fastblt.server.engine.device.cuda_graphs import CudaGraphs
from fastblt.server.engine.device.passes import BYTES_A_PATCH, LEAST, Passes
from fastblt.server.engine.device.staging import Fetch, Staging
from fastblt.server.engine.engine import Engine
from fastblt.server.settings import PRETRAINED, EngineSettings

METHODS = ("blt", "blt-s k16", "blt-dv-8 1step", "blt-dsv-8 k32", "blt-d-8 a0.7")
#: Fewest prompts of a run: one alone may be easy.
_PROMPTS = 8
#: Fewest bytes of a request: every method's longest draft, and a round more.
_LEAST = 33
#: A global transformer of 7 billion weights between the local modules of the 1B shape; the paper has none.
ALL_SHAPES = SHAPES | {"7b": replace(SHAPES["1b"], global_=StackShape(4096, 32, 32, 32, 11008))}
#: Operators of torch that only describe or allocate memory.
_NO_KERNEL = (
    "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::detach", "aten::alias",
    "prim::device",
)  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """Bytes a second that large reads reach; operations a second of products (bf16, fp32); seconds of the smallest
    kernel in a graph, of a launch outside of one, of a graph's replay, and of the host's part of a step with its
    wait."""

    bandwidth: float
    bf16: float
    fp32: float
    node: float = 2.0e-6
    launch: float = 4.5e-6
    replay: float = 10e-6
    host: float = 0.45e-3


#: Some 85 % of the bandwidth and 60 % of the rate on the data sheets; TF32 for fp32. The times are assumptions.
CHIPS = {
    "A100": Chip(1.7e12, 190e12, 95e12, node=2.5e-6),
    "H100": Chip(2.8e12, 600e12, 300e12),
    "H200": Chip(4.3e12, 600e12, 300e12),
}


class Launches(TorchDispatchMode):
    """Counts launches: operators that launch a kernel, and calls of Triton kernels (`launched`)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._inside = 0

    @contextmanager
    def as_one(self, count: int = 1) -> Iterator[None]:
        """What happens inside counts as so many launches."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self.count += count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside and not func.is_view and func._schema.name not in _NO_KERNEL:
            self.count += 1
        return func(*args, **(kwargs or {}))


def of_layers(shape: Shape, config: BltConfig) -> BltConfig:
    """A config with the shape's numbers of layers, and next to no width."""
    narrow = {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 32}
    stacks = {
        "patcher": PAPER_PATCHER, "encoder": shape.encoder, "global_": shape.global_, "decoder": shape.decoder
    }  # fmt: skip
    made = {name: replace(getattr(config, name), num_layers=of.num_layers, **narrow) for name, of in stacks.items()}
    return replace(config, hash_group_vocab=61, **made)


@torch.inference_mode()
def kernels(config: BltConfig) -> dict[str, int]:
    """Kernels of a pass of each kind, in bf16 with the entropy model in fp32, counted and not run."""
    from triton.runtime.interpreter import GridExecutor

    with torch.device("meta"):
        model = Blt(config)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    model._hash_powers.zero_()
    model.to(torch.bfloat16)
    model.patcher.float()
    settings = EngineSettings(max_running=8, max_model_len=2048, cache_bytes=64 << 20, max_pass_rows=64)
    counts = Launches()

    def counted(_: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            counts.count += 1

        return call

    def uncaptured(_: Callable[..., Any]) -> Callable[..., Any]:
        return lambda graphs, key, function: function()

    found: dict[str, int] = {}
    with replaced((GridExecutor, "__call__", counted), (CudaGraphs, "run", uncaptured)):
        passes = Engine(model, settings)._runner._passes
        assert passes is not None
        patches, inside = (torch.zeros(n, m * LEAST, dtype=torch.int32) for n, m in ((8, 1), (2, BYTES_A_PATCH)))
        calls: dict[str, Callable[[], Any]] = {
            "scan": lambda: passes.scan(LEAST),
            "encode": lambda: passes.encode(LEAST),
            "decode": lambda: passes.decode(LEAST),
            "upstream": lambda: passes.upstream(patches, inside),
        }
        for kind, call in calls.items():
            counts.count = 0
            with counts:
                call()
            found[kind] = counts.count
    return found


@dataclass
class Recorded:
    """What a run did, after the prompts' passes: passes by (kind, rows), with the launches outside of them."""

    bytes: int = 0
    passes: Counter[tuple[str, int]] = field(default_factory=Counter)
    launches: int = 0
    waits: int = 0
    copies: int = 0

    def add(self, other: Recorded) -> None:
        self.bytes += other.bytes
        self.passes += other.passes
        self.launches, self.waits = self.launches + other.launches, self.waits + other.waits
        self.copies += other.copies


def record_in_turns(model: Blt, prompts: Sequence[list[int]], setting: str, length: int, together: int) -> Recorded:
    """`record`, so many requests at a time, one batch behind another."""
    done = Recorded()
    for first in range(0, len(prompts), together):
        done.add(record(model, prompts[first : first + together], setting, length))
    return done


def record(model: Blt, prompts: Sequence[list[int]], setting: str, length: int) -> Recorded:
    """Run requests, all at once, as on a GPU."""
    done, counts = Recorded(), Launches()

    def passed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Passes, kind: str, size: int, *more: Any) -> Any:
            done.passes[kind, size] += 1
            with counts.as_one(0):
                return call(self, kind, size, *more)

        return run

    def upstream(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Passes, patches: Any, inside: Any) -> Any:
            done.passes["upstream", patches.shape[1]] += 1
            captured = inside.shape[1] == BYTES_A_PATCH * patches.shape[1]
            with counts.as_one(2 if captured else 300):
                return call(self, patches, inside)

        return run

    def as_launches(count: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with counts.as_one(count):
                return call(*args)

        return run

    one = partial(as_launches, 1)

    def waiting(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            done.waits += 1
            return call(*args)

        return run

    def copied(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            done.copies += 1
            return call(*args)

        return run

    begun = 0

    def after_step(outputs: list[Any]) -> None:
        nonlocal begun
        made = sum(len(output.ids) for output in outputs)
        if not begun and all(output.ids for output in outputs):
            begun = made
            done.passes.clear()
            done.launches = done.waits = done.copies = counts.count = 0
        done.bytes = made - begun

    params = [whole_length(decoding(setting), length, seed=seed) for seed in range(len(prompts))]
    rows = sum(map(len, prompts)) + 64 * len(prompts)
    with replaced((fastblt.kernels.backend, "_FORCED", lambda _: "apart")):
        engine = start(model, len(prompts), max_model_len=1024, max_pass_rows=rows, prefix_cache=False)
        changes = (
            (Passes, "_run", passed), (Passes, "upstream", upstream), (rounds, "place", one), (rounds, "settle", one),
            (drafting, "turn", one), (drafting, "next_rows", one),
            (Fetch, "__call__", waiting), (Staging, "send", copied), (RequestIds, "read", partial(as_launches, 5)),
        )  # fmt: skip
        with replaced(*changes), counts:
            complete(engine, prompts, params, after_step=after_step)
    done.launches = counts.count
    return done


def products(stack: StackConfig | StackShape) -> list[int]:
    """The weights of a layer's products."""
    size, kv = stack.hidden_size, stack.hidden_size // stack.num_heads * stack.num_kv_heads
    return [size * (size + 2 * kv), size * size, 2 * size * stack.intermediate_size, size * stack.intermediate_size]


def stacks(shape: Shape, k: int) -> dict[str, tuple[StackShape, list[int]]]:
    """Of each kind of pass its layers, and the weights of all products."""
    local, wide, size = shape.decoder.hidden_size, shape.global_.hidden_size, shape.encoder.hidden_size
    decoder = products(shape.decoder) + 2 * [local * local]
    latents = [wide * local * k, shape.decoder.num_layers * 2 * local * local]
    pooling = [size * size * k, size * size, 2 * size * size, size * size]
    return {
        "scan": (PAPER_PATCHER, products(PAPER_PATCHER) * PAPER_PATCHER.num_layers + [768 * VOCAB_SIZE]),
        "encode": (shape.encoder, products(shape.encoder) * shape.encoder.num_layers),
        "decode": (shape.decoder, decoder * shape.decoder.num_layers + [local * VOCAB_SIZE]),
        "upstream": (shape.global_, products(shape.global_) * shape.global_.num_layers + latents + pooling),
    }


@dataclass(frozen=True)
class Prediction:
    """Seconds of a byte: in all, by reading weights alone, and by parts (kinds of passes, `beside`, `host`)."""

    seconds: float
    floor: float
    parts: dict[str, float]


def predict(
    done: Recorded, shape: Shape, counted: dict[str, int], chip: Chip, requests: int, context: int, k: int
) -> Prediction:
    """Seconds of a byte. Every request has `context` bytes, of which a local module sees 512 at most."""
    floor = 0.0
    parts = dict.fromkeys(stacks(shape, k), 0.0)
    for (kind, rows), times in done.passes.items():
        stack, weights = stacks(shape, k)[kind]
        wide, rate = (4, chip.fp32) if kind == "scan" else (2, chip.bf16)
        seen = context // 4 if kind == "upstream" else min(context, 512)
        keys = 2 * stack.hidden_size // stack.num_heads * stack.num_kv_heads * wide * seen
        attended = max(chip.node, min(requests, rows) * keys / chip.bandwidth)
        read = [max(chip.node, wide * one / chip.bandwidth, 2 * rows * one / rate) for one in weights]
        others = counted[kind] - len(weights) - stack.num_layers
        parts[kind] += times * (sum(read) + stack.num_layers * attended + others * chip.node)
        floor += times * wide * sum(weights) / chip.bandwidth
    giving = done.launches * chip.launch + sum(done.passes.values()) * chip.replay
    device = sum(parts.values())
    # Where the host takes longer to give the work than the device to do it, the rest is the host's.
    parts["beside"] = max(done.launches * chip.node, giving - device)
    parts["host"] = done.waits * chip.host
    each = {name: seconds / done.bytes for name, seconds in parts.items()}
    return Prediction(sum(each.values()), floor / done.bytes, each)


def measure(
    *,
    model: str = str(PRETRAINED),
    shape: Sequence[str] = tuple(ALL_SHAPES),
    chip: Sequence[str] = tuple(CHIPS),
    batch: Sequence[int] = (1, 8, 32, 128, 256),
    input_len: int = 256,
    length: int = 96,
) -> dict[str, Any]:
    """Print and return the counts, and the predicted bytes a second of every method."""
    if length < _LEAST:
        raise ValueError(f"--length {length} is over before a draft is; give {_LEAST} or more")
    blt = load_checkpoint(model)
    prompts = held_out_prompts(max(*batch, _PROMPTS), input_len)
    counted = {name: kernels(of_layers(ALL_SHAPES[name], blt.config)) for name in shape}
    table = Table("shape", *next(iter(counted.values())))
    for name, each in counted.items():
        table.row(name, *map(str, each.values()))
    result: dict[str, Any] = {"kernels": counted, "chips": {name: vars(CHIPS[name]) for name in chip}, "runs": {}}
    context = input_len + length // 2
    print()
    table = Table("method", "requests", "passes a byte", "launches a byte", "waits a byte", "copies a wait")
    runs: dict[tuple[str, int], Recorded] = {}
    for setting in METHODS:
        for count in batch:
            some = prompts[: max(count, _PROMPTS)]
            done = runs[setting, count] = record_in_turns(blt, some, setting, length, count)
            numbers = sum(done.passes.values()), done.launches, done.waits
            cells = [f"{number / done.bytes:.2f}" for number in numbers]
            table.row(setting, str(count), *cells, f"{done.copies / done.waits:.2f}")
            result["runs"][f"{setting}, {count}"] = {
                "bytes": done.bytes, "launches": done.launches, "waits": done.waits, "copies": done.copies,
                "passes": {f"{kind} {rows}": times for (kind, rows), times in sorted(done.passes.items())},
            }  # fmt: skip
    print()
    table = Table("shape", "chip", "method", *(f"{count} requests" for count in batch), "floor by weights, 1 request")
    result["predicted"], result["arithmetic"] = {}, {}
    for name in shape:
        for gpu in chip:
            for setting in METHODS:
                found = [
                    predict(
                        runs[setting, count], ALL_SHAPES[name], counted[name], CHIPS[gpu], count, context,
                        blt.config.cross_attn_k,
                    )
                    for count in batch
                ]  # fmt: skip
                rates = {str(count): 1 / one.seconds for count, one in zip(batch, found, strict=True)}
                result["predicted"][f"{name}, {gpu}, {setting}"] = rates | {"floor": 1 / found[0].floor}
                if (name, gpu) == (shape[0], chip[-1]):
                    whole = found[0].parts | {"all": found[0].seconds}
                    result["arithmetic"][f"{name}, {gpu}, {setting}"] = whole
                cells = [f"{rate:,.0f}" for rate in rates.values()]
                table.row(name, gpu, setting, *cells, f"{1 / found[0].floor:,.0f}")
    return result


app = command(measure)

if __name__ == "__main__":
    app()
