"""The whole model on a device against the CPU in fp32."""

from __future__ import annotations

import copy

import pytest
import torch

from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.settings import PRETRAINED
from tests.tiny import tiny_model

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.25}


def check(reference: Blt, device: torch.device, dtype: torch.dtype) -> None:
    """Logits and entropies of two random sequences, at the reference's patches."""
    ids = torch.randint(4, 260, (2, 150), generator=torch.Generator().manual_seed(1))
    model = copy.deepcopy(reference).to(device, dtype)
    with torch.inference_mode():
        expected = reference(ids)
        result = model(ids.to(device), expected.starts.to(device))
    scale = expected.logits.abs().amax()
    torch.testing.assert_close(result.logits.cpu(), expected.logits, rtol=0, atol=TOLERANCES[dtype] * float(scale))
    torch.testing.assert_close(result.entropies.cpu(), expected.entropies, rtol=0, atol=10 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("seed", range(3))
def test_tiny_models(seed: int, device: torch.device, dtype: torch.dtype) -> None:
    check(tiny_model(seed), device, dtype)


def test_the_shipped_model(device: torch.device) -> None:
    check(load_checkpoint(str(PRETRAINED)), device, torch.float32)
