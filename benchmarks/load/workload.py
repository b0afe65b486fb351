"""The requests of a load: prompts from files, from HumanEval, from held-out code, or synthetic with shared prefixes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastblt.benchmarks.load.arrivals import Trace
from fastblt.benchmarks.load.names import Dataset
from fastblt.benchmarks.prompts import held_out_sources, humaneval_texts

_WORDS = (
    *("self", "return", "value", "index", "name", "data", "result", "error", "state"),
    *("parse", "read", "write", "items", "count", "path", "token"),
)


@dataclass(frozen=True)
class Job:
    """One request: its prompt, `max_tokens`, other fields of its body, and the label of its group in the results."""

    prompt: str
    max_tokens: int
    extra: dict[str, Any]
    label: str = ""

    @property
    def prompt_bytes(self) -> int:
        return len(self.prompt.encode())


class Texts:
    """Cuts prompts of any length out of a text, at random places."""

    def __init__(self, text: str, seed: int) -> None:
        if not text.isascii():
            # With ASCII only, a cut cannot split a character, and lengths in characters are lengths in bytes.
            text = text.encode("ascii", "ignore").decode()
        if not text:
            raise ValueError("the text to cut prompts from is empty")
        self._text = text
        self._rng = random.Random(seed)

    def cut(self, length: int) -> str:
        """`length` bytes from the start of a random line. At the end of the text it continues from the beginning."""
        at = self._rng.randrange(len(self._text))
        at = self._text.rfind("\n", 0, at) + 1
        piece = self._text[at : at + length]
        while len(piece) < length:
            piece += self._text[: length - len(piece)]
        return piece


def held_out_text() -> str:
    """All held-out files, one after another."""
    return b"\n".join(source.data for source in held_out_sources()).decode("utf-8", "ignore")


def prompts(
    dataset: Dataset,
    count: int,
    input_len: int | None,
    seed: int,
    *,
    path: Path | None = None,
    prefix_len: int = 0,
    prefixes: int = 1,
) -> list[tuple[str, int | None]]:
    """`count` prompts, each with the `max_tokens` that its file gives, if any.

    `input_len` is in bytes. HumanEval's prompts and those of a JSON-lines file are cut to their last `input_len`; all
    others have exactly that length (default 256). A synthetic prompt begins with one of `prefixes` texts of
    `prefix_len` bytes. Raises ValueError if a file has no prompts.
    """
    length = input_len or 256
    if dataset is Dataset.HUMANEVAL:
        return [(_tail(text, input_len), None) for text in _cycled(humaneval_texts(), count)]
    if dataset is Dataset.SYNTHETIC:
        return list(_synthetic(count, length, seed, prefix_len, prefixes))
    if dataset is Dataset.FILE:
        if path is None:
            raise ValueError("prompts from a file need --dataset-path")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [(_tail(prompt, input_len), tokens) for prompt, tokens in _cycled(_lines(path, text), count)]
    else:
        text = held_out_text()
    texts = Texts(text, seed)
    return [(texts.cut(length), None) for _ in range(count)]


def jobs(
    asked: Sequence[tuple[str, int | None]],
    output_len: int,
    bodies: Sequence[dict[str, Any]],
    common: dict[str, Any],
    seed: int,
) -> list[Job]:
    """Requests for prompts. The fields of `common` are in all; `bodies` are distributed evenly, in random order."""
    order = [bodies[index % len(bodies)] for index in range(len(asked))]
    random.Random(seed).shuffle(order)
    return [
        Job(prompt, tokens or output_len, common | body, label_of(body))
        for (prompt, tokens), body in zip(asked, order, strict=True)
    ]


def trace_jobs(trace: Trace, bodies: Sequence[dict[str, Any]], common: dict[str, Any], seed: int) -> list[Job]:
    """Requests with the sizes of a trace, and prompts of held-out text."""
    texts = Texts(held_out_text(), seed)
    asked = [(texts.cut(int(size)), int(out)) for size, out in zip(trace.prompt_bytes, trace.output_bytes, strict=True)]
    return jobs(asked, 1, bodies, common, seed)


def label_of(body: dict[str, Any]) -> str:
    """A short name for a request's decoding fields, such as `blt-s draft_length=8`."""
    decoding = dict(body.get("decoding") or {})
    method = str(decoding.pop("method", ""))
    return " ".join([method, *(f"{key}={value}" for key, value in decoding.items())]).strip()


def parse_decoding(text: str) -> dict[str, Any]:
    """The body for a method's name (`blt-s`) or a JSON object of decoding fields (`{"method": "blt-s", ...}`).

    Raises ValueError for invalid JSON.
    """
    if not text.lstrip().startswith("{"):
        return {"decoding": {"method": text}}
    try:
        return {"decoding": json.loads(text)}
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is neither a method nor a JSON object: {error}") from error


def _synthetic(count: int, length: int, seed: int, prefix_len: int, prefixes: int) -> Iterator[tuple[str, None]]:
    if prefix_len >= length:
        raise ValueError(f"a shared prefix of {prefix_len} bytes leaves nothing of prompts of {length} bytes")
    rng = random.Random(seed)

    def words(size: int) -> str:
        text = ""
        while len(text) < size:
            text += rng.choice(_WORDS) + rng.choice((" ", " ", "\n", "(", ")"))
        return text[:size]

    shared = [words(prefix_len) for _ in range(prefixes)]
    for index in range(count):
        yield shared[index % prefixes] + words(length - prefix_len), None


def _lines(path: Path, text: str) -> list[tuple[str, int | None]]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append((str(row["prompt"]), row.get("max_tokens")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number} is no object with a "prompt": {error!r}') from error
    if not found:
        raise ValueError(f"{path} has no prompts")
    return found


def _cycled(items: Sequence[Any], count: int) -> list[Any]:
    return [items[index % len(items)] for index in range(count)]


def _tail(text: str, length: int | None) -> str:
    return text if length is None else text.encode()[-length:].decode("utf-8", "ignore")
