"""llama.cpp's own loop over a random token-level model with as many weights, beside this engine, without servers.

    pip install llama-cpp-python gguf tokenizers          the extra `peers`
    python -m fastblt.benchmarks.report.token_loop

Theirs: `llama_decode` of a token of every sequence, the most likely one taken, fp32 weights; with one thread and with
as many as there are cores, of which the faster counts: threads that wait for each other may cost more than they give.
Ours: the shipped model, `blt` and `auto`. Both compute prompts of as many bytes and give as many, greedily, in turns: a
token counts as the bytes that a token of held-out text has. Times are of whole requests. `weights_read`: the weights of
all passes, by the byte that they gave.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from fastblt.benchmarks.command import clean_errors, command
from fastblt.benchmarks.harness import complete, in_turns, ratio, start, whole_length
from fastblt.benchmarks.machine import measured_with
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.report.peers import weights_of, write_gguf
from fastblt.benchmarks.savings.cost_curve import head_weights, weights_read
from fastblt.benchmarks.savings.passes import Recorder
from fastblt.benchmarks.settings import decoding
from fastblt.models.accounting import ModuleParameters
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.settings import PRETRAINED

SETTINGS = ("blt", "auto")


class TokenLoop:
    """Sequences of a GGUF model, decoded together."""

    def __init__(self, path: Path, sequences: int, length: int, threads: int) -> None:
        import llama_cpp as llama

        self._llama = llama
        self._silent = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self._silent, None)
        self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        settings = llama.llama_context_default_params()
        settings.n_seq_max, settings.n_ctx = sequences, sequences * length
        settings.n_batch = settings.n_ubatch = max(512, sequences)
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, settings)
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._size = settings.n_batch
        self._batch = llama.llama_batch_init(self._size, 0, 1)

    def close(self) -> None:
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def complete(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """The `tokens` most likely tokens, at least one, behind each of the prompts, which are as many as sequences."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        made: list[list[int]] = []
        for at, prompt in enumerate(prompts):
            for first in range(0, len(prompt), self._size):
                part = prompt[first : first + self._size]
                last = first + len(part) == len(prompt)
                self._decode([(token, first + i, at, last and i == len(part) - 1) for i, token in enumerate(part)])
            made.append([self._choice(len(part) - 1)])
        for step in range(tokens - 1):
            rows = [(own[-1], len(prompts[at]) + step, at, True) for at, own in enumerate(made)]
            self._decode(rows)
            for at, own in enumerate(made):
                own.append(self._choice(at))
        return made

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """A pass of rows: token, position, sequence, and whether its logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        if failed := self._llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode fails with {failed}")

    def _choice(self, row: int) -> int:
        logits = self._llama.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


@contextmanager
def token_loop(path: Path, sequences: int, length: int, threads: int) -> Iterator[TokenLoop]:
    loop = TokenLoop(path, sequences, length, threads)
    try:
        yield loop
    finally:
        loop.close()


def beside(
    path: Path, about: dict[str, float], model: str, requests: int, prompt_len: int, output_len: int, rounds: int
) -> dict[str, Any]:
    """Bytes a second of both, and ours over theirs, at so many requests at once. `about` the model at `path`."""
    bytes_per_token = about["bytes_per_token"]
    blt = load_checkpoint(model)
    engine = start(blt, requests, prefix_cache=False)
    prompts = held_out_prompts(requests, prompt_len)
    tokens, known = round(output_len / bytes_per_token), round(prompt_len / bytes_per_token)
    rng = np.random.default_rng(0)
    asked = [[int(token) for token in rng.integers(300, 4000, known)] for _ in range(requests)]

    def ours(setting: str) -> float:
        params = [whole_length(decoding(setting), output_len) for _ in prompts]
        began = perf_counter()
        complete(engine, prompts, params)
        return requests * output_len / (perf_counter() - began)

    def theirs(loop: TokenLoop) -> float:
        began = perf_counter()
        loop.complete(asked, tokens)
        return requests * tokens * bytes_per_token / (perf_counter() - began)

    recorder = Recorder(engine)
    read = {}
    for setting in SETTINGS:
        # The first request of `auto` has the cost of passes measured.
        ours(setting)
        with recorder.on():
            ours(setting)
        parameters, head = ModuleParameters.of(blt.config), head_weights(blt.config)
        # At a byte a weight, gigabytes are billions of weights.
        read[setting] = 1e9 * weights_read(recorder.take(), parameters, head, 1, 1) / (requests * output_len)
    passes = requests + tokens - 1
    read["theirs"] = about["weights"] * passes / (requests * tokens * bytes_per_token)
    calls = {name: partial(ours, name) for name in SETTINGS}
    with ExitStack() as loops:
        for threads in sorted({1, os.cpu_count() or 1}):
            loop = loops.enter_context(token_loop(path, requests, known + tokens, threads))
            calls[f"theirs, {threads}"] = partial(theirs, loop)
        runs = in_turns(rounds, calls, warm_up=1)
    fastest = max((name for name in runs if name not in SETTINGS), key=lambda name: statistics.median(runs[name]))
    runs["theirs"] = runs[fastest]
    return {
        "their_threads": int(fastest.split()[-1]),
        "bytes_per_second": {name: statistics.median(own) for name, own in runs.items()},
        "over": {name: ratio(runs[name], runs["theirs"]) for name in SETTINGS},
        "weights_read": read,
    }


@torch.inference_mode()
def measure(
    *,
    model: str = str(PRETRAINED),
    requests: Sequence[int] = (1, 8, 32),
    prompt_len: int = 256,
    output_len: int = 128,
    rounds: int = 7,
) -> dict[str, Any]:
    """Print and return bytes a second by the number of requests at once."""
    table = Table("requests", *(f"`{name}`, bytes a second" for name in SETTINGS), "llama.cpp", "`auto` over llama.cpp")
    with clean_errors("peers"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        about = write_gguf(path, weights_of(model))
        result: dict[str, Any] = {**measured_with(model), "their": about, "requests": {}}
        for count in requests:
            row = beside(path, about, model, count, prompt_len, output_len, rounds)
            result["requests"][str(count)] = row
            rates = (f"{row['bytes_per_second'][name]:.0f}" for name in (*SETTINGS, "theirs"))
            table.row(str(count), *rates, f"{row['over']['auto']:.2f}")
    return result


app = command(measure)

if __name__ == "__main__":
    app()
