"""The C kernel's noise, and selection's two paths side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastblt.kernels.cpu.native import library
from fastblt.kernels.noise import gumbel
from fastblt.kernels.selection import select, select_torch
from tests.kernels.poison import poison, written
from tests.kernels.rows import LOGITS, draws, pack, random_logits, random_row

DISTINCT = 2e-5

pytestmark = pytest.mark.usefixtures("path")


NATIVE = pytest.mark.parametrize("path", ["native"], indirect=True)


@NATIVE
def test_the_rough_noise_is_never_further_off_than_the_exact_one_is_looked_for() -> None:
    """All 2^23 values, against the doubt of 1e-4 that the C code allows two ids together."""
    words = torch.arange(2**23, dtype=torch.int32) << 9
    rough = torch.full((2**23,), float("nan"))
    native = library()
    assert native is not None
    native.fastblt_rough_gumbel(words.data_ptr(), len(words), rough.data_ptr())
    uniform = torch.arange(2**23, dtype=torch.float64).add_(0.5).mul_(2.0**-23)
    error = uniform.log_().neg_().log_().neg_().sub_(rough).abs_().max().item()
    # A sum with a score within 20 of the best adds half a unit of 2^-19.
    assert 2 * (error + 2.0**-20) < 1e-4 / 2


@NATIVE
def test_the_native_noise_is_the_torch_path_s() -> None:
    """Among equals the largest noise wins: its id, for many seeds and positions."""
    generator = torch.Generator().manual_seed(4)
    seeds = torch.randint(-(2**63), 2**63 - 1, (4000,), generator=generator)
    positions = torch.randint(0, 2**40, (4000,), generator=generator)
    expected = gumbel(seeds, positions)
    expected[:, [0, 1, 3]] = -torch.inf
    assert torch.equal(draws(torch.zeros(260), seeds, positions), expected.argmax(-1))


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_paths_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy ids and what is bad to the bit, the rest but for the last bits; nothing is left unwritten."""
    poison(monkeypatch)
    rng = np.random.default_rng(17)
    kinds = rng.choice(LOGITS, 200)
    logits = torch.as_tensor(np.stack([random_logits(rng, kind) for kind in kinds])).to(dtype)
    params = pack([random_row(rng) for _ in kinds])
    native, plain = (
        select(logits, params, need_statistics=True),
        select_torch(logits.float(), params, need_statistics=True),
    )
    written(native)
    assert torch.equal(native.bad, plain.bad)
    greedy, good = params.temperature == 0, plain.bad == 0
    assert torch.equal(native.ids[greedy], plain.ids[greedy])
    assert (native.ids != plain.ids).sum() <= 2
    same = good & (native.ids == plain.ids)
    torch.testing.assert_close(native.logprobs[same], plain.logprobs[same], rtol=1e-6, atol=1e-6)
    assert native.confidence is not None and plain.confidence is not None
    assert native.entropy is not None and plain.entropy is not None
    torch.testing.assert_close(native.confidence[good], plain.confidence[good], rtol=1e-6, atol=0)
    torch.testing.assert_close(native.entropy[good], plain.entropy[good], rtol=1e-6, atol=2e-6)
    assert native.confidence[~good].isnan().all() and native.entropy[~good].isnan().all()
