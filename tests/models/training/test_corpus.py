"""The corpus builder, on a small library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastblt.models.training import corpus
from fastblt.models.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID

CODE = """def name{n}(value):
    '''Return the value {n}.'''
    result = value
    return result


class C{n}:
    pass


"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    files = {f"module{n}.py": "".join(CODE.format(n=f"_{n}_{m}") for m in "abcdefghij") for n in range(60)}
    files |= {f"test/test_{n}.py": CODE.format(n=f"t{n}") * 4 for n in range(20)}
    files["test/test_grammar.py"] = CODE.format(n="grammar") * 4
    files["copy.py"] = files["module3.py"]
    files["site-packages/other.py"] = files["encodings/table.py"] = CODE.format(n="skipped") * 4
    files["digits.py"] = "TABLE = [" + "123456, " * 200 + "]\n"
    files["foreign.py"] = "# " + "é" * 300 + "\n"
    files["session.py"] = '"""\n' + ">>> print(1)\n1\n" * 40 + '"""\n'
    files["short.py"] = "x = 1\n"
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_what_is_collected(library: Path) -> None:
    paths = [source.path for source in corpus.collect(library)]
    assert paths == sorted(paths)
    assert len(paths) == 81
    # Of two equal files the first by name stays.
    assert "copy.py" in paths and "module3.py" not in paths
    assert not {"digits.py", "foreign.py", "session.py", "short.py"} & set(paths)
    assert not [path for path in paths if "skipped" in path or "site-packages" in path or "encodings" in path]
    assert {source.path.startswith("test/") for source in corpus.collect(library) if source.is_test} == {True}


def test_same_library_same_corpus(library: Path) -> None:
    one, other = corpus.build(library, length=128), corpus.build(library, length=128)
    assert one.sha256 == other.sha256
    assert np.array_equal(one.train, other.train)
    assert np.array_equal(one.held_out, other.held_out)
    (library / "module0.py").write_text("".join(CODE.format(n=f"new{m}") for m in range(9)))
    assert corpus.build(library, length=128).sha256 != one.sha256


def test_held_out_files_are_not_trained_on(library: Path) -> None:
    held_out = [source for source in corpus.collect(library) if source.held_out]
    assert held_out, "the paths above must leave some out"
    train = bytes((corpus.build(library, length=128).train[:, 1:].clip(BYTE_OFFSET) - BYTE_OFFSET).astype(np.uint8))
    for source in held_out:
        assert source.data.split(b"(")[0] + b"(" not in train


def test_packages_come_beside_without_what_is_held_out(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = [source.data for source in corpus.collect(library) if source.held_out]
    package = tmp_path / "site-packages" / "beside"
    (package / "tests").mkdir(parents=True)
    own = CODE.format(n="_of_a_package_of_its_own") * 3
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n" * 4)
    (package / "own.py").write_text(own)
    (package / "copy.py").write_bytes(held_out[0] + b"# Only this line is new, and a comment.\n")
    (package / "tests" / "case.py").write_text(CODE.format(n="_of_a_test_of_its_own") * 3)
    monkeypatch.syspath_prepend(package.parent)
    corpus.importlib.invalidate_caches()
    files = corpus.package_files(["beside"], held_out)
    assert own.encode() in files and len(files) == 2
    with_it, without = corpus.build(library, 128, packages=["beside"]), corpus.build(library, 128)
    assert with_it.train_bytes == without.train_bytes + sum(len(data) + 1 for data in files)
    assert np.array_equal(with_it.held_out, without.held_out) and with_it.sha256 != without.sha256
    monkeypatch.setattr(corpus, "MOST_OF_A_PACKAGE", 100)
    assert corpus.package_files(["beside"], held_out) == []
    assert corpus.version("numpy") == np.__version__ and corpus.version("beside") == ""
    for name in ("no_such_package", "../etc", "json.decoder", "math"):
        with pytest.raises(corpus.CorpusError, match="installed"):
            corpus.installed(name)


def test_documented_functions_come_to_the_margin() -> None:
    text = """class A:
    @staticmethod
    def f(x):
        '''Doc.'''
        return x

    def g(self):
        return 1
"""
    found = corpus.documented_functions(corpus.Source("a.py", text.encode(), False)).decode()
    assert found == "def f(x):\n    '''Doc.'''\n    return x\n"
    assert corpus.documented_functions(corpus.Source("b.py", b"def broken(:\n", False)) == b""


def test_stream_ends_every_file() -> None:
    ids = corpus.stream([b"ab", b"c"])
    assert ids.tolist() == [ord("a") + 4, ord("b") + 4, EOS_ID, ord("c") + 4, EOS_ID]


def test_chunks_begin_where_prompts_do() -> None:
    text = b"".join(b"def f%d(x):\n    return x + %d\n\n" % (n, n) for n in range(200))
    ids = corpus.stream([text])
    rows = corpus.chunks(ids, 128)
    assert (rows[:, 0] == BOS_ID).all()
    for row in rows:
        assert bytes((row[1:5] - BYTE_OFFSET).astype(np.uint8)) == b"def "
    covered = b"".join(bytes((row[1:] - BYTE_OFFSET).astype(np.uint8)) for row in rows)
    assert all(b"return x + %d\n" % n in covered for n in range(190))


def test_chunks_of_text_without_lines() -> None:
    rows = corpus.chunks(corpus.stream([b"x" * 1000]), 101)
    assert rows.shape == (10, 101)


def test_a_library_without_tests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(corpus.CorpusError, match="`test` package"):
        corpus.standard_library()
