"""A pass of a 1B BLT beside a pass of llama.cpp over about as many weights, without any server, in turns.

    pip install llama-cpp-python gguf          the extra `peers`; the first is compiled, which takes minutes
    python -m fastblt.benchmarks.kernels.peer_loop

Theirs: a random Llama of `--weights` billion weights, written as GGUF (`BF16`, `F16`, `Q8_0`), and `llama_decode` of
the rows of one sequence, with logits of each. Ours: a pass of every module of the shipped model at the 1B shape, which
together read all of its maps. Rows stand behind `_CONTEXT` others of one request. Both are in one process, with as many
threads, and take turns of `_TURN` passes; the fastest pass counts, since a shared machine makes passes longer and never
shorter. As the two do not have the same number of weights, `over` compares nanoseconds a weight: theirs over ours, so
that above 1 ours is faster.

A kind takes some 3.5 GB of memory twice, and of the disk once. int8 of ours has a scale for 128 weights, Q8_0 one for
32.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastblt.benchmarks.command import clean_errors, command
from fastblt.benchmarks.harness import start
from fastblt.benchmarks.machine import measured_with
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.savings.cost_curve import _calls, _occupied, _spread, head_weights, module_weights
from fastblt.kernels.cpu.threads import threads as threads_in_use
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.widen import paper_shape, widen
from fastblt.server.settings import PRETRAINED

#: GGUF's name of a type by ours.
TYPES = {"bfloat16": "BF16", "float16": "F16", "int8": "Q8_0"}
#: Rows before those of a pass, and passes of a turn.
_CONTEXT, _TURN = 64, 3


@dataclass(frozen=True)
class LlamaShape:
    """A Llama's size: that of the 1B shape's global transformer, with the vocabulary of a token-level model."""

    layers: int
    width: int = 2048
    heads: int = 16
    inner: int = 5632
    vocabulary: int = 32_000

    @classmethod
    def of(cls, weights: float) -> LlamaShape:
        """The shape with about so many weights, its embeddings among them."""
        one = cls(1)
        layer = one.read - cls(0).read
        return cls(max(1, round((weights - cls(0).read - one.vocabulary * one.width) / layer)))

    @property
    def read(self) -> int:
        """Weights of the maps, which a pass reads."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.inner) + self.vocabulary * self.width


def write_llama(path: Path, shape: LlamaShape, kind: str) -> None:
    """Write a random Llama without a tokenizer, a tensor at a time. `kind` is a type of `TYPES`."""
    import gguf

    stored = gguf.GGMLQuantizationType[TYPES[kind]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    d, inner = shape.width, shape.inner
    parts: dict[str, tuple[int, ...]] = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (d, d))
    parts |= {"ffn_gate": (inner, d), "ffn_up": (inner, d), "ffn_down": (d, inner)}
    parts |= dict.fromkeys(("attn_norm", "ffn_norm"), (d,))
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd": (shape.vocabulary, d),
        "output": (shape.vocabulary, d),
        "output_norm": (d,),
    }
    tensors |= {f"blk.{layer}.{name}": size for layer in range(shape.layers) for name, size in parts.items()}
    rng = np.random.default_rng(0)

    def values(size: tuple[int, ...]) -> np.ndarray:
        if len(size) == 1:
            return np.ones(size, np.float32)
        return gguf.quants.quantize(rng.standard_normal(size, dtype=np.float32) * np.float32(d**-0.5), stored)

    # Tensors of a size are the same: a pass takes the same time, and making 1.5 billion numbers would take a minute.
    made = {size: values(size) for size in set(tensors.values())}
    for name, size in tensors.items():
        one, raw = made[size], stored if len(size) == 2 else None
        writer.add_tensor_info(f"{name}.weight", one.shape, one.dtype, one.nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for size in tensors.values():
        writer.write_tensor_data(made[size])
    writer.close()


@contextmanager
def llama_passes(path: Path, most: int, threads: int) -> Iterator[Callable[[int], None]]:
    """A function that runs a pass of so many rows, `most` at most, of the model of that file."""
    import llama_cpp as llama

    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, None)
    options = llama.llama_model_default_params()
    options.use_mmap = False
    model = llama.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(max(most, _CONTEXT), 0, 1)

    def decode(first: int, count: int) -> None:
        batch.n_tokens = count
        for at in range(count):
            batch.token[at], batch.pos[at] = 3 + at, first + at
            batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, 0, True
        if failed := llama.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode fails with {failed}")
        llama.llama_synchronize(context)

    def run(count: int) -> None:
        decode(_CONTEXT, count)
        llama.llama_memory_seq_rm(llama.llama_get_memory(context), 0, _CONTEXT, -1)

    try:
        decode(0, _CONTEXT)
        yield run
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        llama.llama_model_free(model)


@contextmanager
def our_passes(model: Blt, most: int, threads: int | None) -> Iterator[Callable[[int], None]]:
    """A function that runs a pass of so many rows, `most` at most, through every module of a model."""
    engine = start(model, 1, max_model_len=1024, prefix_cache=False, threads=threads)
    with _occupied(engine._caches, _CONTEXT, 1) as owners:
        forward = engine._runner._forward
        calls = {count: _calls(forward, count, _CONTEXT, _spread(owners, count)) for count in range(1, most + 1)}

        def run(count: int) -> None:
            for call in calls[count].values():
                call()

        yield run


def fastest(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Seconds of the fastest call of each, in turns. The first call of a turn does not count."""
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for at, run in enumerate(runs):
            for call in range(1 + _TURN):
                began = time.perf_counter()
                run()
                if call:
                    best[at] = min(best[at], time.perf_counter() - began)
    return best


@torch.inference_mode()
def beside(
    small: Blt, shape: str, size: LlamaShape, kind: str, rows: Sequence[int], rounds: int, threads: int | None
) -> tuple[int, dict[str, dict[str, float]]]:
    """Our weights, and by rows the milliseconds of a pass, and theirs over ours by the weight."""
    wide = widen(small, paper_shape(shape), kind)
    own = sum(module_weights(ModuleParameters.of(wide.config), head_weights(wide.config)).values())
    found = {}
    with our_passes(wide, max(rows), threads) as ours, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        write_llama(path, size, kind)
        with llama_passes(path, max(rows), threads_in_use()) as theirs:
            path.unlink()
            for count in rows:
                their, our = fastest([partial(theirs, count), partial(ours, count)], rounds)
                over = their / size.read / (our / own)
                found[str(count)] = {"theirs_ms": 1e3 * their, "ours_ms": 1e3 * our, "over": over}
    return own, found


def measure(
    *,
    model: str = str(PRETRAINED),
    shape: str = "1b",
    weights: float = 1.5,
    kind: Sequence[str] = tuple(TYPES),
    rows: Sequence[int] = (1, 16),
    rounds: int = 8,
    threads: int | None = None,
) -> dict[str, Any]:
    """Print and return milliseconds of a pass, and theirs over ours by the weight."""
    small, size = load_checkpoint(model), LlamaShape.of(1e9 * weights)
    result: dict[str, Any] = {**measured_with(model), "shape": shape, "their_weights": size.read, "kinds": {}}
    table = Table("weights", "rows", "llama.cpp, ms", "ours, ms", "theirs over ours, a weight")
    for name in kind:
        with clean_errors("peers"):
            own, found = beside(small, shape, size, name, rows, rounds, threads)
        # An engine's parts know each other: without this, the models of all kinds would be there at once.
        gc.collect()
        result["kinds"][name] = found
        for count, row in found.items():
            times = f"{row['theirs_ms']:.1f}", f"{row['ours_ms']:.1f}"
            table.row(f"{name}, {TYPES[name]}", count, *times, f"{row['over']:.2f}")
        result |= {"our_weights": own, "threads": threads_in_use()}
    return result


app = command(measure)

if __name__ == "__main__":
    app()
