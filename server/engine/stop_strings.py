"""Finds where stop strings end in a text that comes byte by byte, at a bounded cost a byte.

This is Shift-And (Baeza-Yates and Gonnet, 1992) over all strings at once: for every beginning of every string a bit
says whether the text ends with it. A byte shifts the bits, each beginning to the one that is a byte longer, and a mask
keeps those that have the byte there. Whatever strings and text are, that is three operations on one long integer: for
64 strings of 1,024 bytes 8 KiB of bits, which take some microseconds. An automaton with failure links (Aho and
Corasick) costs as little on average, but has to be built first, and one byte may follow a thousand of its links.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from weakref import WeakValueDictionary

import numpy as np


class StopStrings:
    """Strings to look for, each of at least one byte, as bits.

    Bit `depth * count + i` stands for the first `depth + 1` bytes of string i, so the highest bit of a state is the
    longest beginning. Masks are made when their byte first comes.
    """

    def __init__(self, strings: Sequence[bytes]) -> None:
        self._strings = strings = tuple(dict.fromkeys(strings))
        self._count = count = len(strings)
        self._masks: list[int | None] = [None] * 256
        self._longest = longest = max(map(len, strings))
        #: The strings' first bytes, their last ones, and all but these.
        self._first = (1 << count) - 1
        self._last = 0
        for i, string in enumerate(strings):
            self._last |= 1 << ((len(string) - 1) * count + i)
        self._inner = (1 << longest * count) - 1 & ~self._last

    def step(self, state: int, byte: int) -> int:
        """The state behind one more byte; 0 is the state of an empty text."""
        mask = self._masks[byte]
        if mask is None:
            mask = self._masks[byte] = self._mask(byte)
        return (state << self._count | self._first) & mask

    def ended(self, state: int) -> bytes | None:
        """The longest string that ends here."""
        ends = state & self._last
        return self._strings[(ends.bit_length() - 1) % self._count] if ends else None

    def begun(self, state: int) -> int:
        """How many bytes at the end of the text may become a string: the longest beginning, short of a whole one."""
        begun = state & self._inner
        return (begun.bit_length() - 1) // self._count + 1 if begun else 0

    @cached_property
    def _bytes(self) -> np.ndarray:
        """int16 [longest, count]: the strings as columns, with what no byte is behind their ends."""
        columns = np.full((self._longest, self._count), -1, dtype=np.int16)
        for i, string in enumerate(self._strings):
            columns[: len(string), i] = np.frombuffer(string, dtype=np.uint8)
        return columns

    def _mask(self, byte: int) -> int:
        return int.from_bytes(np.packbits(self._bytes == byte, bitorder="little").tobytes(), "little")


#: Those in use: the choices of one prompt, and requests with the same strings, share their masks.
_shared: WeakValueDictionary[tuple[bytes, ...], StopStrings] = WeakValueDictionary()


def stop_strings(strings: tuple[bytes, ...]) -> StopStrings | None:
    """Of a request; None where it has none."""
    if not strings:
        return None
    found = _shared.get(strings)
    if found is None:
        found = _shared[strings] = StopStrings(strings)
    return found
