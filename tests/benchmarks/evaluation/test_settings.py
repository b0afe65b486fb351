from __future__ import annotations

import pytest

from fastblt.benchmarks.evaluation.settings import decoding, every_method, family, trade
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
    ],
)
def test_names(name: str, fields: dict[str, object]) -> None:
    assert decoding(name) == fields
    DecodingParams(**decoding(name))


@pytest.mark.parametrize("name", ["", "blt-d", "blt-d-8", "blt-s 8", "blt-d-8 b0.7", "blt-d-8 a0..7", "BLT", "blt "])
def test_other_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"setting"):
        decoding(name)


def test_defaults_are_settings() -> None:
    for sizes in ((), (4,), (4, 8, 16)):
        for names in (every_method(sizes), trade(sizes)):
            assert len(set(names)) == len(names) and names[0] == "blt"
            for name in names:
                DecodingParams(**decoding(name))
    assert every_method(()) == ["blt", "blt-s k8"]
    assert [name for name in every_method((4, 16)) if "blt-dv" in name] == ["blt-dv-4 1step"]


def test_families() -> None:
    assert [family(name) for name in ("blt", "blt-s k8", "blt-dv-8 1step", "blt-d-8 a0.7")] == [
        "blt",
        "blt-s",
        "blt-dv",
        "blt-d-8",
    ]
