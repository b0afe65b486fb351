"""Names of ids in answers."""

from __future__ import annotations

from fastblt.models.vocabulary import BYTE_OFFSET, VOCAB_SIZE

#: Names of the special ids 0 to 3, in order.
SPECIAL_NAMES = ("<boe>", "<bos>", "<eos>", "<bpe>")


def token_name(token: int) -> str:
    """The name of an id in logprobs.

    An ASCII byte is itself. Another byte is `bytes:\\xNN`, OpenAI's name for a part of a character: decoded alone, the
    bytes from 0x80 on would all become U+FFFD and collide as keys of `top_logprobs`. Specials are `<eos>` and the like.
    """
    if token < BYTE_OFFSET:
        return SPECIAL_NAMES[token]
    byte = token - BYTE_OFFSET
    return chr(byte) if byte < 0x80 else f"bytes:\\x{byte:02x}"


#: Names of all ids, in order: by default, and with `return_tokens_as_token_ids`.
TOKEN_NAMES = tuple(token_name(i) for i in range(VOCAB_SIZE))
NUMBER_NAMES = tuple(f"token_id:{i}" for i in range(VOCAB_SIZE))
