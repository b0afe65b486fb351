"""Stops are cut exactly and nothing leaves that could still be part of one (contract 4)."""

from __future__ import annotations

import random
import time
import weakref

from hypothesis import given
from hypothesis import strategies as st

from fastblt.models.vocabulary import EOS_ID, decode, encode
from fastblt.server.engine.output import Output
from fastblt.server.engine.stop_strings import StopStrings, stop_strings
from fastblt.server.request import FinishReason, SamplingParams

letters = st.sampled_from([b"a", b"b", b"c"])
texts = st.lists(letters, max_size=30).map(b"".join)
stops = st.lists(st.lists(letters, min_size=1, max_size=4).map(b"".join), min_size=1, max_size=4)


def cut(text: bytes, stop: list[bytes], least: int, keep: bool) -> tuple[bytes, bytes | None]:
    """The output by definition: at the first end of a stop string, the longest that ends there."""
    for end in range(max(least, 1), len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return (text[:end] if keep else text[: end - len(longest)]), longest
    return text, None


@given(texts, stops, st.integers(0, 6), st.booleans())
def test_stop_strings_by_definition(text: bytes, stop: list[bytes], least: int, keep: bool) -> None:
    params = SamplingParams(max_tokens=100, min_tokens=least, stop=tuple(stop), include_stop_str_in_output=keep)
    output = Output(params)
    released = b""
    for token in encode(text):
        ended = output.append(token, None)
        released += decode(output.release()[0])
        expected_so_far, _ = cut(text, stop, least, keep)
        assert expected_so_far.startswith(released), "something left that the stop cuts off"
        if ended:
            break
    expected, found = cut(text, stop, least, keep)
    if found is None:
        output.append(EOS_ID, None)
        released += decode(output.release()[0])
        assert output.stop_reason is None
    else:
        assert output.stop_reason == found.decode()
    assert output.finish_reason == FinishReason.STOP
    assert decode(output.ids) == expected == released


@given(texts, stops, st.integers(0, 6))
def test_held_back_is_the_longest_end_that_begins_a_stop_string(text: bytes, stop: list[bytes], least: int) -> None:
    output = Output(SamplingParams(max_tokens=100, min_tokens=least, stop=tuple(stop)))
    released = b""
    for at, token in enumerate(encode(text), 1):
        if output.append(token, None):
            return
        released += decode(output.release()[0])
        beginnings = {s[:size] for s in stop for size in range(len(s))}
        held = next(text[start:at] for start in range(at + 1) if text[start:at] in beginnings)
        # What has left stays gone, though it is the beginning of another.
        assert text[len(released) : at] == held


def test_the_longest_stop_strings_cost_microseconds_a_byte() -> None:
    """However well they fit the text: here every byte goes on with all of them, or with a thousand places of one."""
    text = random.Random(0).randbytes(2000)
    lists = [
        (b"a" * 2000, [b"a" * 1023 + bytes((i,)) for i in range(64)]),
        (text, [text[i : i + 1023] + b"\0" for i in range(64)]),
        (b"ab" * 1000, [b"ab" * (480 + i) + b"b" for i in range(32)] + [b"ba" * (480 + i) + b"a" for i in range(32)]),
    ]
    for text, stop in lists:
        output = Output(SamplingParams(max_tokens=10_000, stop=tuple(stop)))
        begin = time.process_time()
        for token in encode(text):
            output.append(token, None)
            output.release()
        # Measured: 5 to 10.
        assert (time.process_time() - begin) / len(text) < 100e-6


def test_requests_with_the_same_stop_strings_share_them() -> None:
    first, second = (StopStrings((b"ab", b"c")), StopStrings((b"ab", b"c")))
    assert first.step(0, 97) == second.step(0, 97)
    one, other = stop_strings((b"ab", b"c")), stop_strings((b"ab", b"c"))
    assert one is other is not None
    gone = weakref.ref(one)
    del one, other
    assert gone() is None and stop_strings(()) is None


def test_length_eos_and_stop_ids() -> None:
    output = Output(SamplingParams(max_tokens=2))
    assert not output.append(10, None) and output.append(11, None)
    assert output.finish_reason == FinishReason.LENGTH and output.release()[0] == [10, 11]
    output = Output(SamplingParams(max_tokens=9, stop_token_ids=(14,), min_tokens=1))
    assert not output.append(14, None), "not before min_tokens"
    assert output.append(14, None)
    assert output.stop_reason == 14 and output.ids == [14]
    output = Output(SamplingParams(max_tokens=9, ignore_eos=True))
    assert not output.append(EOS_ID, None)
