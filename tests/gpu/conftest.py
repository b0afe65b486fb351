"""The same tests on the CPU, where they prove themselves, and on a GPU, where one is."""

from __future__ import annotations

import pytest
import torch

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    # fp32 is compared with fp32.
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(request.param)
