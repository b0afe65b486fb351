"""`response_format`, `structured_outputs` and `utf8` over HTTP."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from fastblt.models.vocabulary import BYTE_OFFSET
from tests.server.api.running import MODEL, RunningServer
from tests.server.api.test_bad_requests import assert_error

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
ASK = {"prompt": "A person: ", "max_tokens": 200, "seed": 3, "temperature": 1.0}
VERIFIED = ["blt", "blt-s", "blt-dv"]


def openai_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}


def test_all_ways_to_ask_for_a_schema_give_the_same_valid_json(server: RunningServer) -> None:
    ways = [
        {"response_format": openai_format(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None, "json_object": False}},
    ]
    texts = set()
    for way in ways:
        for method in VERIFIED:
            [choice] = server.complete(**ASK, **way, decoding={"method": method})["choices"]
            assert choice["finish_reason"] == "stop"
            texts.add(choice["text"])
    [text] = texts
    jsonschema.validate(json.loads(text), SCHEMA)


def test_regex_choice_grammar_and_json_object(server: RunningServer) -> None:
    def text_of(**structured: Any) -> str:
        [choice] = server.complete(**ASK, structured_outputs=structured)["choices"]
        return choice["text"]

    assert text_of(regex="[a-f]{3}-[0-9]{2}")[3] == "-"
    assert text_of(choice=["left", "right", "höher"]) in ("left", "right", "höher")
    assert text_of(grammar='root ::= "(" [0-9] ")"').startswith("(")
    assert text_of(json_object=True, disable_any_whitespace=True).startswith("{")
    # The shortest object, where the model likes nothing better than its end.
    eager = {"temperature": 0.0, "logit_bias": {str(ord("}") + BYTE_OFFSET): 100}}
    [choice] = server.complete(**ASK | eager, response_format={"type": "json_object"})["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("{}", "stop")


def test_text_is_no_constraint(server: RunningServer) -> None:
    free = server.complete(**ASK)["choices"][0]["text"]
    for body in ({"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"response_format": None}):
        assert server.complete(**ASK, **body)["choices"][0]["text"] == free


def test_choices_and_streams_are_constrained_each_for_itself(server: RunningServer) -> None:
    body = {**ASK, "n": 3, "structured_outputs": {"regex": "[a-z]{8}"}}
    whole = [choice["text"] for choice in server.complete(**body)["choices"]]
    assert all(text.isalpha() and len(text) == 8 for text in whole) and len(set(whole)) == 3
    streamed = ["", "", ""]
    for event in server.events(**body)[:-1]:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == whole


def test_the_openai_client_asks_for_it(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer = client.completions.create(
        model=MODEL, **ASK, extra_body={"response_format": openai_format(SCHEMA), "utf8": "strict"}
    )
    jsonschema.validate(json.loads(answer.choices[0].text), SCHEMA)
    with pytest.raises(openai.BadRequestError, match="#/type must be one or some of array"):
        client.completions.create(model=MODEL, **ASK, extra_body={"response_format": openai_format({"type": "strin"})})


@pytest.mark.parametrize("method", ["blt", "blt-s", "blt-d", "blt-dv"])
def test_strict_text_has_no_replacement_character(server: RunningServer, method: str) -> None:
    for tokens in (1, 2, 3, 50):
        body = {**ASK, "max_tokens": tokens, "temperature": 2.0, "ignore_eos": True, "decoding": {"method": method}}
        [choice] = server.complete(**body, utf8="strict")["choices"]
        assert "\ufffd" not in choice["text"] and len(choice["text"].encode()) == tokens
    assert "\ufffd" in server.complete(**body, utf8="replace")["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"utf8": "loose"}, "utf8"),
        ({"utf8": "strict", "stop_token_ids": [0xC3 + BYTE_OFFSET]}, "stop_token_ids"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": openai_format({"type": "nothing"})}, "response_format"),
        ({"structured_outputs": [1]}, "structured_outputs"),
        ({"structured_outputs": {str(i): 1 for i in range(100)}}, "structured_outputs"),
        ({"structured_outputs": {"xml": "<a/>"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "x" * 70_000}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 0}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": False}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": False}}, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": "no"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "disable_any_whitespace": 0}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"type": "integer", "multipleOf": 999983}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "decoding": {"method": "blt-d"}}, "decoding.method"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_a_clear_400(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = server.http.post("/v1/completions", json=ASK | fields)
    assert response.status_code == 400
    assert_error(response, 400, param)


def test_nested_schemas_are_bounded(server: RunningServer) -> None:
    schema = '{"type": "array", "items": ' * 900 + '{"type": "null"}' + "}" * 900
    response = server.http.post("/v1/completions", json=ASK | {"structured_outputs": {"json": schema}})
    assert response.status_code == 400
