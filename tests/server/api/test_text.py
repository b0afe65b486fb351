"""Bytes to text, logprobs and events, without a server."""

from __future__ import annotations

import codecs
import json
from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastblt.models.vocabulary import EOS_ID, decode, encode
from fastblt.server.api.names import token_name
from fastblt.server.api.streaming import MIN_LOGPROB, ChoiceText, TextDecoder, event
from fastblt.server.request import ByteLogprobs

# Random bytes seldom come near a character of four bytes, whole or broken.
surrogates = st.characters(categories=["Cs"])
pieces = st.one_of(
    st.binary(max_size=5),
    st.text(max_size=3).map(str.encode),
    surrogates.map(lambda s: s.encode("utf-8", "surrogatepass")),
    st.text(max_size=1).map(lambda s: s.encode()[:-1]),
)
raw_bytes = st.lists(pieces, max_size=12).map(b"".join)


# A busy machine is no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(ends)]


@unhurried
@given(raw_bytes, st.lists(st.integers(0, 10**6), max_size=20))
def test_pieces_join_to_the_whole_text_and_split_no_character(data: bytes, cuts: list[int]) -> None:
    decoder, text, fed = TextDecoder(), "", b""
    for part in split(data, cuts):
        text += decoder.feed(part)
        fed += part
        held = len(decoder._decoder.getstate()[0])
        assert held <= 3
        # All that could be known by now is out, and nothing that a later byte could change.
        assert text == fed[: len(fed) - held].decode("utf-8", "replace")
        assert bool(held) == decoder.pending == _could_continue(fed[len(fed) - held :])
    text += decoder.feed(b"", final=True)
    assert text == data.decode("utf-8", "replace")
    assert decoder.completed == len(text)


def _could_continue(tail: bytes) -> bool:
    """Whether some bytes after `tail` would make it one character."""
    for ending in (bytes([c] * n) for c in (0x80, 0x90, 0xA0, 0xBF) for n in (1, 2, 3)):
        try:
            if len((tail + ending).decode()) == 1:
                return bool(tail)
        except UnicodeDecodeError:
            continue
    return False


def test_a_hopeless_byte_comes_out_at_once() -> None:
    decoder = TextDecoder()
    assert decoder.feed(b"\xff") == "\ufffd"
    assert decoder.feed(b"\xe2\x82") == ""
    assert decoder.feed(b"A") == "\ufffdA"
    assert decoder.feed(b"\xed") == ""
    assert decoder.feed(b"\xa0") == "\ufffd\ufffd"  # A surrogate: no text.


@unhurried
@given(raw_bytes, st.lists(st.integers(0, 10**6), max_size=20), raw_bytes)
def test_choice_text_with_echo_and_logprobs(data: bytes, cuts: list[int], prompt: bytes) -> None:
    choice = ChoiceText(logprobs=0)
    echoed = [1, *encode(prompt)]
    values: list[ByteLogprobs | None] = [None] * len(echoed)
    text, tokens, offsets = choice.feed(echoed, values, final=False), [], []
    for part in [*split(data, cuts), b""]:
        ids = encode(part)
        values = [ByteLogprobs(-1.0) for _ in ids]
        new = choice.feed(ids, values, final=not part)
        text += new
        if new:
            taken = choice.take_logprobs()
            assert taken is not None
            tokens += taken["tokens"]
            offsets += taken["text_offset"]
    assert text == (prompt + data).decode("utf-8", "replace")
    taken = choice.take_logprobs()
    assert taken is not None
    tokens += taken["tokens"]
    assert tokens == [token_name(i) for i in echoed + encode(data)]


@unhurried
@given(st.text(max_size=12))
def test_offsets_count_characters(text: str) -> None:
    choice = ChoiceText(logprobs=1)
    ids = encode(text.encode("utf-8", "replace"))
    choice.feed(ids, [ByteLogprobs(-1.0) for _ in ids], final=True)
    taken = choice.take_logprobs()
    assert taken is not None
    expected = [at for at, char in enumerate(text) for _ in char.encode("utf-8", "replace")]
    assert taken["text_offset"] == expected


def test_offsets_of_broken_text_point_at_the_byte_s_own_character() -> None:
    choice = ChoiceText(logprobs=1)
    ids = [*encode(b"\xffa\xe2\x82b\xc3"), EOS_ID]
    assert choice.feed(ids, [ByteLogprobs(-1.0) for _ in ids], final=True) == "\ufffda\ufffdb\ufffd"
    taken = choice.take_logprobs()
    assert taken is not None
    assert taken["text_offset"] == [0, 1, 2, 2, 3, 4, 4]
    assert taken["tokens"][-1] == "<eos>"


def test_token_names_are_distinct_and_undoable() -> None:
    names = [token_name(i) for i in range(260)]
    assert len(set(names)) == 260
    assert token_name(65 + 4) == "A" and token_name(0xE2 + 4) == "bytes:\\xe2"
    for token in range(4, 260):
        name = token_name(token)
        if name.startswith("bytes:"):
            assert codecs.decode(name.removeprefix("bytes:"), "unicode_escape").encode("latin-1") == decode([token])
        else:
            assert name.encode() == decode([token])


def test_logprobs_always_hold_the_chosen_byte_and_stay_finite() -> None:
    choice = ChoiceText(logprobs=2)
    choice.feed([69], [ByteLogprobs.of(float("-inf"), [(70, -0.25), (71, float("-inf"))])], final=True)
    taken = choice.take_logprobs()
    assert taken is not None
    assert taken["token_logprobs"] == [MIN_LOGPROB]
    assert taken["top_logprobs"] == [{"A": MIN_LOGPROB, "B": -0.25, "C": MIN_LOGPROB}]


def test_an_event_is_one_line_of_utf8_json() -> None:
    data = {"text": 'é"\n\r\u2028'}
    raw = event(data)
    assert raw.startswith(b"data: ") and raw.endswith(b"\n\n") and raw.count(b"\n") == 2 and b"\r" not in raw
    assert "é".encode() in raw
    assert json.loads(raw[6:]) == data
