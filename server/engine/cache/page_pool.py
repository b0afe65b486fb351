"""A fixed number of cache pages, with reference counts, and with an LRU of pages kept for prefix caching."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class PagePool:
    """Pages 1..size. Page 0 is the null page: padding rows write to it and nobody owns it.

    A page has users (requests that read or write it) and may be *kept*: its content is worth something to later
    requests. Without users a kept page is cached, which is as good as free: `take` evicts those that have gone unused
    longest once nothing else is left. free + cached = size whenever no request runs.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        # A stack: what was freed last is still warm in the processor's cache.
        self._free = list(range(size, 0, -1))
        self._users = [0] * (size + 1)
        self._kept = bytearray(size + 1)
        #: Kept pages without users, the least recently used first.
        self._cached: OrderedDict[int, None] = OrderedDict()
        #: Called with a page that has to go; it must `drop` that page, and may drop others.
        self.evict: Callable[[int], None] = self.drop

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._cached)

    def in_use(self, page: int) -> bool:
        return self._users[page] > 0

    def take(self) -> int:
        """One page, with one user. Raises IndexError when none is available; callers ask first."""
        if not self._free and self._cached:
            self.evict(next(iter(self._cached)))
        page = self._free.pop()
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more user of a page that is in use or kept."""
        self._users[page] += 1
        self._cached.pop(page, None)

    def give_back(self, page: int) -> None:
        """One user fewer; without any the page is cached if it is kept, else free."""
        self._users[page] -= 1
        if self._users[page] == 0:
            if self._kept[page]:
                self._cached[page] = None
            else:
                self._free.append(page)

    def keep(self, page: int) -> None:
        """Keep the content of a page in use beyond its users."""
        self._kept[page] = 1

    def drop(self, page: int) -> None:
        """Stop keeping the content of a page."""
        self._kept[page] = 0
        if self._users[page] == 0:
            del self._cached[page]
            self._free.append(page)
