"""Text to train on: files, folders, globs and JSON lines, also compressed, copied once into two mapped files.

The copy has the bytes of all documents, one after another, with a byte of its own after each document that stands for
EOS. It is made in pieces of at most PIECE bytes, so that text of any size passes through little memory. The hash of a
piece's content decides whether it is held out: the same text is never on both sides.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastblt.models.training.files import write_json
from fastblt.models.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID

PIECE = 1 << 14
RECORD = "text.json"
_PARTS = ("train", "held_out")


class TextError(ValueError):
    """Text that cannot be read. The message names the file and says what to do."""


def find(names: Sequence[str]) -> list[Path]:
    """The files that paths and globs name; of a folder all files in it, but not those that begin with a dot.

    Raises TextError for a name without a file.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = (one for one in path.rglob("*") if one.is_file())
            files = [one for one in inside if not any(part.startswith(".") for part in one.relative_to(path).parts)]
        elif path.is_file():
            files = [path]
        else:
            files = [Path(one) for one in glob.glob(str(path), recursive=True) if Path(one).is_file()]
        if not files:
            raise TextError(f"--text {name}: no such file, and no folder or glob with files")
        found.update(dict.fromkeys(sorted(files)))
    return list(found)


def pieces(path: Path, field: str) -> Iterator[tuple[bytes, bool]]:
    """A file's text in pieces of at most PIECE bytes, and whether a document ends with each.

    In files named .jsonl (before .gz or .zst) every line is an object with a document in its `field`; any
    other file is one document. Pieces end at line ends where there is one.
    """
    try:
        with _open(path) as file:
            if Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        document = _document(line, field, f"{path}, line {number}")
                        yield from _cut([document])
            else:
                yield from _cut(iter(lambda: file.read(PIECE), b""))
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(f"{path}: cannot be read ({error})") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            zstandard: Any = importlib.import_module("zstandard")
        except ModuleNotFoundError:
            raise TextError(f"{path}: .zst needs the package zstandard (pip install 'fastblt[train]')") from None
        return zstandard.open(path, "rb")
    return path.open("rb")


def _document(line: bytes, field: str, where: str) -> bytes:
    try:
        value = json.loads(line)
        text = value[field]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TextError(f"{where} is no JSON object with a field {field!r}; see --field") from None
    if not isinstance(text, str):
        raise TextError(f"{where}: the field {field!r} is no text; see --field")
    return text.encode("utf-8", "surrogatepass")


def _cut(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """One document's blocks as pieces, the last one marked."""
    rest = b""
    for block in blocks:
        rest += block
        while len(rest) > PIECE:
            end = rest.rfind(b"\n", 0, PIECE) + 1 or PIECE
            yield rest[:end], False
            rest = rest[end:]
    if rest:
        yield rest, True


def is_held_out(piece: bytes, share: float) -> bool:
    return int.from_bytes(hashlib.blake2b(piece, digest_size=8).digest(), "big") < share * 2**64


def prepare(folder: Path, names: Sequence[str], field: str, share: float, length: int) -> dict[str, Any]:
    """Copy the text into `folder`, unless it is there. Returns what is known of it, which stands in RECORD too.

    Raises TextError if a file cannot be read, if there is too little text for a sequence of `length` on either side,
    or if the folder has a copy of other text.
    """
    files = find(names)
    stats = [(str(path.resolve()), path.stat()) for path in files]
    origin = hashlib.sha256(
        json.dumps([field, share, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]).encode()
    ).hexdigest()
    record = folder / RECORD
    if record.is_file():
        known: dict[str, Any] = json.loads(record.read_text())
        if known["origin"] != origin:
            raise TextError(f"{folder} has a copy of other text, or of files that have changed; name another --work")
        return known
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    sides = [_Side(folder, part) for part in _PARTS]
    documents = 0
    for path in files:
        last: _Side | None = None
        for piece, ends in pieces(path, field):
            side = sides[is_held_out(piece, share)]
            if last is not None and last is not side:
                # The text goes on on the other side, so it ends here.
                last.end()
            side.add(piece)
            digest.update(piece)
            last = side
            if ends:
                side.end()
                last, documents = None, documents + 1
    sizes = [side.close() for side in sides]
    known = {
        "sha256": digest.hexdigest(),
        "files": len(files),
        "documents": documents,
        "train_bytes": sizes[0],
        "held_out_bytes": sizes[1],
        "origin": origin,
    }
    for part, size in zip(("--text", "the held-out part of --text"), sizes, strict=True):
        if size < length:
            raise TextError(f"{part} has {size} bytes, less than a sequence of {length}; give more, or see --held-out")
    write_json(record, known)
    return known


class _Side:
    """The growing copy of one side: the bytes, and where EOS stands among them."""

    def __init__(self, folder: Path, part: str) -> None:
        self._bytes = (folder / f"{part}.bytes").open("wb")
        self._ends = (folder / f"{part}.ends").open("wb")
        self._size = 0

    def add(self, piece: bytes) -> None:
        self._bytes.write(piece)
        self._size += len(piece)

    def end(self) -> None:
        self._ends.write(self._size.to_bytes(8, "little"))
        self.add(b"\0")

    def close(self) -> int:
        self._bytes.close()
        self._ends.close()
        return self._size


class Sequences:
    """One side of the copy as sequences: BOS and length - 1 ids each, without overlap. The file is mapped, not read."""

    def __init__(self, folder: Path, part: str, length: int) -> None:
        self._span = length - 1
        self._bytes = np.memmap(folder / f"{part}.bytes", np.uint8, "r")
        ends = folder / f"{part}.ends"
        self._ends = np.memmap(ends, "<u8", "r") if ends.stat().st_size else np.zeros(0, "<u8")

    def __len__(self) -> int:
        return len(self._bytes) // self._span

    def take(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        """The sequences with these numbers: ids int64 [N, length]."""
        rows = np.empty((len(numbers), self._span + 1), np.int64)
        rows[:, 0] = BOS_ID
        for row, number in zip(rows, numbers, strict=True):
            first = number * self._span
            row[1:] = self._bytes[first : first + self._span]
            row[1:] += BYTE_OFFSET
            low, high = np.searchsorted(self._ends, [first, first + self._span])
            row[1 + self._ends[low:high].astype(np.int64) - first] = EOS_ID
        return rows
