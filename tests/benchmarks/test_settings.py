from __future__ import annotations

import pytest

from fastblt.benchmarks.settings import body, chosen, decoding, every_method, family, papers, trade
from fastblt.server.request import DecodingParams


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("auto", {"method": "auto"}),
        ("blt", {"method": "blt"}),
        ("blt-s", {"method": "blt-s"}),
        ("blt-s k16", {"method": "blt-s", "draft_length": 16}),
        (
            "blt-d-8 a0.7",
            {"method": "blt-d", "block_size": 8, "unmasking": "confidence", "confidence_threshold": 0.7},
        ),
        ("blt-d-16 g1.0", {"method": "blt-d", "block_size": 16, "unmasking": "entropy", "entropy_bound": 1.0}),
        ("blt-dv-4 1step", {"method": "blt-dv", "block_size": 4, "unmasking": "one_step"}),
        (
            "blt-d-8 a0.5 aligned",
            {
                "method": "blt-d",
                "block_size": 8,
                "unmasking": "confidence",
                "confidence_threshold": 0.5,
                "align_blocks": True,
            },
        ),
        ("blt-s k4 paper", {"method": "blt-s", "draft_length": 4, "paper_accounting": True}),
    ],
)
def test_names(name: str, fields: dict[str, object]) -> None:
    assert body(name) == fields
    assert decoding(name) == DecodingParams(**fields)


@pytest.mark.parametrize("name", ["", "blt-d", "blt-d-8", "blt-s 8", "blt-d-8 a0..7", "BLT", "blt paper"])
def test_other_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"setting"):
        body(name)


def test_defaults_are_settings() -> None:
    for sizes in ((), (4,), (4, 8, 16)):
        for names in (every_method(sizes), trade(sizes), papers(sizes)):
            assert len(set(names)) == len(names) and names[0] == "blt"
            assert len({decoding(name) for name in names}) == len(names)
    assert every_method(()) == ["blt", "blt-s k8"]
    assert [name for name in every_method((4, 16)) if "blt-dv" in name] == ["blt-dv-4 1step"]


def test_families() -> None:
    assert [family(name) for name in ("blt", "blt-s k8", "blt-dv-8 1step", "blt-d-8 a0.7")] == [
        "blt",
        "blt-s",
        "blt-dv",
        "blt-d-8",
    ]


def test_the_papers_settings() -> None:
    names = papers((4, 8, 16))
    assert len(names) == 1 + 6 + 15 + 24
    assert {"blt-s k16 paper", "blt-d-8 a0.7 aligned", "blt-dv-16 g2.0"} < set(names)
    assert len(papers(())) == 7


def test_some_of_the_papers_settings() -> None:
    longer = ["blt-s k32", "blt-dsv-4 k16", "blt-dsv-4 k32"]
    assert chosen((4,), "all") == [*papers((4,)), *longer]
    headline = ["blt", "blt-s k4", "blt-s k8", "blt-s k16", "blt-d-4 a0.7", "blt-dv-4 1step", *longer]
    assert chosen((4,), "headline") == headline
    assert chosen((4,), "blt-s k4") == ["blt", "blt-s k4", "blt-s k4 paper"]
