"""The wire format, with a real engine behind a real server."""

from __future__ import annotations

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
from tests.server.api.running import MODEL, RunningServer, joined, parse_events, tiny_settings
from tests.server.api.test_bad_requests import assert_error

GOOD = {"prompt": "Hello", "max_tokens": 24, "seed": 1, "ignore_eos": True}
#: What it costs is the same each time too; `auto` may draft otherwise when it is asked again.
REPEATABLE = GOOD | {"decoding": {"method": "blt-s"}}
METHODS = ["blt", "blt-s", "blt-d", "blt-dv", "blt-dsv"]


def fake(**fields: Any) -> RunningServer:
    settings = tiny_settings("fake")
    return RunningServer(EngineClient(settings, command=fake_engine.command(**fields)))


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
        "method", "settings", "nfe", "rounds", "denoising_steps", "drafted", "accepted", "proposed", "passed",
        "wasted", "patches",
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


@pytest.mark.parametrize("logprobs", [None, 0])
def test_nothing_in_an_event_ends_its_line(server: RunningServer, logprobs: int | None) -> None:
    # httpx, requests and others take these for ends of lines.
    text = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei\u00e9\u2027"
    body = {"prompt": text, "echo": True, "max_tokens": 1, "stream": True, "logprobs": logprobs}
    shown = ""
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line and line != "data: [DONE]":
                shown += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert shown.startswith(text)
