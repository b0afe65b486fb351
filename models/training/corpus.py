"""The training text: the sources of CPython's standard library, as installed with the running interpreter, and, where
named, those of installed packages.

The same Python release and the same packages give the same bytes and the same digest on any machine. Everyone who can
run this project has the text already, so the shipped checkpoint can be made again without a download.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import random
import sysconfig
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastblt.models.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID

SKIPPED_FOLDERS = frozenset({"site-packages", "encodings", "__pycache__", "pydoc_data", "data"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
MAX_FILE_BYTES = 600_000
#: Largest shares of digits (generated tables have more) and of bytes beyond ASCII (text in other languages has more).
MAX_DIGITS = 0.20
MAX_NON_ASCII = 0.05
#: Largest share of lines that begin with `>>>`. Files with more teach a model to answer a docstring with `>>>`.
MAX_DOCTEST_LINES = 0.15
HELD_OUT_PERCENT = 2
#: How many bytes of a package are taken at most, so that no one style outweighs the rest.
MOST_OF_A_PACKAGE = 4_000_000
#: A file of a package is left out if more of its longer lines stand in held-out files too: packages carry copies of
#: the library's modules.
MAX_HELD_OUT_LINES = 0.05
LONG_LINE = 25

Ids = NDArray[np.uint16]


class CorpusError(RuntimeError):
    """The interpreter's standard library, or a package, cannot serve as a corpus."""


@dataclass(frozen=True)
class Source:
    """One file of the library. `path` is relative to the library's folder."""

    path: str
    data: bytes
    is_test: bool

    @property
    def held_out(self) -> bool:
        return int(hashlib.sha256(self.path.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True)
class Corpus:
    """Training and held-out chunks, ids uint16 [N, length] beginning with BOS, and the SHA-256 of both texts."""

    train: Ids
    held_out: Ids
    sha256: str
    train_bytes: int
    held_out_bytes: int


def standard_library() -> Path:
    """The folder of the interpreter's library. Raises CorpusError where its `test` package is not installed."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "test" / "test_grammar.py").is_file():
        raise CorpusError(
            f"{root} has no `test` package (some distributions ship it apart, e.g. as libpython3-testsuite); "
            "the corpus needs a complete CPython 3.11 library"
        )
    return root


def collect(root: Path) -> list[Source]:
    """The usable sources under `root`, sorted by path, without duplicates of content."""
    sources = []
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        data = path.read_bytes().replace(b"\r\n", b"\n")
        digest = hashlib.sha256(data).digest()
        if digest in seen or not usable(data):
            continue
        seen.add(digest)
        is_test = bool(TEST_FOLDERS.intersection(relative.parts)) or relative.name.startswith("test_")
        sources.append(Source(relative.as_posix(), data, is_test))
    return sources


def usable(data: bytes) -> bool:
    """Whether a file is ordinary program text."""
    if not 64 <= len(data) <= MAX_FILE_BYTES:
        return False
    lines = data.splitlines()
    return (
        sum(data.count(digit) for digit in b"0123456789") <= MAX_DIGITS * len(data)
        and sum(byte >= 0x80 for byte in data) <= MAX_NON_ASCII * len(data)
        and sum(line.lstrip().startswith(b">>>") for line in lines) <= MAX_DOCTEST_LINES * len(lines)
    )


def documented_functions(source: Source) -> bytes:
    """The functions of a file that have a docstring, dedented to the left margin, as users' prompts often are."""
    text = source.data.decode("utf-8", "replace")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return b""
    lines = text.splitlines(keepends=True)
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or ast.get_docstring(node) is None:
            continue
        body = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        if ">>>" not in body and len(body) < 4000:
            found.append(body)
    return "\n\n".join(found).encode()


def installed(package: str) -> Path:
    """The folder of an installed package, which is not imported. Raises CorpusError."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise CorpusError(f"no package {package!r} is installed here: name those whose sources are to be trained on")
    return Path(next(iter(found.submodule_search_locations)))


def version(package: str) -> str:
    """The version of an installed package; "" of one that no distribution brought."""
    distributions = importlib.metadata.packages_distributions().get(package)
    return importlib.metadata.version(distributions[0]).split("+")[0] if distributions else ""


def package_files(packages: Sequence[str], held_out: list[bytes]) -> list[bytes]:
    """Files of installed packages, without their tests and what the `held_out` files say too, in an order of its own.

    Raises CorpusError.
    """
    known = {line for data in held_out for line in _long_lines(data)}
    files: dict[bytes, None] = {}
    for package in packages:
        sources = [source for source in collect(installed(package)) if not source.is_test]
        taken = 0
        for source in sorted(sources, key=lambda source: hashlib.sha256(source.path.encode()).digest()):
            lines = _long_lines(source.data)
            if source.data in files or sum(line in known for line in lines) > MAX_HELD_OUT_LINES * len(lines):
                continue
            taken += len(source.data)
            if taken > MOST_OF_A_PACKAGE:
                break
            files[source.data] = None
    return list(files)


def _long_lines(data: bytes) -> list[bytes]:
    return [text for line in data.splitlines() if len(text := line.strip()) >= LONG_LINE]


def build(root: Path | None = None, length: int = 1024, seed: int = 0, packages: Sequence[str] = ()) -> Corpus:
    """Chunks of `length` ids for training and for evaluation.

    The text has the library without its tests twice (with different chunk boundaries), its documented functions once
    more on their own, and the tests once: they are two thirds of the bytes, but unlike what users write. Files of
    `packages` come beside it; none is held out. Raises CorpusError if `root` is None and the interpreter's library is
    incomplete, or for a package that is not installed.
    """
    sources = collect(root or standard_library())
    held_out = [source.data for source in sources if source.held_out]
    kept = [source for source in sources if not source.held_out]
    library = [source for source in kept if not source.is_test]
    functions = [functions for source in library if (functions := documented_functions(source))]
    train = [source.data for source in kept if source.is_test] + [source.data for source in library] * 2 + functions
    train += package_files(packages, held_out)
    random.Random(seed).shuffle(train)
    train_ids, held_out_ids = stream(train), stream(held_out)
    digest = hashlib.sha256(train_ids.astype("<u2").tobytes() + held_out_ids.astype("<u2").tobytes()).hexdigest()
    return Corpus(
        train=chunks(train_ids, length),
        held_out=chunks(held_out_ids, length),
        sha256=digest,
        train_bytes=len(train_ids),
        held_out_bytes=len(held_out_ids),
    )


def stream(documents: list[bytes]) -> Ids:
    """The ids of all documents, one after another, with EOS after each: uint16 [N]."""
    parts = []
    for data in documents:
        ids = np.frombuffer(data, np.uint8).astype(np.uint16) + BYTE_OFFSET
        parts += [ids, np.array([EOS_ID], np.uint16)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


def chunks(ids: Ids, length: int) -> Ids:
    """Cut a stream into rows [N, length] of BOS and length - 1 ids. They may overlap by up to a quarter.

    A chunk begins where a prompt might: at the last statement on the left margin within the last quarter of the chunk
    before it, or else at the last line start there, or else right after the chunk before it.
    """
    span = length - 1
    after_line = np.ones(len(ids), bool)
    after_line[1:] = (ids[:-1] == ord("\n") + BYTE_OFFSET) | (ids[:-1] == EOS_ID)
    margin = ~np.isin(ids, np.frombuffer(b" \t\n#)]}\"'", np.uint8).astype(np.uint16) + BYTE_OFFSET)
    lines, statements = np.flatnonzero(after_line), np.flatnonzero(after_line & margin)
    rows = []
    start = 0
    while start + span <= len(ids):
        rows.append(np.concatenate([np.array([BOS_ID], np.uint16), ids[start : start + span]]))
        end = start + span
        start = _last(statements, end - span // 4, end) or _last(lines, end - span // 4, end) or end
    return np.stack(rows) if rows else np.zeros((0, length), np.uint16)


def _last(positions: NDArray[np.intp], low: int, high: int) -> int | None:
    """The last of the sorted `positions` in (low, high]; None if there is none."""
    index = int(np.searchsorted(positions, high, side="right")) - 1
    return int(positions[index]) if index >= 0 and positions[index] > low else None
