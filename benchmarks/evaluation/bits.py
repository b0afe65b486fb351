"""Bits per byte of any file, by the causal head. It is the same for every decoding method."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

from fastblt.benchmarks.evaluation.completions import bar
from fastblt.benchmarks.evaluation.endpoint import Endpoint, Target, together
from fastblt.benchmarks.evaluation.journal import Journal, Record

_BOS, _BYTE = 1, 4


def windows(data: bytes, length: int, stride: int) -> Iterator[tuple[bytes, int]]:
    """Pieces of at most `length` bytes, each with the number of its last bytes that were in no earlier piece.

    Pieces start `stride` bytes apart. With `stride` = `length` they do not overlap. With less, each new byte of a later
    piece has a context of at least `length - stride` bytes. Raises ValueError unless 1 <= stride <= length.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"a stride of {stride} does not fit windows of {length} bytes; it must be between 1 and that")
    start, done = 0, 0
    while done < len(data):
        end = min(len(data), start + length)
        yield data[start:end], end - done
        start, done = start + stride, end


async def score_all(endpoint: Endpoint, journal: Journal, pieces: list[tuple[str, bytes, int]]) -> None:
    """Add the log-likelihood (nats) of each piece's new bytes to the journal, for the pieces that it does not have."""
    left = [piece for piece in pieces if piece[0] not in journal.records]
    with bar() as progress:
        task = progress.add_task("windows", total=len(pieces), completed=len(pieces) - len(left))

        async def one(name: str, data: bytes, new: int) -> None:
            scores = await endpoint.score([_BOS, *(byte + _BYTE for byte in data)])
            journal.add(name, {"bytes": new, "loglikelihood": math.fsum(scores[len(scores) - new :])})
            progress.advance(task)

        await together(one(*piece) for piece in left)


def total(journal: Journal, names: list[str]) -> Record:
    """Bytes, bits and bits per byte of the named pieces."""
    records = [journal.records[name] for name in names]
    count = sum(record["bytes"] for record in records)
    bits = -math.fsum(record["loglikelihood"] for record in records) / math.log(2)
    return {"bytes": count, "bits": bits, "bits_per_byte": bits / count if count else None}


async def evaluate(target: Target, texts: dict[str, bytes], length: int, stride: int | None, output: Path) -> Record:
    """Bits per byte of each text and of all together.

    Raises ValueError if the windows do not fit the model, EndpointError, JournalError.
    """
    stride = stride or length
    async with target.open() as endpoint:
        served = await endpoint.served()
        if length + 2 > served.max_model_len:
            raise ValueError(
                f"windows of {length} bytes do not fit {served.name}, which reads {served.max_model_len - 2} at most; "
                "say --length"
            )
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in texts.items()}
        run = {"task": "bits", "model": vars(served), "length": length, "stride": stride, "texts": digests}
        journal = Journal(output / "bits.jsonl", run)
        pieces = [
            (f"{name}/{number}", data, new)
            for name, text in texts.items()
            for number, (data, new) in enumerate(windows(text, length, stride))
        ]
        await score_all(endpoint, journal, pieces)
    by_text = {
        name: total(journal, [piece[0] for piece in pieces if piece[0].rpartition("/")[0] == name]) for name in texts
    }
    whole = total(journal, [piece[0] for piece in pieces])
    result = {"model": vars(served), "length": length, "stride": stride, "texts": by_text, "all": whole}
    print("| text | bytes | bits per byte |\n|---|---|---|")
    for name, row in {**(by_text if len(by_text) <= 20 else {}), "all": whole}.items():
        if row["bits_per_byte"] is not None:
            print(f"| {name} | {row['bytes']} | {row['bits_per_byte']:.4f} |")
    return result
