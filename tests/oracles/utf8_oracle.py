"""What may stand in strict UTF-8, asked of Python's own decoder by trying."""

from __future__ import annotations

import codecs
from functools import cache

from fastblt.models.vocabulary import BYTE_OFFSET, EOS_ID, MASK_ID

#: A byte of each kind that any UTF-8 rule tells apart.
KINDS = bytes((0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC2, 0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xFF))


@cache
def completable(data: bytes, room: int) -> bool:
    """Whether `data` and at most `room` more bytes can be whole characters."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return room > 0 and any(completable(data + bytes((byte,)), room - 1) for byte in KINDS)
    return True


def fillable(data: bytes, ids: tuple[int, ...], left: int) -> bool:
    """Whether bytes can stand at the open places of `ids`, which follow `data`, so that what is seen is UTF-8: the
    first `left` ids up to EOS, and what can still come behind them."""
    if not left or not ids:
        return completable(data, left)
    if ids[0] == EOS_ID:
        return completable(data, 0)
    if ids[0] != MASK_ID:
        data += bytes((ids[0] - BYTE_OFFSET,))
        return completable(data, left - 1) and fillable(data, ids[1:], left - 1)
    return any(
        completable(data + bytes((byte,)), left - 1) and fillable(data + bytes((byte,)), ids[1:], left - 1)
        for byte in KINDS
    )
