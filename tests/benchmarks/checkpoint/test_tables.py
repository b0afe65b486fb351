"""Tables about a checkpoint."""

from __future__ import annotations

from fastblt.benchmarks.checkpoint.tables import own_acceptance


def test_where_auto_begins_is_the_mean_of_greedy_and_sampled() -> None:
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
    assert own_acceptance(greedy, sampled) == {"blt-s k8": 0.95, "blt-dsv-4 k32": 0.55}
