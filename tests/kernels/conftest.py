"""The kernels' tests run on one thread: rows are small, and two threads of a busy machine wait for each other.

Tests that take `path` run through the C kernel and through torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastblt.kernels.selection


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which CPU path `select` takes in the test."""
    if request.param == "torch":
        monkeypatch.setattr(fastblt.kernels.selection, "library", lambda: None)
    elif fastblt.kernels.selection.library() is None:
        pytest.skip("there is no C compiler here")
    return request.param
