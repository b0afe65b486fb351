"""How far prompts can go in a pass without taking pages from others: little memory makes chunks small, it preempts
nobody."""

from __future__ import annotations

from fastblt.server.engine.cache.kv_caches import CacheGroup, KvCaches
from fastblt.server.engine.sequence import Sequence

#: Positions behind the end of a prompt that the plan of its last rows may touch: a block, or a draft.
_BEHIND = 40


class Room:
    """Free pages, counted down while prompts get their rows.

    `spare` pages of each group stay for decoding requests. The `eldest` request is not bound by what is free: it may
    always go on by a page, if need be with pages of others, so that somebody comes to an end.
    """

    def __init__(self, caches: KvCaches, spare: int, eldest: Sequence | None) -> None:
        self._page = caches.page_size
        self._byte_groups = caches.byte_groups
        self._global = caches.groups["global"]
        self._spare = spare
        self._eldest = eldest
        self._left = {name: group.pool.available for name, group in caches.groups.items()}
        self._counted: dict[Sequence, dict[str, int]] = {}

    def rows(self, sequence: Sequence, wanted: int) -> int:
        """How many of `wanted` rows of a prompt there are pages for. They are counted as used.

        A later call for the same sequence replaces an earlier one.
        """
        for name, pages in self._counted.pop(sequence, {}).items():
            self._left[name] += pages
        behind = _BEHIND if sequence.decoded + wanted >= sequence.known else 0
        # Every row may close a patch.
        places = [(group, sequence.decoded, behind) for group in self._byte_groups]
        places.append((self._global, sequence.closed, 0))
        fitting = wanted
        for group, start, further in places:
            end = self._end(group, sequence) - start - further
            fitting = min(fitting, max(end, 0))
        if sequence is self._eldest:
            fitting = max(fitting, min(wanted, self._page))
        if fitting:
            self._counted[sequence] = counted = {}
            for group, start, further in places:
                pages = group.missing(sequence.state_index, start + fitting + further)
                counted[group.name] = pages
                self._left[group.name] -= pages
        return fitting

    def _end(self, group: CacheGroup, sequence: Sequence) -> int:
        """The position that a sequence's pages and the free ones reach to."""
        spare = 0 if sequence is self._eldest else self._spare
        free = max(self._left[group.name] - spare, 0)
        return (group.last[sequence.state_index] + free) * self._page
