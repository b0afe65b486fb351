"""Pages have users, may be kept beyond them, and are evicted in the order of their last use."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastblt.server.engine.cache.page_pool import PagePool

SIZE = 5


class PoolMachine(RuleBasedStateMachine):
    """Against lists: what is in use with how many users, what is kept, and what of it has gone unused how long."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(SIZE)
        self.pool.evict = self.evict
        self.users: dict[int, int] = {}
        self.kept: set[int] = set()
        self.unused: list[int] = []
        self.evicted: list[int] = []

    def evict(self, page: int) -> None:
        self.evicted.append(page)
        self.kept.discard(page)
        self.pool.drop(page)

    @precondition(lambda self: len(self.users) < SIZE)
    @rule()
    def take(self) -> None:
        free = SIZE - len(self.users) - len(self.unused)
        self.evicted.clear()
        page = self.pool.take()
        assert 1 <= page <= SIZE and page not in self.users
        # Nothing is evicted while a page is free; then it is what was not used for longest.
        assert self.evicted == ([] if free else self.unused[:1])
        if not free:
            assert page == self.unused.pop(0)
        assert page not in self.kept
        self.users[page] = 1

    @precondition(lambda self: self.users or self.unused)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from([*self.users, *self.unused]))
        self.pool.share(page)
        self.users[page] = self.users.get(page, 0) + 1
        if page in self.unused:
            self.unused.remove(page)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(list(self.users)))
        self.pool.give_back(page)
        self.users[page] -= 1
        if not self.users[page]:
            del self.users[page]
            if page in self.kept:
                self.unused.append(page)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(list(self.users)))
        self.pool.keep(page)
        self.kept.add(page)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.kept)))
        self.pool.drop(page)
        self.kept.discard(page)
        if page in self.unused:
            self.unused.remove(page)

    @invariant()
    def counts(self) -> None:
        assert self.pool.cached == len(self.unused)
        assert self.pool.free == SIZE - len(self.users) - len(self.unused)
        assert self.pool.available == SIZE - len(self.users)
        assert all(self.pool.in_use(page) == (page in self.users) for page in range(1, SIZE + 1))


TestPool = PoolMachine.TestCase


def test_nothing_is_given_when_everything_is_in_use() -> None:
    pool = PagePool(2)
    assert {pool.take(), pool.take()} == {1, 2}
    with pytest.raises(IndexError):
        pool.take()
