"""Completions without a server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import fastblt
from fastblt import LLM, DecodingParams, SamplingParams
from fastblt.models.vocabulary import decode, encode
from fastblt.server.llm import Prompt
from fastblt.server.request import DecodingMethod, FinishReason, InvalidRequestError
from tests.server.api.running import save_tiny

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = save_tiny(Path(tmp_path_factory.mktemp("tiny")))
    return LLM(folder, cache_bytes=2**25, max_model_len=2048, threads=1, max_waiting=4, deterministic=True)


def assert_idle(llm: LLM) -> None:
    assert not llm.engine.has_work()
    assert llm.engine.balanced()


def test_one_prompt(llm: LLM) -> None:
    [completion] = llm.generate("Hello", GREEDY)
    assert len(completion.ids) == 20 and completion.data == decode(completion.ids)
    assert completion.text == completion.data.decode("utf-8", "replace")
    assert completion.finish_reason is FinishReason.LENGTH and completion.logprobs is None
    assert completion.ledger.decoder >= 20
    assert_idle(llm)


def test_prompts_of_every_kind_in_order_and_beyond_the_queue(llm: LLM) -> None:
    texts = ["Hello", "Bye", "Hello there", "x", "y", "z", "Hello"]
    prompts: list[Prompt] = [texts[0], texts[1].encode(), encode(texts[2].encode()), *texts[3:]]
    completions = llm.generate(prompts, GREEDY)
    assert [c.ids for c in completions] == [llm.generate(text, GREEDY)[0].ids for text in texts]
    assert_idle(llm)


def test_a_list_of_ids_is_one_prompt(llm: LLM) -> None:
    # A ledger repeats only where the method is named: `auto` may draft otherwise the next time.
    params = replace(GREEDY, decoding=DecodingParams(DecodingMethod.BLT_S))
    assert llm.generate(encode(b"Hello"), params) == llm.generate("Hello", params)
    assert len(llm.generate([1], GREEDY)) == 1
    assert llm.generate([], GREEDY) == []


def test_parameters_per_prompt(llm: LLM) -> None:
    short = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2)
    drafted = SamplingParams(
        max_tokens=20, temperature=0.0, ignore_eos=True, decoding=DecodingParams(DecodingMethod.BLT_S)
    )
    one, two, three = llm.generate(["Hello"] * 3, [short, GREEDY, drafted])
    assert len(one.ids) == 3 and one.logprobs is not None and len(one.logprobs) == 3
    assert two.ids == three.ids and three.ledger.drafted > 0
    with pytest.raises(InvalidRequestError):
        llm.generate(["Hello"] * 3, [short])


def test_stop(llm: LLM) -> None:
    data = llm.generate("Hello", GREEDY)[0].data
    stop = data[5:7]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop=(stop,))
    [completion] = llm.generate("Hello", params)
    assert completion.data == data[: data.index(stop)] and completion.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("prompt", ["", b"", [[]], [[260]], [[5, 2]], [[True]], [5.0], "x" * 3000])
def test_a_prompt_that_cannot_be_served_aborts_the_others(llm: LLM, prompt: object) -> None:
    prompts = prompt if isinstance(prompt, list) else [prompt]
    with pytest.raises(InvalidRequestError):
        llm.generate(["Hello", *prompts], GREEDY)
    assert_idle(llm)


def test_stream(llm: LLM) -> None:
    deltas = list(llm.stream("Hello", GREEDY))
    assert [i for delta in deltas for i in delta.ids] == llm.generate("Hello", GREEDY)[0].ids
    assert deltas[-1].finish_reason is FinishReason.LENGTH


def test_a_stream_given_up_frees_everything(llm: LLM) -> None:
    stream = llm.stream("Hello", SamplingParams(max_tokens=1000, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert_idle(llm)


def test_lazy_names() -> None:
    names = {"LLM", "Completion", "DecodingParams", "SamplingParams", "StructuredOutput", "Utf8"}
    assert set(fastblt.__all__) == names | {"__version__"} and all(getattr(fastblt, name) for name in names)
    with pytest.raises(AttributeError):
        _ = fastblt.nothing
