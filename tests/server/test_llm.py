"""Completions without a server."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
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


# Several generations at once


def test_streams_that_overlap(llm: LLM) -> None:
    """Each gets its own bytes and no other's, however they are pulled."""
    alone = [llm.generate(prompt, GREEDY)[0].ids for prompt in ("Hello", "Bye", "x")]
    streams = [llm.stream(prompt, GREEDY) for prompt in ("Hello", "Bye", "x")]
    found: list[list[int]] = [[], [], []]
    for deltas in itertools.zip_longest(*streams):
        for ids, delta in zip(found, deltas, strict=True):
            ids += delta.ids if delta is not None else []
    assert found == alone
    assert_idle(llm)


def test_generate_within_a_stream(llm: LLM) -> None:
    alone = [llm.generate(prompt, GREEDY)[0].ids for prompt in ("Hello", "Bye")]
    found: list[int] = []
    for delta in llm.stream("Hello", GREEDY):
        found += delta.ids
        assert llm.generate("Bye", GREEDY)[0].ids == alone[1]
    assert found == alone[0]
    assert_idle(llm)


def test_a_stream_that_is_left(llm: LLM) -> None:
    stream = llm.stream("Hello", replace(GREEDY, max_tokens=1000))
    next(stream)
    other = llm.stream("Bye", GREEDY)
    next(other)
    del stream
    gc.collect()
    assert len(llm.generate("x", GREEDY)[0].ids) == 20
    other.close()
    assert_idle(llm)


def test_threads(llm: LLM) -> None:
    prompts = [f"Prompt {i}" for i in range(6)]
    alone = [llm.generate(prompt, GREEDY)[0].ids for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            # A queue that others fill may be full, as anywhere.
            found = list(pool.map(lambda prompt: llm.generate(prompt, GREEDY)[0].ids, prompts[:4]))
            assert found == alone[:4]
    assert_idle(llm)


@pytest.mark.timeout(60)
def test_an_interrupt_ends_a_generation_and_nothing_else(llm: LLM) -> None:
    alone = llm.generate("Hello", GREEDY)[0].ids
    for delay in (0.0, 0.003, 0.02, 0.1):
        timer = threading.Timer(delay, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            # A fast machine may end one before it is interrupted.
            while True:
                llm.generate("Hello", replace(GREEDY, max_tokens=2000))
        timer.join()
        assert llm.generate("Hello", GREEDY)[0].ids == alone
    assert_idle(llm)


@pytest.mark.timeout(60)
def test_a_forked_child_is_told(llm: LLM) -> None:
    """Within a generation, too: the child holds a copy of its iterator."""
    stream = llm.stream("Hello", GREEDY)
    next(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            told = 0
            for use in (lambda: llm.generate("Hello", GREEDY), lambda: list(stream)):
                try:
                    use()
                except RuntimeError as error:
                    told += "fork" in str(error)
            os._exit(told)
        except BaseException:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert sum(len(delta.ids) for delta in stream) > 0
    assert_idle(llm)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("prompt", ["x" * 10**8, b"x" * 10**8, [70] * 10**7])
def test_prompts_beyond_all_bounds_are_refused_at_once(llm: LLM, prompt: Prompt) -> None:
    with pytest.raises(InvalidRequestError, match="more than the"):
        llm.generate(prompt, GREEDY)


def test_streamed_text_is_whole_characters(llm: LLM) -> None:
    params = replace(GREEDY, max_tokens=60, temperature=1.5, seed=3)
    deltas = list(llm.stream("naïve", params))
    [completion] = llm.generate("naïve", params)
    assert "".join(delta.text for delta in deltas) == completion.text
    assert b"".join(delta.data for delta in deltas) == completion.data
    assert deltas[-1].finish_reason is FinishReason.LENGTH and deltas[-1].ledger is not None


def test_a_method_may_be_named_alone_and_bias_keyed_by_strings(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, decoding="blt-s", logit_bias={"104": 100})  # type: ignore[arg-type, dict-item]
    [completion] = llm.generate("x", replace(params, temperature=0.0))
    assert completion.decoding is not None and completion.decoding.method is DecodingMethod.BLT_S
    assert completion.text == "ddddd"
    with pytest.raises(InvalidRequestError, match="magic"):
        SamplingParams(decoding="magic")  # type: ignore[arg-type]


def test_rounds_come_with_a_completion(llm: LLM) -> None:
    [completion] = llm.generate("x", replace(GREEDY, return_rounds=True, decoding=DecodingParams("blt-dv")))
    assert completion.rounds and [i for one in completion.rounds for i in one.ids] == completion.ids
    assert llm.generate("x", GREEDY)[0].rounds is None
