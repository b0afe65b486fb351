"""Prompts of text that the shipped checkpoint was not trained on: the held-out files of its corpus."""

from __future__ import annotations

import random
from functools import lru_cache

from fastblt.models.training.corpus import Source, collect, standard_library
from fastblt.models.vocabulary import encode, with_bos

#: Bytes that begin no statement on the left margin.
_NO_STATEMENT = b" \t\n#)]}\"'"


def held_out_prompts(count: int, prompt_length: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of BOS and `prompt_length` bytes each, from as many files as there are.

    No two overlap or are the same, and every machine with the same Python release gets the same ones. Raises ValueError
    where the files have too little text.
    """
    rng = random.Random(seed)
    files = [(source.data, _starts(source.data, prompt_length, rng)) for source in held_out_sources()]
    rng.shuffle(files)
    # Files repeat themselves: a text is taken once.
    texts: dict[bytes, None] = {}
    depth = 0
    while len(texts) < count:
        found = [data[starts[depth] :][:prompt_length] for data, starts in files if depth < len(starts)]
        if not found:
            raise ValueError(f"the held-out files have text for {len(texts)} prompts of {prompt_length} bytes only")
        texts.update(dict.fromkeys(found))
        depth += 1
    return [with_bos(encode(text)) for text in texts][:count]


@lru_cache(maxsize=1)
def held_out_sources() -> tuple[Source, ...]:
    """The held-out files. Raises CorpusError where the interpreter's library cannot serve as a corpus."""
    return tuple(source for source in collect(standard_library()) if source.held_out)


def _starts(data: bytes, length: int, rng: random.Random) -> list[int]:
    """Where prompts begin, none within another's bytes: statements on the left margin first, then other lines."""
    lines = [0] + [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    lines = [at for at in lines if at + length <= len(data)]
    rng.shuffle(lines)
    taken: list[int] = []
    for at in sorted(lines, key=lambda at: data[at] in _NO_STATEMENT):
        if all(abs(at - other) >= length for other in taken):
            taken.append(at)
    return taken
