"""The kernels: what they compile to, how many bytes they move, and what they cost.

    python -m fastblt.benchmarks.kernels.run --compile [--targets sm_90,gfx942]
    python -m fastblt.benchmarks.kernels.run --traffic
    python -m fastblt.benchmarks.kernels.run --cpu
    python -m fastblt.benchmarks.kernels.run --gpu

`--compile` builds every kernel ahead of time and prints registers, spills, shared memory, an estimate of the occupancy
and the instructions that must be there; it exits 1 on a spill or where one is missing.`--traffic`
counts the launches, and the bytes that each kernel loads and stores, under the interpreter, beside the least possible
and beside the torch path's separate operations; it exits 1 where a kernel moves a quarter more than the least. `--cpu`
times unmasking, and selection with verification, against a decoder pass of the shipped model at batch 32, and exits 1
where one takes more than a tenth of it; beside it stands what it would take with selection in torch. `--gpu` times
every kernel on the GPU against the torch path's separate operations there, and exits 1 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Bytes of shared memory of one multiprocessor.
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}
MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma\w*)")
ASYNC = re.compile(r"\bcp\.async\.(?:ca|cg|bulk)")

#: Logits and their stride, temperature, top-k, top-p, min-p, seeds, positions, whether EOS is forbidden, repetition,
#: presence, frequency, counts, what the prompt has, bias, what is allowed: `select_row`'s columns.
_COLUMNS = (
    "*fp32", "i32", "*fp32", "*i64", "*fp32", "*fp32", "*i64", "*i64", "*i1", "*fp32", "*fp32", "*fp32", "*i32", "*i1",
    "*fp32", "*i1",
)  # fmt: skip
_SELECTED = {
    "columns": _COLUMNS, "restricted": "i32", "bads": "*i1", "confidences": "*fp32", "entropies": "*fp32",
}  # fmt: skip
_SELECT = _SELECTED | {"ids": "*i64", "logprobs": "*fp32"}
_UNMASK = _SELECTED | {
    "size": "i32", "masked": "*i1", "ids": "*i64", "rules": "*i64", "bounds": "*fp32", "last_steps": "*i1",
    "chosen_ids": "*i64", "chosen_logprobs": "*fp32", "arrivals": "*i32", "new_ids": "*i64", "new_masked": "*i1",
    "fixed": "*i64", "done": "*i1", "new_logprobs": "*fp32", "block_bad": "*i1",
}  # fmt: skip
_VERIFY = {
    "targets": "*i64", "drafts": "*i64", "lengths": "*i64", "target_stride": "i32", "draft_stride": "i32",
    "accepted": "*i64", "next_ids": "*i64",
}  # fmt: skip
_ROWS = {
    "turns": "*fp32", "table": "*i32", "rows": "*i32", "positions": "*i32", "table_stride": "i32", "lows": "*i32",
    "highs": "*i32", "total_rows": "i32", "part_out": "*fp32", "part_peak": "*fp32", "part_total": "*fp32",
    "span": "i32", "scale": "fp32",
}  # fmt: skip
_HASH = {"windows": "*i64", "powers": "*i64", "vocab": "i32", "dim": "i32"}
#: Integers that are multiples of 16 where the kernels run, as the runtime would find out.
_SIXTEEN = {"span", "dim"}


#: (heads, key heads, head size, longest span) of attention, by storage type.
SHAPES = {
    "fp32": ((8, 4, 32, 1), (16, 16, 64, 1), (16, 4, 128, 1)),
    "fp16": ((16, 16, 64, 1),),
    "bf16": ((8, 4, 32, 1), (16, 16, 64, 1), (16, 16, 64, 64), (16, 4, 128, 1), (16, 4, 128, 64)),
}


@dataclass
class Variant:
    """One kernel as it is launched: argument types, compile-time constants, options, and what its code must hold."""

    name: str
    kernel: str
    types: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    matrix: bool = False


def variants(target: str) -> list[Variant]:
    """What the shipped and the published shapes launch on a target."""
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
            constants |= {"PARTS": 1 if dim == 32 else MOST_PARTS, "DOT": getattr(tl, str(dtype)[6:])}
            attend = "paged_attention.attend_kernel"
            found.append(Variant(f"attend {label}", attend, types, constants, options, short != "fp32"))
    # `types` are those of bf16 now: the other types differ in their conversions only.
    constants = {"PAGE": 64, "WIDTH": 16 * 64, "DIM": 64, "PAIRS": 8 * 64}
    found.append(Variant("write bf16", "paged_attention.write_kernel", types, constants))
    constants = {"HEADS": 16, "DIM": 128, "WIDTH": 128, "BLOCK": 16, "PARTS": MOST_PARTS}
    found.append(Variant("merge bf16", "paged_attention.merge_kernel", types, constants))
    types = _HASH | dict.fromkeys(("byte_table", "hash_table", "out"), "*bf16")
    constants = {"WINDOW": 8, "TABLES": 6, "WINDOW_TILE": 8, "TABLE_TILE": 8, "BLOCK": 256}
    found.append(Variant("hash bf16", "hash_embedding.hash_kernel", types, constants, {"num_warps": 2}))
    return found


def compile_variant(variant: Variant, target: str) -> dict[str, Any]:
    """Compile for a target that need not be here, and read the code."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = variant.kernel.split(".")
    kernel = getattr(importlib.import_module(f"fastblt.kernels.gpu.{module}"), name)
    signature = {arg: "constexpr" if arg in variant.constants else variant.types[arg] for arg in kernel.arg_names}
    # Without these the compiler must assume unaligned rows, and neither vectors nor asynchronous copies appear.
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
    """Registers, and the bytes of local memory a thread spills to, as the tool that comes with Triton reads them."""
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
    """What is wrong with one compiled kernel."""
    wrong = ["spills"] if result["spills"] else []
    if result["shared"] > SHARED[result["target"]]:
        wrong.append("too much shared memory")
    if result["matrix_wanted"] and not result["matrix"]:
        wrong.append("no matrix instructions")
    if result["matrix_wanted"] and result["target"].startswith("sm_") and not result["async_copies"]:
        wrong.append("no asynchronous copies")
    return wrong


def compile_all(targets: list[str]) -> list[dict[str, Any]]:
    """Every variant for every target, two targets at a time, each in a process that the interpreter cannot reach."""
    environment = {name: value for name, value in os.environ.items() if name != "FASTBLT_KERNELS"}
    environment |= {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}

    def one(target: str) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, "-m", "fastblt.benchmarks.kernels.run", "--worker", target],
                env=environment | {"TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
        if done.returncode:
            raise RuntimeError(f"compiling for {target} failed:\n{done.stderr}")
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        return [result for results in pool.map(one, targets) for result in results]


def report_compile(targets: list[str]) -> int:
    begun = time.perf_counter()
    results = compile_all(targets)
    print(
        f"{'kernel':24} {'target':7} {'registers':>9} {'spills':>6} {'shared':>7} {'occupancy':>9} {'async':>5}  matrix"
    )
    bad = 0
    for r in results:
        wrong = faults(r)
        bad += bool(wrong)
        matrix = " ".join(f"{name}:{count}" for name, count in r["matrix"].items())
        print(
            f"{r['kernel']:24} {r['target']:7} {r['registers']:9} {r['spills']:6} {r['shared']:7} "
            f"{r['occupancy']:9.0%} {r['async_copies']:5}  {matrix} {', '.join(wrong)}".rstrip()
        )
    print(f"{len(results)} kernels in {time.perf_counter() - begun:.1f} s, {bad} with faults")
    return 1 if bad else 0


class Meter:
    """Counts what the interpreter's kernels load and store: an address once a load or store of a program."""

    def __init__(self, inner: Any, interface: list[Any]) -> None:
        self._inner = inner
        self._ranges = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in interface]
        self._seen: list[Any] = []
        self.loaded = self.stored = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.loaded += self._count(pointers, mask, dtype.itemsize)
        return self._inner.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self.stored += self._count(pointers, mask, value.dtype.itemsize)
        return self._inner.store(pointers, value, mask)

    def _count(self, pointers: Any, mask: Any, size: int) -> int:
        import numpy as np

        addresses = np.unique(pointers[mask])
        self._seen.append((addresses[:, None] + np.arange(size, dtype=addresses.dtype)).ravel())
        return addresses.size * size

    def least(self) -> int:
        """The bytes of the operation's own arguments and results that were touched, each counted once."""
        import numpy as np

        touched = np.unique(np.concatenate(self._seen))
        inside = np.zeros(touched.shape, dtype=bool)
        for begin, length in dict.fromkeys(self._ranges):
            inside |= (touched >= begin) & (touched < begin + length)
        return int(inside.sum())


def torch_cost(call: Callable[[], Any]) -> tuple[int, int]:
    """What the operations of a torch function read and write in bytes, each its arguments and its result, and how many
    operations they are; views are free."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    total = operations = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal total, operations
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.removeprefix("aten::")
            given, made = (
                [t for t in tree_flatten(x)[0] if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out)
            )
            if func.is_view or name.startswith("empty"):
                return out
            if name in ("embedding", "index", "index_select", "gather"):
                given = given[1:] + made  # of the table only what is taken
            elif name == "index_copy_":
                given, made = given[1:], given[-1:]
            operations += 1
            total += sum(t.numel() * t.element_size() for t in given + made)
            return out

    with Counting():
        call()
    return total, operations


def report_traffic() -> int:
    import triton.runtime.interpreter as interpreter

    from fastblt.benchmarks.kernels.cases import cases

    worst = 0.0
    launches: list[str] = []
    launch = interpreter.GridExecutor.__call__

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        launches.append(self.fn.__name__)
        launch(self, *arguments, **options)

    print(
        f"{'operation':34} {'launches':>8} {'torch':>5} {'loaded':>9} {'stored':>9} {'least':>9} {'ratio':>6} "
        f"{'torch':>10} {'ratio':>6}"
    )
    for case in cases():
        meter = Meter(interpreter._interpreter, case.arguments)
        interpreter._interpreter = meter
        interpreter.GridExecutor.__call__ = noted
        launches.clear()
        try:
            results = case.fused()
        finally:
            interpreter._interpreter = meter._inner
            interpreter.GridExecutor.__call__ = launch
        meter._ranges += Meter(None, results)._ranges
        (apart, operations), moved, least = torch_cost(case.unfused), meter.loaded + meter.stored, meter.least()
        worst = max(worst, moved / least)
        print(
            f"{case.name:34} {len(launches):8} {operations:5} {meter.loaded:9,} {meter.stored:9,} {least:9,} "
            f"{moved / least:6.2f} {apart:10,} {apart / least:6.1f}"
        )
    return 1 if worst > 1.25 else 0


def report_cpu() -> int:
    from fastblt.benchmarks.kernels.cases import cpu_shares

    worst = 0.0
    print(f"{'operation':34} {'time':>8} {'decoder pass':>13} {'share':>6} {'selection in torch':>19}")
    for size in (4, 8, 16):
        for one in cpu_shares(32, size):
            share, plain = one.spent / one.whole, one.plain / one.whole
            worst = max(worst, share)
            print(f"{one.name:34} {one.spent * 1e3:5.2f} ms {one.whole * 1e3:10.2f} ms {share:6.1%} {plain:19.1%}")
    print(f"at most {worst:.1%}")
    return 1 if worst > 0.1 else 0


def report_gpu() -> int:
    import torch

    if not torch.cuda.is_available():
        print("there is no GPU here, or this is not a build of torch that sees it", file=sys.stderr)
        return 1
    torch.set_default_device("cuda")
    print(torch.cuda.get_device_name())
    report_speed(rounds=50, wait=torch.cuda.synchronize)
    return 0


def report_speed(rounds: int, wait: Callable[[], None]) -> None:
    """Microseconds of each call on torch's default device, fused beside unfused; `wait` waits for the device."""
    from fastblt.benchmarks.kernels.cases import cases, fastest

    print(f"{'operation':34} {'fused':>10} {'torch':>10} {'ratio':>6}")
    for case in cases():
        fused, apart = (fastest(lambda call=call: (call(), wait()), rounds) for call in (case.fused, case.unfused))
        print(f"{case.name:34} {fused * 1e6:7.1f} us {apart * 1e6:7.1f} us {apart / fused:6.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--traffic", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        json.dump([compile_variant(variant, options.worker) for variant in variants(options.worker)], sys.stdout)
        return 0
    if options.compile:
        return report_compile(options.targets.split(","))
    if options.traffic:
        if os.environ.get("TRITON_INTERPRET") != "1":
            # Chosen before triton is imported, so in a fresh process.
            return subprocess.run(
                [sys.executable, *sys.orig_argv[1:]], env=os.environ | {"TRITON_INTERPRET": "1"}
            ).returncode
        return report_traffic()
    if options.cpu:
        return report_cpu()
    if options.gpu:
        return report_gpu()
    parser.error("nothing to do")


if __name__ == "__main__":
    sys.exit(main())
