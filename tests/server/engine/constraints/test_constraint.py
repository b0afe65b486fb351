"""Constrained completions through the engine: what they hold, and that no method, batch or schedule changes them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

from fastblt.models.vocabulary import BYTE_OFFSET, EOS_ID, decode, encode
from fastblt.server.decoding.choose import resolve
from fastblt.server.engine.constraints.constraint import Constraint
from fastblt.server.engine.constraints.grammar_pool import GrammarPool
from fastblt.server.engine.engine import Engine
from fastblt.server.request import (
    DecodingMethod,
    DecodingParams,
    ErrorCode,
    FinishReason,
    InvalidRequestError,
    Request,
    SamplingParams,
    StructuredOutput,
    Unmasking,
    Utf8,
)
from fastblt.server.settings import EngineSettings
from tests.server.engine.schemas import random_schema
from tests.server.engine.test_contracts import tight_settings
from tests.server.harness import (
    MODELS,
    Finished,
    model,
    random_decoding,
    random_params,
    random_request,
    run,
    settings,
    with_method,
)

seeds = strategies.integers(0, 2**32)
few = hypothesis_settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])

BLT = DecodingParams(DecodingMethod.BLT)
LOSSLESS = [
    DecodingParams(DecodingMethod.BLT_S, draft_length=1),
    DecodingParams(DecodingMethod.BLT_S, draft_length=8),
    DecodingParams(DecodingMethod.BLT_S, draft_length=4, paper_accounting=True),
    DecodingParams(DecodingMethod.BLT_DV, block_size=4),
    DecodingParams(
        DecodingMethod.BLT_DV, block_size=8, unmasking=Unmasking.CONFIDENCE, confidence_threshold=0.05, max_steps=4
    ),
]
DIGITS = StructuredOutput.regex("[0-9]{3,5}")


def request(name: str, decoding: DecodingParams = BLT, prompt: bytes = b"x", **params: Any) -> Request:
    fields = {"max_tokens": 40, "temperature": 1.5, "seed": 5} | params
    return Request(name, [1, *encode(prompt)], SamplingParams(**fields, decoding=decoding), 0.0)


def constrained(rng: random.Random) -> dict[str, Any]:
    """Strict UTF-8, a JSON schema, or both."""
    kind = rng.choice(("utf8", "grammar", "both"))
    fields: dict[str, Any] = {"stop": ()}
    if kind != "grammar":
        fields["utf8"] = Utf8.STRICT
    if kind != "utf8":
        # As compact as can be: a random model likes whitespace.
        schema = random_schema(rng) | {"x-guidance": {"whitespace_flexible": False}}
        fields["structured_output"] = StructuredOutput.json(schema)
    return fields


def check(request: Request, done: Finished) -> None:
    params, text = request.params, decode(done.ids)
    assert done.error is None and EOS_ID not in done.ids
    if params.utf8 == Utf8.STRICT:
        text.decode()
    if params.structured_output is not None and done.reason == "stop":
        jsonschema.validate(json.loads(text), json.loads(params.structured_output.text))


@few
@given(seeds)
def test_verified_methods_equal_blt_under_the_same_constraint(seed: int) -> None:
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    fields = [
        constrained(rng) | {"max_tokens": rng.choice((4, 20, 80)), "min_tokens": rng.choice((0, 2))} for _ in "abc"
    ]
    plain = [random_request(rng, f"r{i}", random_params(rng, **more), **{}) for i, more in enumerate(fields)]
    want = run(Engine(model(which), settings()), [with_method(r, r.request_id, BLT) for r in plain])
    for r in plain:
        check(r, want[r.request_id])
    mixed = [with_method(r, f"{r.request_id}-{i}", decoding) for r in plain for i, decoding in enumerate(LOSSLESS)]
    rng.shuffle(mixed)
    got = run(Engine(model(which), settings(max_passes_per_beat=rng.choice((1, 8)))), mixed)
    for r in mixed:
        reference = want[r.request_id.split("-")[0]]
        assert (got[r.request_id].ids, got[r.request_id].reason) == (reference.ids, reference.reason)


@few
@given(seeds)
def test_constraints_do_not_depend_on_the_batch_nor_on_preemption(seed: int) -> None:
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    requests = []
    for i in range(4):
        decoding = random_decoding(rng)
        fields = constrained(rng) if i else {}
        if decoding.method == DecodingMethod.BLT_D:
            fields = {"utf8": Utf8.STRICT, "stop": ()} if i else {}
        requests.append(random_request(rng, f"r{i}", random_params(rng, decoding=decoding, **fields)))
    engine = Engine(model(which), settings(**tight_settings(rng, which, len(requests))))
    requests = [r for r in requests if len(r.prompt_ids) + r.params.max_tokens <= engine.max_model_len]
    together = run(engine, requests, [rng.randrange(20) for _ in requests])
    for r in requests:
        alone = run(Engine(model(which), settings()), [r])[r.request_id]
        assert (together[r.request_id].ids, together[r.request_id].reason) == (alone.ids, alone.reason)
        check(r, alone)


@few
@given(seeds)
def test_strict_utf8_decodes_in_every_method(seed: int) -> None:
    """Hot, and cut at every length: random models hardly ever finish a character by themselves."""
    rng = random.Random(seed)
    requests = []
    for i in range(24):
        params = random_params(
            rng,
            decoding=random_decoding(rng),
            utf8=Utf8.STRICT,
            stop=(),
            temperature=1.5,
            max_tokens=1 + i,
            min_tokens=0,
        )
        requests.append(random_request(rng, f"r{i}", params))
    done = run(Engine(model(rng.choice(MODELS)), settings(max_running=24)), requests)
    for r in requests:
        check(r, done[r.request_id])
    assert any(byte > 127 for d in done.values() for byte in decode(d.ids))


def test_the_model_is_asked_for_bytes_that_are_allowed_and_not_rewritten() -> None:
    """Where nothing had to be masked, nothing changes."""
    plain = request("r", temperature=0.0, max_tokens=30, prompt=b"def f(x):\n", ignore_eos=True)
    engine = Engine(model(1), settings())
    free = run(engine, [plain])["r"]
    every = StructuredOutput.grammar("start: /(?s:.)*/")
    strict = replace(plain, params=replace(plain.params, utf8=Utf8.STRICT, structured_output=every))
    masked = run(engine, [strict])["r"]
    text = decode(free.ids)
    try:
        end = len(text.decode().encode())
    except UnicodeDecodeError as error:
        end = error.start
    assert decode(masked.ids)[:end] == text[:end]


def test_a_finished_grammar_ends_the_completion_whatever_else_is_asked() -> None:
    """There is no byte to go on with: neither ignore_eos nor min_tokens can ask for one, and the last byte may be the
    last of max_tokens."""
    choice = StructuredOutput.choice(["yes", "yea"])
    engine = Engine(model(0), settings())
    done = run(
        engine,
        [
            request("free", structured_output=choice),
            request("eos", structured_output=choice, ignore_eos=True),
            request("long", structured_output=choice, min_tokens=30),
            request("exact", structured_output=choice, max_tokens=3),
            request("short", structured_output=choice, max_tokens=2),
            request("drafted", LOSSLESS[1], structured_output=choice, ignore_eos=True, min_tokens=30),
            request("block", LOSSLESS[3], structured_output=choice, ignore_eos=True, min_tokens=30),
        ],
    )
    assert {name: d.reason for name, d in done.items()} == dict.fromkeys(done, "stop") | {"short": "length"}
    assert {decode(d.ids) for name, d in done.items() if name != "short"} <= {b"yes", b"yea"}
    assert decode(done["short"].ids) == b"ye"


def test_end_of_text_comes_only_where_the_grammar_accepts() -> None:
    """However much the model wants to end: bias pulls EOS over everything that is allowed."""
    eager = {"logit_bias": {EOS_ID: 100.0}, "structured_output": DIGITS}
    for i, decoding in enumerate([BLT, *LOSSLESS]):
        done = run(Engine(model(i), settings()), [request("r", decoding, **eager)])["r"]
        assert len(done.ids) == 3 and done.reason == "stop"
        done = run(Engine(model(i), settings()), [request("r", decoding, **eager, min_tokens=4)])["r"]
        assert len(done.ids) == 4


def test_a_character_that_does_not_fit_ends_the_completion() -> None:
    """With both constraints a grammar may need more bytes than are left; then it ends between two characters."""
    euros = StructuredOutput.regex("(€€€)+")
    for decoding in (BLT, *LOSSLESS):
        for tokens in range(3, 12):
            asked = request(
                "r", decoding, structured_output=euros, utf8=Utf8.STRICT, max_tokens=tokens, ignore_eos=True
            )
            done = run(Engine(model(2), settings()), [asked])["r"]
            assert decode(done.ids).decode() == "€" * (tokens // 3) and done.reason == "length"
    with pytest.raises(InvalidRequestError, match="fits into max_tokens"):
        Engine(model(2), settings()).add(request("r", structured_output=euros, utf8=Utf8.STRICT, max_tokens=2))
    # A server has accepted it by the time that this is known.
    engine, deltas = Engine(model(2), settings()), []
    engine.add(request("r", structured_output=euros, utf8=Utf8.STRICT, max_tokens=2), wait=False)
    while engine.has_work():
        deltas += engine.step()
    [last] = deltas
    assert last.error_code is ErrorCode.NOTHING_LEFT and "fits into max_tokens" in str(last.error) and not last.ids


def test_a_prompt_that_ends_inside_a_character_is_not_continued() -> None:
    """The output is whole characters by itself."""
    cut = "€".encode()[:2]
    for method in ("blt", "blt-d", "blt-s", "blt-dv"):
        asked = request("r", DecodingParams(DecodingMethod(method)), prompt=cut, utf8=Utf8.STRICT)
        decode(run(Engine(model(1), settings()), [asked])["r"].ids).decode()


def test_stops_cannot_cut_a_character() -> None:
    with pytest.raises(InvalidRequestError, match="valid UTF-8"):
        SamplingParams(utf8=Utf8.STRICT, stop=(b"\xa9",))
    with pytest.raises(InvalidRequestError, match="must be ASCII"):
        SamplingParams(utf8=Utf8.STRICT, stop_token_ids=(0xA9 + BYTE_OFFSET,))
    SamplingParams(stop=(b"\xa9",), stop_token_ids=(0xA9 + BYTE_OFFSET,))
    rng = random.Random(3)
    letters = [chr(code) for code in range(0x80, 0x600)]
    requests = [
        request(
            f"r{i}",
            random_decoding(rng),
            utf8=Utf8.STRICT,
            stop=tuple(rng.sample(letters, 60)),
            stop_token_ids=(ord("a") + BYTE_OFFSET,),
            include_stop_str_in_output=i % 2 == 0,
            max_tokens=60,
            seed=i,
        )
        for i in range(24)
    ]
    done = run(Engine(model(3), settings(max_running=24)), requests)
    assert sum(d.reason == "stop" for d in done.values()) > 5
    for d in done.values():
        decode(d.ids).decode()


def test_a_stop_string_ends_a_grammar_too() -> None:
    done = run(
        Engine(model(0), settings()), [request("r", structured_output=StructuredOutput.regex("a{9}b"), stop=("aaa",))]
    )
    assert done["r"].ids == [] and done["r"].reason == "stop"


def test_a_grammar_that_gets_too_complex_ends_its_request_alone() -> None:
    bomb = StructuredOutput.regex("(a{1,1000}){1,1000}")
    for decoding in (BLT, LOSSLESS[1], LOSSLESS[3]):
        engine = Engine(model(0), settings())
        good = request("good", decoding, structured_output=DIGITS)
        done = run(engine, [request("bad", decoding, structured_output=bomb, max_tokens=300, ignore_eos=True), good])
        assert done["bad"].reason == "error" and "too many expressions" in str(done["bad"].error)
        assert done["bad"].deltas[-1].error_code is ErrorCode.GRAMMAR_TOO_COMPLEX
        assert done["good"].error is None and decode(done["good"].ids).isdigit()


def test_a_place_that_no_byte_satisfies_is_an_error() -> None:
    """Notations can name ids that are no bytes."""
    pool = GrammarPool()
    constraint = Constraint.of(SamplingParams(structured_output=StructuredOutput.grammar('start: "a" <[1]>')), pool)
    assert constraint is not None
    assert constraint.commit(ord("a") + BYTE_OFFSET) is FinishReason.ERROR and constraint.problem


def test_blt_d_is_refused_for_grammars_and_no_server_default_forces_it() -> None:
    engine = Engine(model(0), settings(decoding=DecodingParams(DecodingMethod.BLT_D)))
    with pytest.raises(InvalidRequestError, match="blt-d cannot follow a grammar") as error:
        engine.add(request("r", DecodingParams(DecodingMethod.BLT_D), structured_output=DIGITS))
    assert error.value.param == "decoding.method" and not engine.has_work()
    done = run(engine, [request("r", DecodingParams(), structured_output=DIGITS), request("s", DecodingParams())])
    assert decode(done["r"].ids).isdigit()
    methods = {name: d.deltas[-1].decoding.method for name, d in done.items() if d.deltas[-1].decoding is not None}
    assert methods["r"] != DecodingMethod.BLT_D == methods["s"]
    for default in DecodingMethod:
        chosen = resolve(DecodingParams(), DecodingParams(default), model(0).config, structured=True)
        assert chosen.method != DecodingMethod.BLT_D


def test_what_cannot_be_compiled_is_not_admitted() -> None:
    engine = Engine(model(0), EngineSettings(cache_bytes=16 << 20, max_model_len=400))
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        engine.add(request("r", structured_output=StructuredOutput.regex("(a")))
    assert not engine.has_work() and engine.balanced()
