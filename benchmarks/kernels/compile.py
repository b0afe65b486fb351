"""Compiles the Triton kernels ahead of time. The GPU that is compiled for need not be present.

    python -m fastblt.benchmarks.kernels.compile                                 every target
    python -m fastblt.benchmarks.kernels.compile --target sm_90 --target gfx942  some

Prints registers, spills, shared memory, an estimate of the occupancy, and counts of the expected instructions. The exit
status is 1 if a kernel spills registers, has too much shared memory, or lacks an expected instruction.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from fastblt.benchmarks.command import command
from fastblt.benchmarks.markdown import Table

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Bytes of shared memory in one multiprocessor.
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}
MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma\w*)")
ASYNC = re.compile(r"\bcp\.async\.(?:ca|cg|bulk)")

#: Logits and their stride, temperature, top-k, top-p, min-p, seeds, positions, whether EOS is forbidden, repetition,
#: presence, frequency, counts, what the prompt has, bias, what is allowed: `select_row`'s columns.
_COLUMNS = (
    "*fp32", "i32", "*fp32", "*i64", "*fp32", "*fp32", "*i64", "*i64", "*i1", "*fp32", "*fp32", "*fp32", "*i32", "*i1",
    "*fp32", "*i1",
)  # fmt: skip
_Types = dict[str, str | tuple[str, ...]]
_SELECTED: _Types = {
    "columns": _COLUMNS, "restricted": "i32", "bads": "*i1", "confidences": "*fp32", "entropies": "*fp32",
}  # fmt: skip
_SELECT: _Types = _SELECTED | {"ids": "*i64", "logprobs": "*fp32"}
_UNMASK: _Types = _SELECTED | {
    "size": "i32", "masked": "*i1", "ids": "*i64", "rules": "*i64", "bounds": "*fp32", "last_steps": "*i1",
    "chosen_ids": "*i64", "chosen_logprobs": "*fp32", "arrivals": "*i32", "new_ids": "*i64", "new_masked": "*i1",
    "fixed": "*i64", "done": "*i1", "new_logprobs": "*fp32", "block_bad": "*i1",
}  # fmt: skip
_VERIFY = {
    "targets": "*i64", "drafts": "*i64", "lengths": "*i64", "target_stride": "i32", "draft_stride": "i32",
    "accepted": "*i64", "next_ids": "*i64",
}  # fmt: skip
_ROWS = {
    "turns": "*fp32", "table": "*i32", "rows": "*i32", "positions": "*i32", "table_stride": "i32", "firsts": "*i32",
    "highs": "*i32", "total_rows": "i32", "part_out": "*fp32", "part_peak": "*fp32", "part_total": "*fp32",
    "span": "i32", "scale": "fp32", "k_stride": "i32", "v_stride": "i32", "q_stride": "i32",
}  # fmt: skip
_HASH = {
    "windows": "*i64", "owners": "*i32", "positions": "*i32", "powers": "*i64", "stride": "i32", "vocab": "i32",
    "dim": "i32",
}  # fmt: skip
_LAYERS = {
    **dict.fromkeys(("x", "delta", "gain", "gains", "total", "normed", "out", "both", "source", "store"), "*bf16"),
    **dict.fromkeys(("block_table", "q", "weight"), "*bf16"),
    **dict.fromkeys(("owners", "positions", "pages", "block", "slots", "firsts", "counts"), "*i32"),
    **dict.fromkeys(("size", "ids_stride", "pad", "pages_stride", "q_stride", "slot_stride", "layer_offset"), "i32"),
    **dict.fromkeys(("patches", "rows", "columns", "depth", "x_stride"), "i32"),
    **{"eps": "fp32", "scale": "fp32", "ids": "*i64"},
}
_ROUNDS = {
    **dict.fromkeys(
        ("owners", "starts", "causals", "selects", "sizes", "rules", "lasts", "mosts", "latents", "blocks", "fixed",
         "chosen", "accepted", "steps", "bad_out", "left", "first_rows", "rows"), "*i32",
    ),
    **dict.fromkeys(("size", "width", "requests", "block_stride", "chosen_stride", "text_stride"), "i32"),
    **dict.fromkeys(("pad", "step"), "i32"),
    **{"ids": "*i64", "texts": "*i64", "confidences": "*fp32", "entropies": "*fp32", "bounds": "*fp32", "bads": "*u8"},
}  # fmt: skip
_DRAWS = {
    **{"rows": "*i32", "values": "*fp32", "integers": "*i64", "eos_from": "*i64", "floats": "*fp32", "longs": "*i64"},
    **{"forbid_eos": "*i1", "size": "i32", "values_stride": "i32", "integers_stride": "i32"},
}
_DRAFTS = {
    **dict.fromkeys(
        ("starts", "wanted", "longest", "done", "steps", "bad", "origins", "block_starts", "block_causals",
         "block_sizes", "block_steps", "block_bad", "blocks", "fixed", "row_starts", "row_accepted", "row_bad",
         "limits", "row_causals"), "*i32",
    ),
    **dict.fromkeys(("width", "block_width", "requests"), "i32"),
}  # fmt: skip
#: Integer arguments that are multiples of 16 in practice. At run time Triton detects this itself.
_SIXTEEN = {
    "span", "dim", "k_stride", "v_stride", "q_stride", "slot_stride", "layer_offset", "depth", "columns", "x_stride"
}  # fmt: skip
#: Of the local modules; the global transformer sees all patches.
_WINDOW = 512


#: (heads, key heads, head size, longest span) of attention, by storage type.
SHAPES = {
    "fp32": ((8, 4, 32, 1), (16, 16, 64, 1), (16, 4, 128, 1)),
    "fp16": ((16, 16, 64, 1),),
    "bf16": ((8, 4, 32, 1), (16, 16, 64, 1), (16, 16, 64, 64), (16, 4, 128, 1), (16, 4, 128, 64)),
}


@dataclass
class Variant:
    """One kernel as it is launched: argument types, compile-time constants, options. `matrix`: whether its code must
    have matrix instructions."""

    name: str
    kernel: str
    types: Mapping[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    matrix: bool = False


def variants(target: str) -> list[Variant]:
    """The kernels that the shipped and the published shapes launch on a target."""
    import torch
    import triton.language as tl

    from fastblt.kernels.attention import TILE
    from fastblt.kernels.gpu.paged_attention import MOST_PARTS, attention_shape
    from fastblt.kernels.gpu.selection import TILE as LOGITS
    from fastblt.kernels.gpu.selection import WARPS

    found = []
    exact = {"num_warps": WARPS, "enable_fp_fusion": False}
    amd = target.startswith("gfx")
    for name, flags in (("greedy", (0, 0, 0)), ("everything", (1, 1, 1))):
        booleans = dict(zip(("SAMPLED", "TRUNCATED", "PENALIZED"), map(bool, flags), strict=True)) | {"TILE": LOGITS}
        found.append(Variant(f"select {name}", "selection.select_kernel", _SELECT, booleans, exact))
        blocks = booleans | {"BLOCK": 32}
        found.append(Variant(f"unmask {name}", "unmasking.unmask_kernel", _UNMASK, blocks, exact))
    found.append(Variant("verify", "verification.verify_kernel", _VERIFY, {"TILE": 64}, {"num_warps": 1}))
    for dtype, short in ((torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        types = _ROWS | dict.fromkeys(("q", "k", "v", "store", "out"), f"*{short}")
        for heads, kv_heads, dim, longest in SHAPES[short]:
            shape = attention_shape(heads, kv_heads, dim, dtype, longest, amd)
            if amd and longest > 1:
                continue  # the same code as for single rows
            options = {name: shape.pop(name) for name in ("num_warps", "num_stages")}
            label = f"{short} D={dim} M={shape['BLOCK']}"
            constants = {"PAGE": 64, "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "KEYS": TILE} | shape
            constants |= {"DOT": getattr(tl, str(dtype)[6:])}
            constants |= {"PARTS": MOST_PARTS, "WINDOW": 0} if dim == 128 else {"PARTS": 1, "WINDOW": _WINDOW}
            attend = "paged_attention.attend_kernel"
            found.append(Variant(f"attend {label}", attend, types, constants, options, short != "fp32"))
    # After the loop `types` are those of bf16. Other types differ only in conversions.
    constants = {"PAGE": 64, "WIDTH": 16 * 64, "DIM": 64, "PAIRS": 8 * 64}
    found.append(Variant("write bf16", "paged_attention.write_kernel", types, constants))
    constants = {"HEADS": 16, "DIM": 128, "WIDTH": 128, "BLOCK": 16, "PARTS": MOST_PARTS}
    found.append(Variant("merge bf16", "paged_attention.merge_kernel", types, constants))
    types = _HASH | dict.fromkeys(("byte_table", "hash_table", "out"), "*bf16")
    constants = {"STORED": True, "WINDOW": 8, "TABLES": 6, "WINDOW_TILE": 8, "TABLE_TILE": 8, "BLOCK": 256}
    found.append(Variant("hash bf16", "hash_embedding.hash_kernel", types, constants, {"num_warps": 2}))
    return found + _of_layers()


def _of_layers() -> list[Variant]:
    """What stands between the products of the 1B shape's layers, and between the passes of a round."""
    import triton.language as tl

    found = []
    for block in (1024, 2048):
        warps = {"num_warps": 4 if block == 1024 else 8}
        for times in (1, 2):
            constants = {"TIMES": times, "NORM": True, "BLOCK": block}
            found.append(Variant(f"norm {block} x{times}", "layers.add_norm_kernel", _LAYERS, constants, warps))
    heads = {"HEADS": 16, "KV_HEADS": 16, "DIM": 64, "WIDTH": 64}
    product = {"DOT": tl.bfloat16, "ROWS": 16, "COLUMNS": 64, "DEPTH": 64}
    named: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("norms", "layers.norm_many_kernel", {"BLOCK": 1024}, {}),
        ("swiglu", "layers.swiglu_kernel", {"BLOCK": 1024}, {}),
        ("begin", "rows.begin_kernel", {"PAGE": 64, "STORED": True, "BLOCKS": True, "BLOCK": 1024}, {}),
        ("finish", "rows.finish_kernel", {"PAGE": 64, "BLOCK": 1024}, {}),
        ("cross", "latent_attention.cross_kernel", heads | {"KEYS": 2, "HEAD_TILE": 16}, {}),
        ("store", "latent_attention.store_kernel", {"KEYS": 2, "LAYERS": 9, "HALF": 1024, "TILE": 1024}, {}),
        ("peak", "pooling.peak_kernel", {"BLOCK": 256}, {}),
        ("pool", "pooling.pool_kernel", heads | {"QUERIES": 2, "ROWS": 16}, {"num_warps": 2}),
        ("linear", "linear.linear_kernel", product, {"num_stages": 3}),
    ]
    found += [Variant(name, kernel, _LAYERS, constants, options) for name, kernel, constants, options in named]
    found[-1].matrix = True
    types = {"logits": "*fp32", "out": "*fp32"}
    found.append(Variant("entropy", "layers.entropy_kernel", types, {"VOCABULARY": 260, "TILE": 512}))
    found.append(Variant("place", "rounds.place_kernel", _ROUNDS, {"BLOCKS": True, "TILE": 128}))
    found.append(Variant("settle", "rounds.settle_kernel", _ROUNDS, {"MASK": 260, "BLOCK": 32}))
    found.append(Variant("row draws", "row_draws.row_draws_kernel", _DRAWS, {"TILE": 128}))
    found.append(Variant("turn", "filtering.turn_kernel", _DRAFTS, {"MASK": 260, "TILE": 32}, {"num_warps": 1}))
    found.append(Variant("next rows", "filtering.next_rows_kernel", _DRAFTS, {"TILE": 128}))
    return found


def compile_variant(variant: Variant, target: str) -> dict[str, Any]:
    """Compile a kernel for a target, and read the figures from its code."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = variant.kernel.split(".")
    kernel = getattr(importlib.import_module(f"fastblt.kernels.gpu.{module}"), name)
    signature = {arg: "constexpr" if arg in variant.constants else variant.types[arg] for arg in kernel.arg_names}
    # Without these attributes the compiler assumes unaligned rows, and uses neither vectors nor asynchronous copies.
    places = [
        ((i, *at), arg, kind)
        for i, (arg, kinds) in enumerate(signature.items())
        for at, kind in ([((j,), kind) for j, kind in enumerate(kinds)] if isinstance(kinds, tuple) else [((), kinds)])
    ]
    attrs = {at: [["tt.divisibility", 16]] for at, arg, kind in places if kind[0] == "*" or arg in _SIXTEEN}
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    source = ASTSource(kernel, signature, constexprs=variant.constants, attrs=attrs)
    built = triton.compile(source, target=gpu, options={"num_warps": 4, **variant.options})
    warps, shared = variant.options.get("num_warps", 4), int(built.metadata.shared)
    if gpu.backend == "hip":
        text = built.asm["amdgcn"]
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+_count|private_segment\w+): *(\d+)", text)}
        registers, spills = numbers["vgpr_count"], numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
        resident = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        most = 32
    else:
        text = built.asm["ptx"]
        registers, spills = _cuda(built.asm["cubin"], Path(triton.__file__).parent)
        resident = 65536 // (-(-registers // 8) * 8 * 32)
        most = 64
    blocks = min(resident // warps, SHARED[target] // max(shared, 1), 32)
    return {
        "kernel": variant.name,
        "target": target,
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "occupancy": round(min(blocks * warps, most) / most, 2),
        "matrix": dict(sorted(_count(MATRIX.findall(text)).items())),
        "async_copies": len(ASYNC.findall(text)),
        "matrix_wanted": variant.matrix,
    }


def _cuda(cubin: bytes, package: Path) -> tuple[int, int]:
    """Registers of a thread, and the bytes of local memory that it spills to, by Triton's `cuobjdump`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = package / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _count(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in set(names)}


def faults(result: dict[str, Any]) -> list[str]:
    """The faults of one compiled kernel."""
    wrong = ["spills"] if result["spills"] else []
    if result["shared"] > SHARED[result["target"]]:
        wrong.append("too much shared memory")
    if result["matrix_wanted"] and not result["matrix"]:
        wrong.append("no matrix instructions")
    if result["matrix_wanted"] and result["target"].startswith("sm_") and not result["async_copies"]:
        wrong.append("no asynchronous copies")
    return wrong


def compile_all(targets: list[str]) -> list[dict[str, Any]]:
    """Compile every variant for every target, two targets at a time, in processes with Triton's interpreter off."""
    environment = {name: value for name, value in os.environ.items() if name != "FASTBLT_KERNELS"}
    environment |= {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}

    def one(target: str) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, "-m", "fastblt.benchmarks.kernels.compile", "--worker", target],
                env=environment | {"TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
        if done.returncode:
            raise RuntimeError(f"compiling for {target} failed:\n{done.stderr}")
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        return [result for results in pool.map(one, targets) for result in results]


def main(
    *, target: Sequence[str] = TARGETS, worker: Annotated[str | None, typer.Option(hidden=True)] = None
) -> dict[str, Any]:
    """Compile every kernel for every target. With `worker`, compile for that target and print the results as JSON."""
    if worker is not None:
        found = [compile_variant(variant, worker) for variant in variants(worker)]
        print(json.dumps(found))
        return {}
    begun = time.perf_counter()
    results = compile_all(list(target))
    table = Table("kernel", "target", "registers", "spills", "shared", "occupancy", "async", "matrix", "faults")
    for one in results:
        matrix = " ".join(f"{name}:{count}" for name, count in one["matrix"].items())
        numbers = (one["registers"], one["spills"], one["shared"])
        cells = [*map(str, numbers), f"{one['occupancy']:.0%}", str(one["async_copies"]), matrix]
        table.row(one["kernel"], one["target"], *cells, ", ".join(faults(one)))
    bad = sum(bool(faults(one)) for one in results)
    print(f"{len(results)} kernels in {time.perf_counter() - begun:.1f} s, {bad} with faults")
    return {"kernels": results, "passed": not bad}


app = command(main)

if __name__ == "__main__":
    app()
