"""Alternatives to this engine, on the same machine: `transformers`' BLT with the same weights, and a token-level model
with as many weights under llama.cpp.

    python -m fastblt.benchmarks.report.peers transformers --json FILE
    python -m fastblt.benchmarks.report.peers hub FOLDER       the same for `transformers serve`
    python -m fastblt.benchmarks.report.peers gguf FOLDER      a random model of the checkpoint's size, with a tokenizer

The token-level model has random weights, since its speed does not depend on them. Its tokenizer is trained on the
shipped checkpoint's corpus, so that its bytes per token are realistic.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastblt.benchmarks.command import command
from fastblt.benchmarks.load.serving import running
from fastblt.benchmarks.machine import measured_with
from fastblt.benchmarks.prompts import held_out_prompts, held_out_sources
from fastblt.benchmarks.text_statistics import equal_positions
from fastblt.models.training.corpus import collect, standard_library
from fastblt.server.llm import LLM
from fastblt.server.request import DecodingMethod, DecodingParams, SamplingParams
from fastblt.server.settings import PRETRAINED

#: The token-level model: width, heads, feed-forward width, vocabulary.
_WIDTH, _HEADS, _INNER, _VOCABULARY = 256, 8, 704, 4096
#: Sizes of the batches that `transformers` is tried with, and requests that this engine gets at once.
_BATCHES = (2, 4, 8)
_TOGETHER = 32
#: Bytes of the corpus that the tokenizer is trained on.
_TRAINED_ON = 2_000_000
_SPECIALS = ("<s>", "</s>")


def transformers_blt(model: str, prompts: int, output_len: int, prompt_len: int = 512) -> dict[str, Any]:
    """Bytes a second of `transformers` and of this engine on one checkpoint, greedy, in turns: medians over prompts.

    In each round one prompt is completed by `transformers` and by our methods. Then come `batches` of `transformers`,
    by size. They decode only a few bytes in the middle of the output: each byte recomputes all before it, and in the
    middle its cost is the mean. Then `ours_together` runs 32 requests at once. Times are of whole requests. `over` is
    ours over theirs with one request, `together_over` ours over their best batch. Both are medians of ratios within a
    round, since the machine's speed changes between rounds. `equal_bytes` counts the positions with the same byte.
    `use_cache=False` is the only correct path of `transformers`: with its cache, patches and hashes are made from the
    newest byte alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    asked, together = held_out_prompts(prompts, prompt_len), held_out_prompts(_TOGETHER, prompt_len)
    warm_up = held_out_prompts(1, 16, seed=9)
    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True).eval()
    threads = torch.get_num_threads()
    one, many = LLM(model, max_running=1, prefix_cache=False), LLM(model, max_running=_TOGETHER, prefix_cache=False)

    def theirs(ids: list[list[int]], length: int) -> list[list[int]]:
        # Our engine sets torch to one thread for a small model.
        torch.set_num_threads(threads)
        with torch.inference_mode():
            made = peer.generate(
                torch.tensor(ids), use_cache=False, do_sample=False, min_new_tokens=length, max_new_tokens=length
            )
        return made[:, len(ids[0]) :].tolist()

    def ours(llm: LLM, ids: list[list[int]], length: int, method: DecodingMethod) -> list[list[int]]:
        torch.set_num_threads(1)
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True, decoding=DecodingParams(method))
        return [output.ids for output in llm.generate(ids, params)]

    alone = (DecodingMethod.BLT, DecodingMethod.AUTO, DecodingMethod.BLT_S, DecodingMethod.BLT_DV)
    all_at_once = (DecodingMethod.BLT, DecodingMethod.AUTO)
    few, equal = max(2, output_len // 16), 0
    middle = held_out_prompts(max(_BATCHES), prompt_len + (output_len - few) // 2)
    theirs(warm_up, 4)
    for method in alone:
        ours(one, warm_up, output_len, method)
        ours(many, together[:2], output_len, method)
    rates: dict[tuple[str, Any], list[float]] = {}

    def timed(kind: str, which: Any, count: int, run: Callable[[], list[list[int]]]) -> list[list[int]]:
        clock = time.perf_counter()
        made = run()
        rates.setdefault((kind, which), []).append(count / (time.perf_counter() - clock))
        return made

    for ids in asked:
        [written] = timed("theirs", None, output_len, partial(theirs, [ids], output_len))
        for method in alone:
            [text] = timed("ours", method.value, output_len, partial(ours, one, [ids], output_len, method))
            equal += equal_positions(written, text) if method == DecodingMethod.BLT else 0
        for size in _BATCHES:
            timed("batches", size, size * few, partial(theirs, middle[:size], few))
        for method in all_at_once:
            run = partial(ours, many, together, output_len, method)
            timed("ours_together", method.value, _TOGETHER * output_len, run)

    def medians(kind: str) -> dict[Any, float]:
        return {which: statistics.median(own) for (of, which), own in rates.items() if of == kind}

    def over(kind: str, method: DecodingMethod, peer: tuple[str, Any]) -> float:
        pairs = zip(rates[kind, method.value], rates[peer], strict=True)
        return statistics.median(one / other for one, other in pairs)

    batches = medians("batches")
    best = max(batches, key=lambda size: batches[size])
    return {
        **measured_with(model),
        "peer": "transformers BltForCausalLM.generate(use_cache=False), the same weights",
        "prompt_len": prompt_len,
        "output_len": output_len,
        "num_prompts": prompts,
        "threads": threads,
        "output_byte_throughput": medians("theirs")[None],
        "batches": batches,
        "ours": medians("ours"),
        "over": {method.value: over("ours", method, ("theirs", None)) for method in alone},
        "ours_together": medians("ours_together"),
        "together_over": {method.value: over("ours_together", method, ("batches", best)) for method in all_at_once},
        "together": _TOGETHER,
        "equal_bytes": equal,
    }


def write_gguf(path: Path, weights: int) -> dict[str, float]:
    """Write a random Llama with about `weights` fp32 weights. Returns its `weights`, `layers` and `bytes_per_token`."""
    from gguf import GGUFWriter, TokenType

    tokenizer, bytes_per_token = _tokenizer()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)

    layers = _layers(weights, len(tokens))
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_name("random-llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in _SPECIALS else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])

    def tensor(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(columns**-0.5)
        writer.add_tensor(name, values)

    def gain(name: str) -> None:
        writer.add_tensor(name, np.ones(_WIDTH, np.float32))

    tensor("token_embd.weight", len(tokens), _WIDTH)
    tensor("output.weight", len(tokens), _WIDTH)
    gain("output_norm.weight")
    for layer in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{part}.weight", _WIDTH, _WIDTH)
        tensor(f"blk.{layer}.ffn_gate.weight", _INNER, _WIDTH)
        tensor(f"blk.{layer}.ffn_up.weight", _INNER, _WIDTH)
        tensor(f"blk.{layer}.ffn_down.weight", _WIDTH, _INNER)
        gain(f"blk.{layer}.attn_norm.weight")
        gain(f"blk.{layer}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"weights": _count(layers, len(tokens)), "layers": layers, "bytes_per_token": bytes_per_token}


def write_hub_folder(folder: Path, weights: int) -> dict[str, float]:
    """Write such a model as a folder of `transformers`. Returns the same as `write_gguf`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer, bytes_per_token = _tokenizer()
    size = tokenizer.get_vocab_size()
    layers = _layers(weights, size)
    begin, end = (tokenizer.token_to_id(token) for token in _SPECIALS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=_WIDTH,
        intermediate_size=_INNER,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        max_position_embeddings=4096,
        bos_token_id=begin,
        eos_token_id=end,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_SPECIALS[0], eos_token=_SPECIALS[1]).save_pretrained(
        folder
    )
    return {"weights": _count(layers, size), "layers": layers, "bytes_per_token": bytes_per_token}


def _tokenizer() -> tuple[Any, float]:
    """A byte-level BPE tokenizer trained on the corpus, and its bytes per token on held-out text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = b"\n".join(source.data for source in collect(standard_library()) if not source.held_out)
    tokenizer.train_from_iterator([seen[:_TRAINED_ON].decode("utf-8", "ignore")], trainer)
    held_out = b"\n".join(source.data for source in held_out_sources()).decode("utf-8", "ignore")[:200_000]
    return tokenizer, len(held_out.encode()) / len(tokenizer.encode(held_out).ids)


_PER_LAYER = 4 * _WIDTH**2 + 3 * _WIDTH * _INNER + 2 * _WIDTH


def _layers(weights: int, vocabulary: int) -> int:
    return max(1, round((weights - _count(0, vocabulary)) / _PER_LAYER))


def _count(layers: int, vocabulary: int) -> int:
    return 2 * vocabulary * _WIDTH + _WIDTH + layers * _PER_LAYER


def weights_of(model: str) -> int:
    """The number of weights of a checkpoint, hash tables included."""
    from safetensors import safe_open

    total = 0
    for path in Path(model).glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            total += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return total


@contextmanager
def llama_server(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run llama-cpp-python's server with a random model of the size of `model`. Yields its URL and a description."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        about = write_gguf(path, weights_of(model))
        # By default a new request interrupts the one before it.
        options = ["llama_cpp.server", "--interrupt_requests", "False", "--n_ctx", "4096", "--model"]
        with running([*options, str(path)], "/v1/models") as server:
            command_line = (
                f"python -m fastblt.benchmarks.report.peers gguf . && python -m {' '.join(options)} random.gguf"
            )
            named = {"server": "llama_cpp.server", "model_id": "random-llama", "server_command": command_line}
            yield server.url, named | about


@contextmanager
def transformers_server(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run `transformers serve` with the same kind of random model. Yields its URL and a description."""
    with tempfile.TemporaryDirectory() as folder:
        about = write_hub_folder(Path(folder), weights_of(model))
        options = ["transformers.cli.transformers", "serve", "--device", "cpu"]
        with running([*options, folder], "/health") as server:
            command_line = (
                "python -m fastblt.benchmarks.report.peers hub FOLDER && transformers serve --device cpu FOLDER"
            )
            named = {"server": "transformers serve", "model_id": "random-llama", "server_command": command_line}
            yield server.url, named | about


def transformers(*, model: str = str(PRETRAINED), num_prompts: int = 3, output_len: int = 64) -> dict[str, Any]:
    """`transformers`' BLT and this engine on the same weights, in turns."""
    result = transformers_blt(model, num_prompts, output_len)
    print(f"{result['output_byte_throughput']:.2f} bytes/s")
    return result


def gguf(folder: Path, *, model: str = str(PRETRAINED)) -> dict[str, Any]:
    """Write a random token-level model of a checkpoint's size for llama.cpp."""
    folder.mkdir(parents=True, exist_ok=True)
    about = write_gguf(folder / "random.gguf", weights_of(model))
    print(about)
    return about


def hub(folder: Path, *, model: str = str(PRETRAINED)) -> dict[str, Any]:
    """The same for `transformers serve`."""
    folder.mkdir(parents=True, exist_ok=True)
    about = write_hub_folder(folder, weights_of(model))
    print(about)
    return about


app = command(transformers, gguf, hub)

if __name__ == "__main__":
    app()
