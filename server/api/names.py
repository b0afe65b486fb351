"""How the wire names ids."""

from __future__ import annotations

from fastblt.models.vocabulary import BYTE_OFFSET, VOCAB_SIZE

#: By id.
SPECIAL_NAMES = ("<boe>", "<bos>", "<eos>", "<bpe>")


def token_name(token: int) -> str:
    """How logprobs name an id: ASCII as it is, other bytes as OpenAI names parts of characters, `<eos>` and the like.

    Decoded alone, the bytes from 0x80 on would all become U+FFFD and collide as keys of `top_logprobs`.
    """
    if token < BYTE_OFFSET:
        return SPECIAL_NAMES[token]
    byte = token - BYTE_OFFSET
    return chr(byte) if byte < 0x80 else f"bytes:\\x{byte:02x}"


#: By id: as they are named by default, and under `return_tokens_as_token_ids`.
TOKEN_NAMES = tuple(token_name(i) for i in range(VOCAB_SIZE))
NUMBER_NAMES = tuple(f"token_id:{i}" for i in range(VOCAB_SIZE))
