"""Text of all kinds as sequences: nothing is lost, nothing is on both sides, and memory stays flat."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastblt.models.training import text
from fastblt.models.training.text import PIECE, Sequences, TextError, find, is_held_out, pieces, prepare
from fastblt.models.vocabulary import BOS_ID, EOS_ID, decode

LENGTH = 64


def read(folder: Path, part: str) -> list[list[int]]:
    side = Sequences(folder, part, LENGTH)
    return side.take(range(len(side))).tolist()


def test_files_folders_globs_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.py").write_bytes(b"a = 1\n" * 40)
    (tmp_path / "in" / "deep" / "b.md.gz").write_bytes(gzip.compress(b"# b\xff\n" * 40))
    (tmp_path / "in" / ".hidden").write_bytes(b"no")
    lines = [{"body": "erste Zeile ä\n" * 20, "id": 1}, {"body": "second\n" * 20}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    known = prepare(tmp_path / "data", [str(tmp_path / "in"), str(tmp_path / "*.jsonl")], "body", 0.0, 0)
    assert known["files"] == 3 and known["documents"] == 4 and known["held_out_bytes"] == 0
    rows = read(tmp_path / "data", "train")
    assert all(row[0] == BOS_ID and len(row) == LENGTH for row in rows)
    stream = [one for row in rows for one in row[1:]]
    wanted = [b"a = 1\n" * 40, b"# b\xff\n" * 40, *(line["body"].encode() for line in lines)]  # type: ignore[attr-defined]
    whole = b"".join(wanted)
    assert whole.startswith(decode(stream))
    ends = [at for at, one in enumerate(stream) if one == EOS_ID]
    sizes = np.cumsum([len(document) + 1 for document in wanted]) - 1
    assert ends == [at for at in sizes.tolist() if at < len(stream)]


def test_zst_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zst").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(TextError, match=r"zstandard \(pip install 'fastblt\[train\]'\)"):
        list(pieces(tmp_path / "a.zst", "text"))


def test_zst(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"line\n" * 99))
    assert list(pieces(tmp_path / "a.txt.zst", "text")) == [(b"line\n" * 99, True)]


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=20),
    share=st.sampled_from([0.0, 0.3, 0.7]),
    piece=st.sampled_from([16, 50, 1000]),
)
def test_every_byte_is_on_one_side(
    documents: list[bytes], share: float, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("text")
    (folder / "in").mkdir()
    for number, document in enumerate(documents):
        (folder / "in" / f"{number:03}").write_bytes(document)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", piece)
        known = prepare(folder / "data", [str(folder / "in")], "text", share, 0)
        cut = [one for path in find([str(folder / "in")]) for one, _ in pieces(path, "text")]
    assert b"".join(cut) == b"".join(documents) and max(map(len, cut)) <= piece
    for part, held_out in (("train", False), ("held_out", True)):
        raw = (folder / "data" / f"{part}.bytes").read_bytes()
        ends = np.fromfile(folder / "data" / f"{part}.ends", "<u8")
        assert all(raw[at] == 0 for at in ends.tolist()) and len(raw) == known[f"{part}_bytes"]
        kept = np.delete(np.frombuffer(raw, np.uint8), ends.astype(np.int64)).tobytes()
        assert kept == b"".join(one for one in cut if is_held_out(one, share) == held_out)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2 is no JSON object with a field 'text'"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 is no JSON object with a field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: the field 'text' is no text"),
        ("a.gz", b"no gzip", "cannot be read"),
        ("a.gz", gzip.compress(b"x" * 9000, mtime=0)[:40], "cannot be read"),
        ("a.txt", b"short", "has 6 bytes, less than a sequence of 64"),
    ],
)
def test_what_cannot_be_read(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message.replace("(", r"\(")):
        prepare(tmp_path / "data", [str(tmp_path / name)], "text", 0.0, LENGTH)


def test_a_copy_is_of_the_text_it_was_made_from(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"x = 1\n" * 5000)
    prepare(tmp_path / "data", [str(file)], "text", 0.0, 0)
    prepare(tmp_path / "data", [str(file)], "text", 0.0, 0)
    file.write_bytes(b"x = 2\n" * 6000)
    with pytest.raises(TextError, match="other text, or of files that have changed"):
        prepare(tmp_path / "data", [str(file)], "text", 0.0, 0)


def test_memory_is_flat(tmp_path: Path) -> None:
    """A file 1,024 times as large as a piece passes through little more than pieces."""
    size = 1024 * PIECE
    with (tmp_path / "a.txt").open("wb") as file:
        for number in range(size // 64):
            file.write(b"%062d\n\n" % number)
    tracemalloc.start()
    known = prepare(tmp_path / "data", [str(tmp_path / "a.txt")], "text", 0.1, LENGTH)
    side = Sequences(tmp_path / "data", "train", LENGTH)
    side.take(range(0, len(side), 1000))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert known["train_bytes"] + known["held_out_bytes"] > size
    assert 0.07 < known["held_out_bytes"] / size < 0.13
    assert most < 32 * PIECE
