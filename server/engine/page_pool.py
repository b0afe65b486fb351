"""A fixed number of cache pages, handed out and taken back."""

from __future__ import annotations


class PagePool:
    """Pages 1..size. Page 0 is the null page: padding rows write to it and nobody owns it."""

    def __init__(self, size: int) -> None:
        self.size = size
        # A stack: what was freed last is still warm in the processor's cache.
        self._free = list(range(size, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """One page. Raises IndexError when none is free; callers ask `free` first."""
        return self._free.pop()

    def give_back(self, page: int) -> None:
        self._free.append(page)
