"""Requests' ids, read and written, by both paths, against nested lists."""

from __future__ import annotations

import random

import pytest
import torch

from fastblt.kernels import request_ids
from fastblt.kernels.cpu.native import library
from fastblt.kernels.request_ids import RequestIds


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(request_ids, "library", lambda: None)
    else:
        assert library() is not None


@pytest.mark.usefixtures("path")
def test_what_is_written_is_read() -> None:
    rng = random.Random(4)
    expected = [[rng.randrange(260) for _ in range(20)] for _ in range(5)]
    ids = RequestIds(torch.tensor([[0, 0, 0, *line] for line in expected]), 3)
    for _ in range(30):
        places = rng.sample([(owner, at) for owner in range(5) for at in range(20)], 12)
        values = [rng.randrange(260) for _ in places]
        # Columns of a table, which are not contiguous.
        table = torch.tensor([(owner, at, value) for (owner, at), value in zip(places, values, strict=True)])
        ids.write(table[:, 0].int(), table.int()[:, 1], table[:, 2])
        for (owner, at), value in zip(places, values, strict=True):
            expected[owner][at] = value
        assert ids.ids[:, 3:].tolist() == expected and not ids.ids[:, :3].any()
        asked = torch.tensor([[rng.randrange(5), rng.randrange(20)] for _ in range(6)]).int().view(2, 3, 2)
        read = ids.read(asked[..., 0], asked[..., 1])
        assert read.tolist() == [[expected[owner][at] for owner, at in line] for line in asked.tolist()]


def test_windows() -> None:
    ids = RequestIds(torch.tensor([[0, 0, 7, 8, 9, 10, 11], [0, 0, 20, 21, 22, 23, 24]]), 2)
    owners, positions = torch.tensor([1, 0, 1], dtype=torch.int32), torch.tensor([0, 4, 1], dtype=torch.int32)
    assert ids.windows(owners, positions).tolist() == [[0, 0, 20], [9, 10, 11], [0, 20, 21]]
