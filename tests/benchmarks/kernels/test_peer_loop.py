from __future__ import annotations

from pathlib import Path

import pytest

from fastblt.benchmarks.kernels.peer_loop import TYPES, LlamaShape, fastest, llama_passes, our_passes, write_llama
from fastblt.models.blt import Blt

SMALL = LlamaShape(layers=2, width=64, heads=2, inner=96, vocabulary=300)


def test_a_shape_has_the_weights_asked_for() -> None:
    shape = LlamaShape.of(1.5e9)
    assert shape.read + shape.vocabulary * shape.width == pytest.approx(1.5e9, rel=0.03)


@pytest.mark.parametrize("kind", TYPES)
def test_the_file_has_what_a_pass_reads(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_llama(tmp_path / "m.gguf", SMALL, kind)
    maps = [one for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors if len(one.shape) == 2]
    assert {one.tensor_type.name for one in maps} == {TYPES[kind]}
    assert sum(int(one.n_elements) for one in maps) == SMALL.read + SMALL.vocabulary * SMALL.width


@pytest.mark.parametrize("kind", TYPES)
def test_llama_runs_it(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    write_llama(tmp_path / "m.gguf", SMALL, kind)
    with llama_passes(tmp_path / "m.gguf", 16, 1) as run:
        assert all(0 < seconds < 10 for seconds in fastest([lambda: run(1), lambda: run(16)], 1))


def test_a_pass_of_ours_runs(model: Blt) -> None:
    with our_passes(model, 3, 1) as run:
        one, three = fastest([lambda: run(1), lambda: run(3)], 1)
    assert 0 < one < 10 and 0 < three < 10


def test_the_first_call_of_a_turn_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fastblt.benchmarks.kernels.peer_loop.time.perf_counter", lambda: now[0])
    taken = iter([1.0, 5.0, 4.0, 6.0] * 2)

    def run() -> None:
        now[0] += next(taken)

    assert fastest([run], 2) == [4.0]
