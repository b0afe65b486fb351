"""Parameter counts and gigabytes against the paper's: every row of its tables 3 to 10."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastblt.models.accounting import ModuleParameters, gb, gb_paper
from fastblt.models.config import BltConfig, StackConfig

TABLES = Path(__file__).parents[2] / "benchmarks" / "data" / "paper_tables.csv"


def paper(scale: str, **overrides: object) -> ModuleParameters:
    """Of the paper's shape at a scale, built without memory."""
    global_ = StackConfig(2048, 25, 16, 16, 5632, 500000.0)
    if scale == "3B":
        global_ = StackConfig(3072, 28, 24, 8, 8192, 500000.0)
    config = BltConfig(
        patcher=StackConfig(768, 14, 12, 12, 2048, 10000.0, 512),
        encoder=StackConfig(1024, 1, 16, 16, 2816, 500000.0, 512),
        global_=global_,
        decoder=StackConfig(1024, 9, 16, 16, 2816, 500000.0, 512),
        **overrides,  # type: ignore[arg-type]
    )
    return ModuleParameters.of(config)


def rows() -> list[dict[str, str]]:
    with TABLES.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("scale", "decoder", "upstream"), [("1B", 157_852_672, 1_304_014_848), ("3B", 159_949_824, 2_844_442_624)]
)
def test_parameters_are_the_paper_s(scale: str, decoder: int, upstream: int) -> None:
    parameters = paper(scale)
    assert parameters.decoder == decoder
    assert parameters.encoder + parameters.global_ == upstream
    assert parameters.patcher == pytest.approx(99.5e6, rel=0.01)
    # A diffusion head adds lookups only.
    assert paper(scale, block_sizes=(8,)) == paper(scale, block_sizes=(8,), decoder_input="embedding") == parameters


def test_the_paper_s_gigabytes_follow_from_its_passes() -> None:
    """The tables cut passes to whole numbers: a published figure lies between those of N and of N + 1 passes."""
    parameters = {scale: paper(scale) for scale in ("1B", "3B")}
    base = {(row["task"], row["scale"]): float(row["gb"]) for row in rows() if row["setting"] == "AR"}
    assert len(rows()) == 223 and len(base) == 8
    for row in rows():
        decoder, upstream, published = int(row["dec"]), int(row["glob"]), float(row["gb"])
        low = gb_paper(parameters[row["scale"]], decoder, upstream)
        high = gb_paper(parameters[row["scale"]], decoder + 1, upstream + 1)
        assert low - 0.005 <= published < high + 0.005, row
        if row["dec_pct"]:
            saved = 100 * (1 - published / base[row["task"], row["scale"]])
            # Half a unit of either figure's last digit, and of the percentage's.
            assert saved == pytest.approx(float(row["dec_pct"]), abs=0.01), row


def test_gigabytes_of_passes() -> None:
    parameters = ModuleParameters(patcher=10**9, encoder=2 * 10**9, global_=3 * 10**9, decoder=4 * 10**9)
    passes = SimpleNamespace(patcher=1, encoder=10, global_=100, decoder=1000)
    # The entropy model stays at 4 bytes a weight.
    assert gb(parameters, passes, 4) == 4 * (1 + 20 + 300 + 4000)
    assert gb(parameters, passes, 2) == 4 + 2 * (20 + 300 + 4000)
    assert gb_paper(parameters, 0, 0) == 0
    assert gb_paper(parameters, 7, 5) == 2 * (7 * 4 + 5 * 5)
