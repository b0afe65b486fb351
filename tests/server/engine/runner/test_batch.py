from __future__ import annotations

from fastblt.server.engine.runner.batch import bucket


def test_buckets_are_few_and_waste_little() -> None:
    sizes = [bucket(count) for count in range(1, 1025)]
    assert all(size >= count and size % 8 == 0 for count, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and len(set(sizes)) <= 36
    assert all(size <= max(8, 1.25 * count + 8) for count, size in enumerate(sizes, 1))
