"""Finds where stop strings end in a text that arrives byte by byte, at a bounded cost for each byte.

This is Shift-And (Baeza-Yates and Gonnet, 1992) over all strings at once. For every prefix of every string, one bit
says whether the text ends with it. For each byte of text the bits are shifted, so that each prefix becomes the one that
is a byte longer, and a mask keeps the prefixes that end with this byte. That is three operations on one long integer,
for any strings and text: for 64 strings of 1,024 bytes it has 8 KiB, and a step takes some microseconds. The automaton
of Aho and Corasick costs as little on average, but must be built first, and one byte may follow a thousand of its
failure links.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from weakref import WeakValueDictionary

import numpy as np


class StopStrings:
    """The strings to look for, each of at least one byte. A state is an integer.

    Bit `depth * count + i` stands for the first `depth + 1` bytes of string i, so the highest bit of a state is the
    longest prefix. The mask of a byte is made when the byte first occurs.
    """

    def __init__(self, strings: Sequence[bytes]) -> None:
        self._strings = strings = tuple(dict.fromkeys(strings))
        self._count = count = len(strings)
        self._masks: list[int | None] = [None] * 256
        self._longest = longest = max(map(len, strings))
        #: The bits of prefixes of one byte, of whole strings, and of all prefixes that are not whole strings.
        self._first = (1 << count) - 1
        self._last = 0
        for i, string in enumerate(strings):
            self._last |= 1 << ((len(string) - 1) * count + i)
        self._inner = (1 << longest * count) - 1 & ~self._last

    def step(self, state: int, byte: int) -> int:
        """The state after one more byte. 0 is the state of an empty text."""
        mask = self._masks[byte]
        if mask is None:
            mask = self._masks[byte] = self._mask(byte)
        return (state << self._count | self._first) & mask

    def ended(self, state: int) -> bytes | None:
        """The longest string that the text ends with, or None."""
        ends = state & self._last
        return self._strings[(ends.bit_length() - 1) % self._count] if ends else None

    def begun(self, state: int) -> int:
        """How many bytes at the end of the text may become a stop string: the length of the longest proper prefix."""
        begun = state & self._inner
        return (begun.bit_length() - 1) // self._count + 1 if begun else 0

    @cached_property
    def _bytes(self) -> np.ndarray:
        """int16 [longest, count]: the strings as columns, padded with -1."""
        columns = np.full((self._longest, self._count), -1, dtype=np.int16)
        for i, string in enumerate(self._strings):
            columns[: len(string), i] = np.frombuffer(string, dtype=np.uint8)
        return columns

    def _mask(self, byte: int) -> int:
        return int.from_bytes(np.packbits(self._bytes == byte, bitorder="little").tobytes(), "little")


#: The objects in use. Choices of one prompt, and other requests with the same strings, share one and so its masks.
_shared: WeakValueDictionary[tuple[bytes, ...], StopStrings] = WeakValueDictionary()


def stop_strings(strings: tuple[bytes, ...]) -> StopStrings | None:
    """The (shared) StopStrings of a request; None if it has no stop strings."""
    if not strings:
        return None
    found = _shared.get(strings)
    if found is None:
        found = _shared[strings] = StopStrings(strings)
    return found
