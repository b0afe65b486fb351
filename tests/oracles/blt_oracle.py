"""The published BLT restated plainly in float64 numpy, one sequence and one query row at a time.

Written from a numeric description of the published network and independent of `models`: it takes the tensors of a
checkpoint by their file names and the plain `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]
Config = Mapping[str, Any]

PRIMES = [
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899,
    9576890767, 3628273133, 2860486313, 5463458053, 3367900313,
]  # fmt: skip


@dataclass
class OracleOutput:
    """logits [T, 260]; entropies [T] in nats; lengths of the patches of T + 1 positions, the next byte's included."""

    logits: Array
    entropies: Array
    lengths: list[int]


def forward(weights: Weights, config: Config, ids: Sequence[int], lengths: list[int] | None = None) -> OracleOutput:
    """Run ids [T] through the whole network. `lengths` overrides the patch rule."""
    ids = list(ids)
    patcher = config["patcher_config"]
    hidden = weights["model.patcher.embed_tokens.weight"][ids]
    hidden = stack(weights, "model.patcher", patcher, hidden, patcher.get("sliding_window"))
    hidden = norm(hidden, weights["model.patcher.norm.weight"], patcher["rms_norm_eps"])
    entropies = np.array([entropy(row) for row in hidden @ weights["model.patcher.lm_head.weight"].T])
    if lengths is None:
        lengths = patch_lengths(entropies, config["patching_threshold"], config.get("max_patch_length"))

    window = config["local_attention_window_len"]
    states = stack(weights, "model.local_encoder", config["encoder_config"], embeddings(weights, config, ids), window)
    latents = global_latents(weights, config, states, lengths)

    decoder, k = config["decoder_config"], config["cross_attn_k"]
    # Byte t reads the newest patch complete once byte t is known: the one before the patch of byte t + 1.
    patch_of = [patch for patch, length in enumerate(lengths) for _ in range(length)]
    source = (latents @ weights["model.local_decoder.patch_embedding_projection.weight"].T).reshape(len(latents), k, -1)
    x = states if config.get("decoder_input", "encoder") == "encoder" else _lookup(weights, ids)
    for index in range(decoder["num_hidden_layers"]):
        if index == 0 or decoder["cross_attn_all_layers"]:
            name = f"model.local_decoder.cross_attn_layers.{index}"
            rows = [
                cross_attention(weights, name, decoder, x[t : t + 1], source[patch_of[t + 1] - 1])
                for t in range(len(ids))
            ]
            x = x + np.concatenate(rows)
        x = layer(weights, f"model.local_decoder.layers.{index}", decoder, x, window)
    x = norm(x, weights["model.local_decoder.norm.weight"], decoder["rms_norm_eps"])
    return OracleOutput(x @ weights["lm_head.weight"].T, entropies, lengths)


def embeddings(weights: Weights, config: Config, ids: list[int]) -> Array:
    """Byte embeddings plus those of hashed n-grams, for every function and then every size."""
    table, vocab = weights["model.encoder_hash_tok_embedding.weight"], config["encoder_hash_byte_group_vocab"]
    sizes = config["encoder_hash_byte_group_size"]
    out = weights["model.local_encoder.embed_tokens.weight"][ids].copy()
    for t in range(len(ids)):
        for function in range(config["encoder_hash_byte_group_nb_functions"]):
            for index, size in enumerate(sizes):
                number = 0
                for j in range(size):
                    at = t - size + 1 + j
                    number += (ids[at] if at >= 0 else 0) * PRIMES[function % len(PRIMES)] ** j
                # The sum wraps as a signed 64-bit integer before the floor-mod.
                number %= 2**64
                if number >= 2**63:
                    number -= 2**64
                out[t] += table[(function * len(sizes) + index) * vocab + number % vocab]
    return out


def patch_lengths(entropies: Array, threshold: float, longest: int | None) -> list[int]:
    """Lengths summing to T + 1: runs between the starts that entropy gives, cut into chunks of at most `longest`."""
    starts = [0, 1] + [i + 1 for i in range(1, len(entropies)) if entropies[i] > threshold]
    lengths = []
    for start, end in zip(starts, [*starts[1:], len(entropies) + 1], strict=True):
        run = end - start
        while longest is not None and run > longest:
            lengths.append(longest)
            run -= longest
        lengths.append(run)
    return lengths


def global_latents(weights: Weights, config: Config, states: Array, lengths: list[int]) -> Array:
    """Latents [P, dg] of the patches that hold at least one of the T bytes."""
    encoder, k = config["encoder_config"], config["cross_attn_k"]
    last = encoder["num_hidden_layers"] - 1 if encoder["cross_attn_all_layers"] else 0
    vectors = []
    start = 0
    for length in lengths:
        own = states[start : start + length]
        start += length
        if len(own) == 0:
            break
        query = own.max(0) @ weights["model.local_encoder.patch_embedding_projection.weight"].T
        query = query.reshape(k, -1)
        name = f"model.local_encoder.cross_attn_layers.{last}"
        vectors.append((query + cross_attention(weights, name, encoder, query, own)).reshape(-1))
    x = np.stack(vectors)
    projection = weights.get("model.global_transformer.token_embedding_projection.weight")
    if projection is not None:
        x = x @ projection.T
    return stack(weights, "model.global_transformer", config["global_config"], x, None)


def stack(weights: Weights, name: str, config: Config, x: Array, window: int | None) -> Array:
    for index in range(config["num_hidden_layers"]):
        x = layer(weights, f"{name}.layers.{index}", config, x, window)
    return x


def layer(weights: Weights, name: str, config: Config, x: Array, window: int | None) -> Array:
    """Pre-norm layer: causal windowed self-attention with rotation, then SwiGLU."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"] or config["num_attention_heads"]
    size = config["hidden_size"] // heads
    theta = config["rope_parameters"]["rope_theta"]
    n = norm(x, weights[f"{name}.input_layernorm.weight"], config["rms_norm_eps"])
    q, k, v = (n @ weights[f"{name}.self_attn.{part}_proj.weight"].T for part in "qkv")
    mixed = np.zeros_like(q)
    for head in range(heads):
        mine = slice(head * size, (head + 1) * size)
        shared = head // (heads // kv_heads)
        theirs = slice(shared * size, (shared + 1) * size)
        turned_q = np.stack([turn(q[i, mine], i, theta) for i in range(len(x))])
        turned_k = np.stack([turn(k[i, theirs], i, theta) for i in range(len(x))])
        for i in range(len(x)):
            first = 0 if window is None else max(0, i - window + 1)
            weight = softmax(turned_k[first : i + 1] @ turned_q[i] / np.sqrt(size))
            mixed[i, mine] = weight @ v[first : i + 1, theirs]
    x = x + mixed @ weights[f"{name}.self_attn.o_proj.weight"].T
    n = norm(x, weights[f"{name}.post_attention_layernorm.weight"], config["rms_norm_eps"])
    gate = n @ weights[f"{name}.mlp.gate_proj.weight"].T
    up = n @ weights[f"{name}.mlp.up_proj.weight"].T
    return x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{name}.mlp.down_proj.weight"].T


def cross_attention(weights: Weights, name: str, config: Config, x: Array, source: Array) -> Array:
    """Every row of x over all of `source`, without positions, and x itself once (the caller adds it again)."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"] or config["num_attention_heads"]
    size = config["hidden_size"] // heads
    q = norm(x, weights[f"{name}.q_norm.weight"], config["rms_norm_eps"]) @ weights[f"{name}.q_proj.weight"].T
    normed = norm(source, weights[f"{name}.k_norm.weight"], config["rms_norm_eps"])
    k, v = (normed @ weights[f"{name}.{part}_proj.weight"].T for part in "kv")
    mixed = np.zeros_like(q)
    for i in range(len(x)):
        for head in range(heads):
            mine = slice(head * size, (head + 1) * size)
            shared = head // (heads // kv_heads)
            theirs = slice(shared * size, (shared + 1) * size)
            mixed[i, mine] = softmax(k[:, theirs] @ q[i, mine] / np.sqrt(size)) @ v[:, theirs]
    return mixed @ weights[f"{name}.o_proj.weight"].T + x


def turn(vector: Array, position: int, theta: float) -> Array:
    """Rotate neighbors (2i, 2i + 1) by position / theta^(2i / D)."""
    out = np.empty_like(vector)
    for i in range(0, len(vector), 2):
        angle = position / theta ** (i / len(vector))
        out[i] = vector[i] * np.cos(angle) - vector[i + 1] * np.sin(angle)
        out[i + 1] = vector[i + 1] * np.cos(angle) + vector[i] * np.sin(angle)
    return out


def norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def softmax(scores: Array) -> Array:
    raised = np.exp(scores - scores.max())
    return raised / raised.sum()


def entropy(logits: Array) -> float:
    """Nats of one row's next-byte distribution."""
    p = softmax(logits)
    return float(-(p * np.log(p)).sum())


def _lookup(weights: Weights, ids: list[int]) -> Array:
    return weights["model.local_decoder.embed_tokens.weight"][ids]
