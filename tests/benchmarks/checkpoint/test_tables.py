"""Tables about a checkpoint."""

from __future__ import annotations

from fastblt.benchmarks.checkpoint.tables import own_acceptance


def test_auto_begins_with_what_greedy_and_sampled_text_accept() -> None:
    greedy = [
        {"setting": "blt", "acceptance": None, "filter": None},
        {"setting": "blt-s k8", "acceptance": 1.0, "filter": None},
        {"setting": "blt-s k8 paper", "acceptance": 0.2, "filter": None},
        {"setting": "blt-dsv-4 k32", "acceptance": 0.9, "filter": 0.7},
    ]
    sampled = [
        {"setting": "blt", "acceptance": None, "filter": None},
        {"setting": "blt-s k8", "acceptance": 0.9, "filter": None},
        {"setting": "blt-s k8 paper", "acceptance": 0.1, "filter": None},
        {"setting": "blt-dsv-4 k32", "acceptance": 0.8, "filter": 0.4},
    ]
    assert own_acceptance(greedy, sampled) == {
        "blt-s k8": 1.0,
        "blt-dsv-4 k32": 0.7,
        "blt-s k8 sampled": 0.9,
        "blt-dsv-4 k32 sampled": 0.4,
    }
