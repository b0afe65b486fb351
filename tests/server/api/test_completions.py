"""The wire format, with a real engine behind a real server."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from typing import Any

import openai
import pytest

from fastblt.models.vocabulary import decode, encode
from fastblt.server.llm import LLM
from fastblt.server.process.client import EngineClient
from fastblt.server.request import DecodingMethod, DecodingParams, SamplingParams
from tests.server.api import fake_engine
from tests.server.api.running import MAX_MODEL_LEN, MODEL, RunningServer, parse_events, tiny_settings
from tests.server.api.test_bad_requests import assert_error

GOOD = {"prompt": "Hello", "max_tokens": 24, "seed": 1, "ignore_eos": True}
#: What it costs is the same each time too; `auto` may draft otherwise when it is asked again.
REPEATABLE = GOOD | {"decoding": {"method": "blt-s"}}
METHODS = ["blt", "blt-s", "blt-d", "blt-dv"]


@pytest.fixture(scope="module")
def reference(checkpoint: str) -> LLM:
    return LLM(
        checkpoint,
        cache_bytes=2**26,
        max_model_len=MAX_MODEL_LEN,
        threads=1,
        deterministic=True,
        prefix_cache=False,
    )


def fake(**fields: Any) -> RunningServer:
    settings = tiny_settings("fake")
    return RunningServer(EngineClient(settings, command=fake_engine.command(**fields)))


def joined(events: list[Any]) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    for event in events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


def test_the_answer_has_openai_s_shape(server: RunningServer) -> None:
    answer = server.complete(**GOOD, decoding={"method": "blt"})
    assert answer.keys() == {"id", "object", "created", "model", "choices", "usage", "efficiency"}
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion" and answer["model"] == MODEL
    assert isinstance(answer["created"], int)
    [choice] = answer["choices"]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 24,
        "total_tokens": 29,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
    }
    efficiency = answer["efficiency"]
    assert efficiency.keys() == {
        "method", "settings", "nfe", "rounds", "denoising_steps", "drafted", "accepted", "wasted", "patches",
        "bytes_per_patch", "gb_paper", "gb",
    }  # fmt: skip
    assert (efficiency["method"], efficiency["settings"]) == ("blt", {})
    assert efficiency["bytes_per_patch"] == 24 / efficiency["patches"]
    assert 0 < efficiency["gb_paper"] < efficiency["gb"]
    assert efficiency["nfe"].keys() == {"patcher", "encoder", "global", "decoder"}
    assert efficiency["nfe"]["decoder"] >= 24 > efficiency["nfe"]["global"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_text_is_the_engine_s_bytes_streamed_or_not(server: RunningServer, reference: LLM, method: str) -> None:
    params = SamplingParams(max_tokens=24, seed=1, ignore_eos=True, decoding=DecodingParams(method=method))  # type: ignore[arg-type]
    [expected] = reference.generate("Hello", params)
    body = {**GOOD, "decoding": {"method": method}}
    answer = server.complete(**body)
    assert answer["choices"][0]["text"] == expected.text
    assert joined(server.events(**body))[0] == expected.text
    if method in ("blt-s", "blt-dv"):
        usage, ledger = answer["usage"]["completion_tokens_details"], answer["efficiency"]
        assert usage["accepted_prediction_tokens"] == ledger["accepted"]
        assert usage["rejected_prediction_tokens"] == ledger["drafted"] - ledger["accepted"] > 0


def test_the_stream_to_the_letter(server: RunningServer) -> None:
    with server.http.stream("POST", "/v1/completions", json={**GOOD, "stream": True}) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        assert "content-length" not in response.headers
        raw = b"".join(response.iter_raw())
    assert raw.endswith(b"}\n\ndata: [DONE]\n\n") and raw.count(b"[DONE]") == 1
    *events, done = parse_events(iter([raw]))
    assert done == "[DONE]"
    for event in events:
        assert event.keys() == {"id", "object", "created", "model", "choices"}
        assert event["id"] == events[0]["id"] and len(event["choices"]) == 1
        # Only the last may be empty.
        assert event["choices"][0]["text"] or event is events[-1]
    finishes = [event["choices"][0]["finish_reason"] for event in events]
    assert finishes == [None] * (len(events) - 1) + ["length"]


@pytest.mark.parametrize("stream", [False, True])
def test_cached_bytes_are_those_of_the_prompts(checkpoint: str, stream: bool) -> None:
    prompts = ["and so on, " * 20, "and back again, " * 10]
    answers = []
    with RunningServer(EngineClient(tiny_settings(checkpoint, prefix_cache=True))) as server:
        # Two choices that the engine takes up one after the other would share what the first has computed.
        for choices in (1, 2):
            body: dict[str, Any] = GOOD | {"prompt": prompts, "n": choices}
            if stream:
                *events, _ = server.events(**body, stream_options={"include_usage": True})
                answers.append(events[-1]["usage"])
            else:
                answers.append(server.complete(**body)["usage"])
        server.assert_all_free()
        queries, hits = (server.metric(f"fastblt_prefix_cache_{name}_total") for name in ("queries", "hits"))
    first, again = (answer["prompt_tokens_details"]["cached_tokens"] for answer in answers)
    # A prompt counts once, however many choices there are; some of its last page is computed again.
    assert first == 0 < again < answers[0]["prompt_tokens"] == sum(map(len, prompts))
    assert (queries, hits) == (3 * sum(map(len, prompts)), 2 * again)


def test_include_usage_adds_one_event(server: RunningServer) -> None:
    events = server.events(**REPEATABLE, stream_options={"include_usage": True})
    *chunks, last, done = events
    assert done == "[DONE]" and last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    whole = server.complete(**REPEATABLE)
    assert last["usage"] == whole["usage"] and last["efficiency"] == whole["efficiency"]
    events = server.events(**REPEATABLE, stream_options={"include_usage": False})
    assert all("usage" not in event for event in events[:-1])


def test_prompts_of_every_kind(server: RunningServer) -> None:
    ids = encode(b"Hello")
    texts = {
        server.complete(**GOOD | {"prompt": prompt})["choices"][0]["text"]
        for prompt in ("Hello", ["Hello"], ids, [ids], [1, *ids])
    }
    assert len(texts) == 1
    unconditional = server.complete(**GOOD | {"prompt": [1]})
    assert unconditional["usage"]["prompt_tokens"] == 0 and unconditional["choices"][0]["text"]
    assert server.complete(**GOOD | {"prompt": [3, 0, 70]})["usage"]["prompt_tokens"] == 3


def test_several_prompts_and_choices_keep_their_places(server: RunningServer) -> None:
    body = {**GOOD, "prompt": ["Hello", "Bye", "Hello"], "n": 2, "best_of": 2}
    answer = server.complete(**body)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[:2] == texts[4:] and texts[0] != texts[1] and texts[0] != texts[2]
    assert texts[0] == server.complete(**GOOD)["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == 5 + 3 + 5 and answer["usage"]["completion_tokens"] == 6 * 24
    events = server.events(**body)
    assert [joined(events)[index] for index in range(6)] == texts
    finishes = [c["finish_reason"] for e in events[:-1] for c in e["choices"] if c["finish_reason"]]
    assert finishes == ["length"] * 6


def test_unseeded_choices_differ(server: RunningServer) -> None:
    answer = server.complete(prompt="Hello", max_tokens=24, n=16, ignore_eos=True)
    assert len({choice["text"] for choice in answer["choices"]}) > 8


def test_stop_strings_are_cut_exactly(server: RunningServer, reference: LLM) -> None:
    [whole] = reference.generate("Hello", SamplingParams(max_tokens=200, seed=5, ignore_eos=True))
    body = {"prompt": "Hello", "max_tokens": 200, "seed": 5, "ignore_eos": True}
    # Stops must be text, so take runs of ASCII that the completion is known to have.
    runs = [at for at in range(20, 190) if all(byte < 0x80 for byte in whole.data[at : at + 2])][:4]
    assert runs
    for at in runs:
        stop = whole.data[at : at + 2]
        cut = whole.data[: whole.data.index(stop)]
        for method in ("blt", "blt-s", "blt-dv"):
            asked = {**body, "stop": ["never there", stop.decode()], "decoding": {"method": method}}
            answer = server.complete(**asked)
            [choice] = answer["choices"]
            assert choice["text"] == cut.decode("utf-8", "replace")
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop.decode())
            assert answer["usage"]["completion_tokens"] == len(cut)
            assert joined(server.events(**asked))[0] == choice["text"]
        kept = server.complete(**body, stop=stop.decode(), include_stop_str_in_output=True)["choices"][0]
        assert kept["text"] == (cut + stop).decode("utf-8", "replace")


def test_logprobs(server: RunningServer) -> None:
    body = {**GOOD, "logprobs": 3}
    [choice] = server.complete(**body)["choices"]
    logprobs = choice["logprobs"]
    assert logprobs.keys() == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
    assert {len(values) for values in logprobs.values()} == {24}
    assert choice["text"] == server.complete(**GOOD)["choices"][0]["text"]
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert 3 <= len(top) <= 4 and top[token] == value <= 0.0
    for at, (offset, token) in enumerate(zip(logprobs["text_offset"], logprobs["tokens"], strict=True)):
        if not token.startswith("bytes:"):
            assert choice["text"][offset] == token
        assert offset >= logprobs["text_offset"][max(at - 1, 0)]
    streamed: dict[str, list[Any]] = defaultdict(list)
    for event in server.events(**body)[:-1]:
        for name, values in event["choices"][0]["logprobs"].items():
            streamed[name] += values
    assert streamed == logprobs


def test_greedy_bytes_are_the_top_by_equality(server: RunningServer) -> None:
    [choice] = server.complete(**GOOD | {"temperature": 0, "logprobs": 1})["choices"]
    for value, top in zip(choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True):
        # BOE, BOS and BPE may be likelier, and are never produced.
        assert value == max(v for name, v in top.items() if name not in ("<boe>", "<bos>", "<bpe>", "<eos>"))


def test_patches(server: RunningServer, reference: LLM) -> None:
    params = SamplingParams(max_tokens=24, seed=1, ignore_eos=True, return_patches=True)
    [offline] = reference.generate("Hello", params)
    assert offline.patches is not None and offline.patches.starts
    body = {**GOOD, "return_patches": True}
    for method in METHODS:
        asked = {**body, "decoding": {"method": method}}
        answer = server.complete(**asked)
        [choice] = answer["choices"]
        patches = choice["patches"]
        assert patches.keys() == {"starts", "entropies", "steps"}
        assert len(patches["entropies"]) == len(patches["steps"]) == 24
        assert len(patches["starts"]) == answer["efficiency"]["patches"]
        if method != "blt-d":
            assert patches["starts"] == offline.patches.starts
            assert patches["entropies"] == pytest.approx(offline.patches.entropies, abs=1e-4)
        # Streamed, they come with the end.
        chunks = [event["choices"][0] for event in server.events(**asked)[:-1]]
        assert ["patches" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1]["patches"] == patches
    assert "patches" not in server.complete(**GOOD)["choices"][0]


def test_efficiency_tells_what_really_ran(server: RunningServer, reference: LLM) -> None:
    asked = {"method": "blt-dv", "confidence_threshold": 0.2, "block_size": 4}
    answer = server.complete(**GOOD, decoding=asked, n=2)
    efficiency = answer["efficiency"]
    assert efficiency["method"] == "blt-dv"
    assert efficiency["settings"] == {
        "block_size": 4, "unmasking": "confidence", "confidence_threshold": 0.2, "paper_accounting": False,
    }  # fmt: skip
    # Two choices cost what two requests cost.
    alone = server.complete(**GOOD, decoding=asked)["efficiency"]
    assert efficiency["nfe"]["decoder"] > alone["nfe"]["decoder"] and efficiency["gb"] > alone["gb"]
    assert alone["denoising_steps"] >= alone["rounds"] > 0
    params = SamplingParams(
        max_tokens=24,
        seed=1,
        ignore_eos=True,
        decoding=DecodingParams(DecodingMethod.BLT_DV, block_size=4, confidence_threshold=0.2),
    )
    [offline] = reference.generate("Hello", params)
    assert (alone["gb"], alone["gb_paper"]) == (offline.ledger.gb, offline.ledger.gb_paper)
    assert offline.decoding is not None and offline.decoding.confidence_threshold == 0.2


def test_zero_logprobs_gives_the_chosen_byte(server: RunningServer) -> None:
    [choice] = server.complete(**GOOD | {"logprobs": 0})["choices"]
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"])


def test_echo(server: RunningServer) -> None:
    plain = server.complete(**REPEATABLE)
    echoed = server.complete(**REPEATABLE, echo=True)
    assert echoed["choices"][0]["text"] == "Hello" + plain["choices"][0]["text"]
    assert echoed["usage"] == plain["usage"]
    events = server.events(**REPEATABLE, echo=True)
    assert events[0]["choices"][0]["text"].startswith("Hello")
    assert joined(events)[0] == echoed["choices"][0]["text"]


def test_echo_joins_a_character_that_the_prompt_began(server: RunningServer) -> None:
    # The last byte of "é" is forced.
    body = {"prompt": encode("é".encode()[:1]), "max_tokens": 1, "logit_bias": {str(0xA9 + 4): 100}, "temperature": 0}
    assert server.complete(**body)["choices"][0]["text"] == "\ufffd"
    assert server.complete(**body, echo=True)["choices"][0]["text"] == "é"


def test_an_unfinished_character_is_flushed_at_the_end(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 3, "logit_bias": {str(0xF0 + 4): 100}, "temperature": 0}
    assert server.complete(**body)["choices"][0]["text"] == "\ufffd" * 3
    assert joined(server.events(**body))[0] == "\ufffd" * 3


def test_sampling_fields_reach_the_engine(server: RunningServer, reference: LLM) -> None:
    fields = {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
        "seed": -7,
        "ignore_eos": True,
        "max_tokens": 30,
    }
    params = SamplingParams(**fields, logit_bias={69: 2.0}, stop_token_ids=(80,))  # type: ignore[arg-type]
    [expected] = reference.generate("Hello", params)
    answer = server.complete(prompt="Hello", **fields, logit_bias={"69": 2.0}, stop_token_ids=[80])
    assert answer["choices"][0]["text"] == expected.text
    assert answer["usage"]["completion_tokens"] == len(expected.ids)


def test_top_k_minus_one_is_all(server: RunningServer) -> None:
    assert server.complete(**GOOD, top_k=-1)["choices"] == server.complete(**GOOD)["choices"]


def test_stop_token_is_named(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 9, "logit_bias": {"70": 100}, "temperature": 0, "stop_token_ids": [70]}
    answer = server.complete(**body)
    assert answer["choices"][0]["text"] == "" and answer["choices"][0]["stop_reason"] == 70
    assert answer["usage"]["completion_tokens"] == 0
    events = server.events(**body)
    assert len(events) == 2 and events[0]["choices"][0]["finish_reason"] == "stop"


def test_raw_bytes_in_and_out(server: RunningServer) -> None:
    data = b"\xff\xe2\x82 raw \x00"
    body = {**GOOD, "prompt": encode(data), "logit_bias": {str(0xE2 + 4): 3}, "max_tokens": 40}
    answer = server.complete(**body, return_token_ids=True, return_base64=True)
    [choice] = answer["choices"]
    assert choice["prompt_token_ids"] == encode(data) and len(choice["token_ids"]) == 40
    out = base64.b64decode(choice["base64"])
    assert out == decode(choice["token_ids"]) and out.decode("utf-8", "replace") == choice["text"]
    assert "\ufffd" in choice["text"]
    encoded = {**body, "prompt": base64.b64encode(data).decode(), "prompt_encoding": "base64"}
    assert server.complete(**encoded)["choices"][0]["text"] == choice["text"]
    both = server.complete(**encoded | {"prompt": [encoded["prompt"]] * 2})["choices"]
    assert [c["text"] for c in both] == [choice["text"]] * 2
    chunks = [event["choices"][0] for event in server.events(**body, return_token_ids=True, return_base64=True)[:-1]]
    assert b"".join(base64.b64decode(chunk["base64"]) for chunk in chunks) == out
    assert [i for chunk in chunks for i in chunk["token_ids"]] == choice["token_ids"]
    assert chunks[0]["prompt_token_ids"] == encode(data) and not any(
        "prompt_token_ids" in chunk for chunk in chunks[1:]
    )
    echoed = server.complete(**body, return_base64=True, echo=True)["choices"][0]
    assert base64.b64decode(echoed["base64"]) == data + out


def test_tokens_named_by_their_ids(server: RunningServer) -> None:
    body = {**GOOD, "logprobs": 1, "return_token_ids": True}
    [choice] = server.complete(**body, return_tokens_as_token_ids=True)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)


def test_usage_in_every_event(server: RunningServer) -> None:
    for include in (True, False):
        options = {"include_usage": include, "continuous_usage_stats": True}
        *chunks, done = server.events(**GOOD, stream_options=options)
        assert done == "[DONE]"
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[0] > 0 and counts[-1] == 24
        assert all(chunk["usage"]["prompt_tokens"] == 5 for chunk in chunks)
        assert [not chunk["choices"] for chunk in chunks] == [False] * (len(chunks) - 1) + [include]


def test_every_form_of_a_prompt_in_a_list(server: RunningServer) -> None:
    texts = ["Hello", "Hullo"]
    by_text = server.complete(**GOOD | {"prompt": texts}, n=2, best_of=2)["choices"]
    by_ids = server.complete(**GOOD | {"prompt": [encode(t.encode()) for t in texts]}, n=2)["choices"]
    assert by_text == by_ids and [choice["index"] for choice in by_text] == [0, 1, 2, 3]
    assert by_text[0]["text"] == server.complete(**GOOD)["choices"][0]["text"]


def test_integers_may_be_written_as_floats(server: RunningServer) -> None:
    body = json.dumps(GOOD | {"prompt": encode(b"Hello")}).replace("24", "2.4e1").replace("76", "76.0")
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"}).json()
    assert "76.0" in body and answer["choices"] == server.complete(**GOOD)["choices"]


def test_salt_priority_and_user_change_no_byte(server: RunningServer) -> None:
    answer = server.complete(**GOOD, cache_salt="s", priority=0, user="somebody")
    assert answer["choices"] == server.complete(**GOOD)["choices"]


def test_ignored_fields_are_told(server: RunningServer) -> None:
    body = {**GOOD, "max_token": 3, "skip_special_tokens": True, "a\r\nb,é": 1, " ": 2, "": 3, "x": None}
    for stream in (False, True):
        response = server.http.post("/v1/completions", json={**body, "stream": stream})
        assert response.status_code == 200
        assert response.headers["x-ignored-fields"] == "max_token, skip_special_tokens, a??b?\\xe9, ?, ?"
    assert "x-ignored-fields" not in server.http.post("/v1/completions", json=GOOD).headers
    many = {**GOOD, **{f"{i}{'x' * 100}": i for i in range(1000)}}
    assert len(server.http.post("/v1/completions", json=many).headers["x-ignored-fields"]) < 2000


def test_an_error_in_mid_stream_is_an_event_and_done_follows() -> None:
    with fake(error_for="-1", pause=0.001) as server:
        events = server.events(prompt=["good", "bad"], max_tokens=500)
        assert events[-1] == "[DONE]"
        assert events[-2] == {
            "error": {"message": "no luck", "type": "server_error", "param": None, "code": "pass_failed"}
        }
        assert all("choices" in event for event in events[:-2])
        response = server.http.post("/v1/completions", json={"prompt": ["good", "bad"], "max_tokens": 500})
        assert_error(response, 500)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="no luck"):
            list(client.completions.create(model="fake", prompt=["good", "bad"], max_tokens=500, stream=True))
        # The good one was aborted with the bad.
        server.assert_all_free()
        assert server.metric('fastblt_request_success_total{finished_reason="error"}') == 3
        assert server.metric('fastblt_request_success_total{finished_reason="abort"}') == 3


def test_logprobs_are_clamped_on_the_wire() -> None:
    with fake() as server:
        [choice] = server.complete(prompt="x", max_tokens=2, logprobs=1)["choices"]
        assert choice["logprobs"]["token_logprobs"] == [-9999.0] * 2
        assert choice["logprobs"]["top_logprobs"] == [{"a": -9999.0}] * 2


def test_a_full_queue_says_when_to_come_back() -> None:
    with fake(max_waiting=2, pause=0.01) as server:
        response = server.http.post("/v1/completions", json={"prompt": ["a"] * 3, "max_tokens": 100})
        assert assert_error(response, 429)["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        assert server.metric('fastblt_requests_rejected_total{cause="queue_full"}') == 1
        assert server.complete(prompt=["a"] * 2, max_tokens=2)["usage"]["completion_tokens"] == 4


def test_prompt_bytes_are_what_was_sent(server: RunningServer) -> None:
    text = "naïve \u0000 👋🏽\r\n"
    answer = server.complete(**GOOD | {"prompt": text}, echo=True)
    assert answer["choices"][0]["text"].startswith(text)
    assert answer["usage"]["prompt_tokens"] == len(text.encode())
    assert decode(encode(text.encode())).decode() == text
