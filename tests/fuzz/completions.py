"""Bodies of POST /v1/completions with any of its fields, values at the ends of their ranges among them."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

from hypothesis import strategies as st

from tests.server.engine.schemas import random_schema

#: What verifies gives the bytes of BLT, however it drafts.
DRAFTING: list[dict[str, Any]] = [
    {"method": "auto"},
    *({"method": "blt-s", "draft_length": length} for length in (1, 3, 8, 32)),
    {"method": "blt-s", "paper_accounting": True},
    *({"method": "blt-dv", "block_size": size} for size in (4, 8)),
    {"method": "blt-dv", "unmasking": "confidence", "confidence_threshold": 0.05},
    {"method": "blt-dv", "unmasking": "confidence", "max_steps": 2, "paper_accounting": True},
    {"method": "blt-dv", "unmasking": "entropy", "entropy_bound": 8.0, "entropy_rule": "exclusive_max"},
    *({"method": "blt-dsv", "block_size": 4, "draft_length": length} for length in (1, 6, 16)),
    {"method": "blt-dsv", "unmasking": "confidence", "confidence_threshold": 0.05, "max_steps": 2},
]
BLOCKS: list[dict[str, Any]] = [
    {"method": "blt-d"},
    {"method": "blt-d", "unmasking": "confidence", "confidence_threshold": 0.0, "block_size": 4},
    {"method": "blt-d", "unmasking": "entropy", "entropy_bound": 4.0, "align_blocks": True},
    {"method": "blt-d", "unmasking": "one_step"},
]

_LETTERS = 'ab \n{}"1é'
_GRAMMARS: list[dict[str, Any]] = [
    {"choice": ["a", "ab", "abc", "é日本", "b" * 30]},
    {"regex": "[ab]{2,9}|é+x"},
    {"regex": "(a|b)*c?"},
    {"grammar": 'start: e\ne: t | e "+" t\nt: "(" e ")" | /[0-9]{1,3}/'},
    {"json_object": True},
]


def _texts(most: int) -> st.SearchStrategy[str]:
    return st.one_of(st.text(_LETTERS, min_size=1, max_size=most), st.text(min_size=1, max_size=most // 4 + 1)).filter(
        lambda text: text.isascii() or text.encode("utf-8", "ignore").decode() == text
    )


def _prompts() -> st.SearchStrategy[dict[str, Any]]:
    ids = st.lists(st.integers(0, 259).filter(lambda i: i != 2), min_size=1, max_size=120)
    return st.one_of(
        _texts(200).map(lambda text: {"prompt": text}),
        st.lists(_texts(60), min_size=1, max_size=2).map(lambda texts: {"prompt": texts}),
        ids.map(lambda ids: {"prompt": ids}),
        st.just({"prompt": [1]}),
        st.binary(min_size=1, max_size=90).map(
            lambda data: {"prompt": base64.b64encode(data).decode(), "prompt_encoding": "base64"}
        ),
    )


def _structures() -> st.SearchStrategy[dict[str, Any]]:
    schemas = st.integers(0, 2**32).map(lambda seed: random_schema(random.Random(seed)))
    wrapped = schemas.map(lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    return st.one_of(
        st.sampled_from(_GRAMMARS).map(lambda grammar: {"structured_outputs": grammar}),
        schemas.map(lambda schema: {"structured_outputs": {"json": schema}}),
        wrapped.map(lambda format_: {"response_format": format_}),
        st.just({"response_format": {"type": "json_object"}}),
    )


#: Of each field, some values or none; those of a field's name are put in under it.
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.one_of(
        st.sampled_from((0, 1e-46, 1e-40, 1e-38, 1e-10, 9e-6, 1e-5, 1e-4, 0.1, 0.3, 0.7, 1, 1.5, 100)), st.floats(0, 2)
    ),
    "top_k": st.sampled_from((-1, 0, 1, 2, 40, 259, 260, 2**31)),
    "top_p": st.one_of(st.sampled_from((5e-324, 1e-9, 0.5, 0.9, 1.0)), st.floats(0.01, 1)),
    "min_p": st.one_of(st.sampled_from((0.0, 1e-300, 0.05, 1.0)), st.floats(0, 1)),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.one_of(st.sampled_from((0.01, 0.5, 1.3, 100.0)), st.floats(0.01, 100)),
    "logit_bias": st.dictionaries(
        st.integers(0, 259).map(str), st.one_of(st.sampled_from((-100, 100)), st.floats(-100, 100)), max_size=90
    ),
    "stop": st.one_of(_texts(3), st.lists(st.one_of(_texts(2), _texts(12)), max_size=6)),
    "stop_token_ids": st.lists(st.integers(0, 259), max_size=6),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "logprobs": st.integers(0, 20),
    "prompt_logprobs": st.integers(0, 20),
    "echo": st.booleans(),
    "return_token_ids": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
    "return_base64": st.booleans(),
    "return_patches": st.booleans(),
    "return_rounds": st.booleans(),
    "utf8": st.sampled_from(("strict", "replace")),
    "priority": st.integers(-1000, 1000),
    "cache_salt": st.sampled_from(("a", "b")),
    "user": st.just("somebody"),
    "min_tokens": st.integers(0, 20),
    "n": st.integers(1, 3),
}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A body without `decoding`; most of what is drawn may be served, and the rest is refused."""
    body = draw(_prompts()) | {"max_tokens": draw(st.integers(1, 40)), "seed": draw(st.integers(-(2**63), 2**63 - 1))}
    for name in draw(st.sets(st.sampled_from(sorted(_FIELDS)), max_size=9)):
        body[name] = draw(_FIELDS[name])
    if draw(st.sampled_from((False, False, True))):
        body |= draw(_structures())
    if draw(st.sampled_from((False, True))):
        # A few letters only: what is random otherwise comes to stop strings and repetitions.
        letters = draw(st.sampled_from((b"ab", b"ab \n", b'a1{}"', "éa".encode())))
        body["logit_bias"] = {str(byte + 4): 60 for byte in letters}
        body["stop"] = draw(st.lists(st.text("ab \n1{é", min_size=2, max_size=5), max_size=3))
    # As it comes over the wire.
    taken: dict[str, Any] = json.loads(json.dumps(body))
    return taken
