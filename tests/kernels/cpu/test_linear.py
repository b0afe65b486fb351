"""Maps over packed weights: against double precision, fp32 of the same values, and row by row against themselves."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastblt.kernels.cpu import build
from fastblt.kernels.cpu import linear as module
from fastblt.kernels.cpu.linear import GROUP, WIDTH, Storage, Weights, linear, pack_weights, unpack_weights
from fastblt.kernels.cpu.native import PROTOTYPES, library
from fastblt.kernels.cpu.threads import set_threads

NARROW = (Storage.BFLOAT16, Storage.FLOAT16)
ROWS = st.one_of(st.integers(0, 30), st.integers(31, 300))
INPUTS = st.sampled_from([1, 7, 8, 64, 127, 128, 129, 255, 256, 300])
OUTPUTS = st.sampled_from([1, 3, 8, 31, 32, 33, 50, 129])
THREADS = st.integers(1, 4)
#: So small that fp16 has no exponent for it, and numbers that are no power of two.
SIZES = st.sampled_from([1.0, 3e-3, 2e-6])


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    yield
    set_threads(None)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_native_path_is_there() -> None:
    assert library() is not None


@settings(max_examples=60, deadline=None)
@given(ROWS, INPUTS, OUTPUTS, THREADS, SIZES, st.sampled_from(NARROW))
def test_narrow_weights_give_the_bits_of_fp32(
    rows: int, inputs: int, outputs: int, threads: int, size: float, storage: Storage
) -> None:
    x, weight = draw(rows, rows, inputs), (size * draw(1, outputs, inputs)).to(storage.dtype)
    narrow, wide = pack_weights(weight, storage), pack_weights(weight.float(), Storage.FLOAT32)
    assert 2 * narrow.nbytes == wide.nbytes
    set_threads(threads)
    result = linear(x, narrow)
    torch.testing.assert_close(result.double(), x.double() @ weight.double().T, atol=1e-4 * size, rtol=1e-4)
    assert torch.equal(result, linear(x, wide))
    set_threads(1)
    for row in range(0, rows, 1 + rows // 7):
        assert torch.equal(linear(x[row : row + 1], narrow)[0], result[row]), "a row depends on its batch"


@settings(max_examples=40, deadline=None)
@given(ROWS, INPUTS, OUTPUTS, THREADS)
def test_int8_is_near_and_rows_are_alone(rows: int, inputs: int, outputs: int, threads: int) -> None:
    x, weight = draw(rows, rows, inputs), draw(1, outputs, inputs)
    packed = pack_weights(weight, Storage.INT8)
    set_threads(threads)
    result = linear(x, packed)
    # Half a step of each of the two roundings, and of the product of both; a step is at most a 127th of the largest.
    largest = x.abs().amax(1, keepdim=True) * weight.abs().amax(1)
    assert ((result - x @ weight.T).abs() <= inputs * largest / 127 * 1.02 + 1e-5).all()
    # Where the half of a step is met, torch may round to its other side.
    assert ((result - module._linear_int8(x, packed)).abs() <= largest / 127 + 1e-4).all()
    set_threads(1)
    for row in range(0, rows, 1 + rows // 7):
        assert torch.equal(linear(x[row : row + 1], packed)[0], result[row]), "a row depends on its batch"


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("shape", [(1, 1), (33, 130), (64, 256), (WIDTH, GROUP)])
def test_weights_come_back(storage: Storage, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(2, *shape)
    packed = pack_weights(weight, storage)
    if storage == Storage.INT8:
        torch.testing.assert_close(unpack_weights(packed), weight, atol=float(weight.abs().max()) / 253, rtol=0)
    else:
        assert torch.equal(unpack_weights(packed), weight.to(storage.dtype).float())
    monkeypatch.setattr(module, "library", lambda: None)
    assert torch.equal(pack_weights(weight, storage).data, packed.data), "torch packs otherwise"


@pytest.mark.parametrize("storage", Storage)
def test_without_c_torch_serves(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    x, packed = draw(1, 5, 200), pack_weights(draw(2, 40, 200), storage)
    with_c = linear(x, packed)
    monkeypatch.setattr(module, "library", lambda: None)
    torch.testing.assert_close(linear(x, packed), with_c, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("storage", Storage)
def test_rows_that_do_not_lie_together(storage: Storage) -> None:
    x, packed = draw(1, 64, 5).T, pack_weights(draw(2, 9, 64), storage)
    assert torch.equal(linear(x, packed), linear(x.contiguous(), packed))


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_row(storage: Storage, poison: float) -> None:
    x, packed = draw(1, 7, 140), pack_weights(draw(2, 11, 140), storage)
    good = linear(x, packed)
    x[3, 5] = poison
    bad = linear(x, packed)
    assert not bad[3].isfinite().any() and torch.equal(bad[[0, 1, 2, 4, 5, 6]], good[[0, 1, 2, 4, 5, 6]])


def test_an_input_far_larger_than_others_spoils_its_group_only() -> None:
    """One scale a row would leave nothing of the other inputs."""
    x, weight = draw(1, 4, 8 * GROUP), draw(2, 40, 8 * GROUP)
    x[:, 5] *= 1e4
    weight[:, 5] *= 1e-4
    error = linear(x, pack_weights(weight, Storage.INT8)) - x @ weight.T
    exact = x[:, GROUP:] @ weight[:, GROUP:].T
    assert error.norm() < 0.45 * exact.norm()


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(4, 4, dtype=torch.int8)])
def test_weights_that_are_none(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="matrix of floats"):
        pack_weights(weight, Storage.FLOAT32)


def compiled(folder: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    sources = [str(build.SOURCES / name) for name in (*build.WIDE, "team.c")]
    path = folder / "lib.so"
    subprocess.run([*build.compiler(), *build.FLAGS, *flags, "-shared", *sources, "-o", path, "-lm"], check=True)
    library = ctypes.CDLL(str(path))
    for name in ("fastblt_linear", "fastblt_linear_int8", "fastblt_pack", "fastblt_pack_int8"):
        getattr(library, name).restype, getattr(library, name).argtypes = PROTOTYPES[name]
    return library


def lesser_flags() -> list[tuple[str, ...]]:
    """Flags of processors that know less than this one. Some have AVX-512 without its products of bytes."""
    own = build.machine_flags() + build.wide_flags()
    groups = [tuple(names.values()) for names in build.WIDE_FLAGS]
    steps = [build.machine_flags() + sum(groups[:count], ()) for count in range(len(groups))]
    return [("-mfma",), *(flags for flags in steps if len(flags) < len(own))]


@pytest.mark.skipif(not build.wide_flags(), reason="this processor has one kind of vectors only")
@pytest.mark.parametrize("flags", lesser_flags(), ids=" ".join)
def test_every_kind_of_vectors_gives_the_same_bits(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = compiled(tmp_path, flags)
    cases: list[tuple[Tensor, Weights]] = [
        (draw(rows, rows, inputs), pack_weights(draw(3, 70, inputs) * 1e-3, storage))
        for storage in Storage
        for rows, inputs in ((1, 300), (4, 129), (11, 256), (24, 300), (40, 200), (260, 64))
    ]
    expected = [linear(*case) for case in cases]
    monkeypatch.setattr(module, "library", lambda: other)
    for (x, weights), wanted in zip(cases, expected, strict=True):
        assert torch.equal(linear(x, weights), wanted), (weights.storage, x.shape)
        assert torch.equal(pack_weights(unpack_weights(weights), weights.storage).data, weights.data)
