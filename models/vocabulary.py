"""Token ids of the Byte Latent Transformer: four specials, then the 256 bytes, as in the published weights."""

from __future__ import annotations

from collections.abc import Iterable

BOE_ID = 0
BOS_ID = 1
EOS_ID = 2
BPE_ID = 3
BYTE_OFFSET = 4
VOCAB_SIZE = 260
# An extra input row of the decoder's embedding table; never an output.
MASK_ID = 260

#: Ids that no decoder ever produces (EOS has rules of its own).
NEVER_PRODUCED = (BOE_ID, BOS_ID, BPE_ID)


def encode(data: bytes) -> list[int]:
    """Ids of raw bytes, without BOS."""
    return [byte + BYTE_OFFSET for byte in data]


def decode(ids: Iterable[int]) -> bytes:
    """Raw bytes of ids; specials are dropped."""
    return bytes(i - BYTE_OFFSET for i in ids if i >= BYTE_OFFSET)


def with_bos(ids: list[int]) -> list[int]:
    """The ids the model reads for a prompt: BOS in front, unless it is already there."""
    return ids if ids and ids[0] == BOS_ID else [BOS_ID, *ids]
