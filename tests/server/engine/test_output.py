"""Stops are cut exactly and nothing leaves that could still be part of one (contract 4)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastblt.models.vocabulary import EOS_ID, decode, encode
from fastblt.server.engine.output import Output
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


@given(texts, stops)
def test_no_more_is_held_back_than_could_match(text: bytes, stop: list[bytes]) -> None:
    output = Output(SamplingParams(max_tokens=100, stop=tuple(stop)))
    released = b""
    for at, token in enumerate(encode(text), 1):
        if output.append(token, None):
            return
        released += decode(output.release()[0])
        held = text[len(released) : at]
        assert held == b"" or any(s.startswith(held) for s in stop)


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
