"""Prefix caching: a request shares the cache pages of earlier requests that began with the same bytes (design §4).

Pages are found in a tree (`prefix_tree.py`) with one node for every full byte page. A node is looked up by its parent
and the ids of its page, so a path from the root is a chain of hashes that are checked against the ids themselves. All
requests of one engine have the same checkpoint, patch rule and dtype; a request's `cache_salt` stands at the root.

A request resumes at the last position of a page where a patch begins. For that it needs the byte pages under every
group's window, all global pages before it, and the newest latent. No patch is open there, so no encoder states.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ids

from fastblt.server.engine.cache.kv_caches import KvCaches
from fastblt.server.engine.cache.prefix_tree import Node, PrefixTree, ResumePoint
from fastblt.server.engine.sequence import Patch, Sequence

#: More rows than any request has.
_NEVER = 2**62


class PrefixCache:
    """The tree, and where each running request stands in it.

    Work is done when a request is admitted, when its rows fill a page, and when it goes; a pass between costs one
    comparison. With `enabled` false nothing is found and nothing enters.
    """

    def __init__(self, caches: KvCaches, *, enabled: bool) -> None:
        self._enabled = enabled
        self._page = caches.page_size
        self.tree = PrefixTree(caches)
        self._groups = self.tree.groups
        self._states = caches.groups["states"]
        self._global = caches.groups["global"]
        self._latents = caches.latent_pool
        # By state index: the node of the newest page that the request entered, how many pages these are, the number of
        # rows that fills the next one, and the nodes that it made.
        states = len(self._global.table)
        self._stands: list[Node | None] = [None] * states
        self._entered = [0] * states
        self._due = [_NEVER] * states
        self._made: list[list[Node]] = [[] for _ in range(states)]
        #: Bytes of prompts that were looked up, and how many of them need not be computed; BOS is not counted.
        self.queries = self.hits = 0

    def admit(self, sequence: Sequence) -> None:
        """Let a newly admitted sequence resume at the deepest point that is cached for it, or at its start."""
        state_index = sequence.state_index
        self._entered[state_index] = 0
        if not self._enabled:
            sequence.resume(0, None)
            return
        # A request for logprobs of its prompt needs every row of it.
        asks = sequence.params.prompt_logprobs is None
        path = self._find(sequence) if asks else []
        resume = path[-1].resume if path else None
        if resume is not None and self._take(state_index, path, resume):
            sequence.resume(resume.at, resume.patch)
            self._entered[state_index] = resume.at // self._page
        else:
            sequence.resume(0, None)
        self._due[state_index] = (self._entered[state_index] + 1) * self._page
        if sequence.cached is None:
            sequence.cached = max(sequence.decoded - 1, 0)
            self.queries += sequence.prompt_length - 1 if asks else 0
            self.hits += sequence.cached

    def insert(self, sequence: Sequence) -> None:
        """Enter the pages that a sequence's rows have filled; before it leaves pages or forgets patches."""
        if sequence.decoded >= self._due[sequence.state_index]:
            self._enter(sequence, min(sequence.decoded, sequence.known))

    def release(self, sequence: Sequence) -> None:
        """Enter what is left of a sequence whose pages are about to be released."""
        state_index = sequence.state_index
        if self._due[state_index] != _NEVER:
            # Rows past the known ids stand on drafts whose bytes nobody keeps.
            until = min(sequence.decoded, sequence.known)
            self._enter(sequence, until)
            if self._due[state_index] != _NEVER:
                self._enter_rest(sequence, until)
        self._stand(state_index, None)
        self._due[state_index] = _NEVER
        self._made[state_index].clear()

    def forget(self, sequence: Sequence) -> None:
        """Drop the pages that a running sequence made, where nothing of others' builds on them: it gave numbers that
        are none. What others use has proved sound, or they end as it did.
        """
        state_index = sequence.state_index
        self._stand(state_index, None)
        self._due[state_index] = _NEVER
        for node in reversed(self._made[state_index]):
            if not (node.gone or node.pins or node in self.tree.children):
                self.tree.remove_tree(node)

    def shared_pages(self, sequence: Sequence) -> int:
        """Global pages in use that a waiting sequence would share if it were admitted now."""
        path = self._find(sequence) if self._enabled and sequence.params.prompt_logprobs is None else []
        return sum(self._global.pool.in_use(node.whole) for node in path if node.whole)

    # Looking up

    def _find(self, sequence: Sequence) -> list[Node]:
        """The nodes up to the deepest resume point from which a sequence can go on; empty where there is none."""
        # One row at least is computed. What follows the prompt is taken only as far as its patches are known.
        limit = min(sequence.known - 1, max(sequence.prompt_length - 1, sequence.reached))
        size = 2 * self._page
        ids = _as_bytes(sequence.ids[:limit])
        parent: Node | str | None = sequence.request.cache_salt
        path: list[Node] = []
        deepest: tuple[int, Node | None] = (0, None)
        # For every group, how many pages without a gap lead up to here; and the global pages filled so far.
        runs = [0] * len(self._groups)
        wholes = 0
        for index in range(limit // self._page + 1):
            part = ids[index * size : (index + 1) * size]
            node = self.tree.nodes.get((parent, part)) if len(part) == size else None
            if node is not None and self._usable(node, index, runs, wholes):
                deepest = (index, node)
            else:
                rest = self._find_rest(parent, part, index, runs, wholes)
                deepest = deepest if rest is None else (index, rest)
            if node is None:
                break
            path.append(node)
            runs = [run + 1 if page else 0 for run, page in zip(runs, node.pages, strict=True)]
            wholes += node.whole > 0
            parent = node
        index, last = deepest
        return [] if last is None else [*path[:index], last]

    def _find_rest(
        self, parent: Node | str | None, part: bytes, index: int, runs: list[int], wholes: int
    ) -> Node | None:
        """The node with the deepest usable resume point in page `index`, of whose ids the request has these."""
        longest = min(len(part), 2 * self._page - 2)
        # Where even the last position lacks pages before this one, none is of use.
        last = index * self._page + longest // 2
        if any(run < index - group.first_page(last) for run, group in zip(runs, self._groups, strict=True)):
            return None
        for length in range(longest, 0, -2):
            for node in reversed(self.tree.points.get((parent, part[:length]), ())):
                if self._usable(node, index, runs, wholes):
                    return node
        return None

    def _usable(self, node: Node, index: int, runs: list[int], wholes: int) -> bool:
        """Whether a request can go on from a node for page `index`; `runs` and `wholes` are of the pages before it."""
        resume = node.resume
        if resume is None or wholes + (node.whole > 0) != node.closed // self._page:
            return False
        return all(run >= index - group.first_page(resume.at) for run, group in zip(runs, self._groups, strict=True))

    def _take(self, state_index: int, path: list[Node], resume: ResumePoint) -> bool:
        """Give a request the pages before the last node's resume point: whole ones shared, partial ones copied.

        False where no page is left for the copies.
        """
        filled = [node.whole for node in path if node.whole]
        self._global.attach(state_index, 0, [*filled, resume.tail] if resume.tail else filled)
        entered, inside = divmod(resume.at, self._page)
        for number, group in enumerate(self._groups):
            first = group.first_page(resume.at)
            pages = [node.pages[number] for node in path[first:]]
            group.attach(state_index, first, pages)
        self._states.attach(state_index, entered, [])
        # Only now can nobody evict what is to be copied.
        copying = [*self._groups] if inside else []
        wanted = [*copying, self._states] if inside else []
        if resume.tail:
            wanted.append(self._global)
        if not all(group.pool.available for group in wanted):
            for group in (*self._groups, self._states, self._global):
                group.clear(state_index)
            return False
        self._latents.share(resume.patch.slot)
        self._stand(state_index, path[entered - 1] if entered else None)
        for group in copying:
            group.copy_last(state_index, inside)
        if resume.tail:
            self._global.copy_last(state_index, (resume.patch.index + 1) % self._page)
        self._states.extend(state_index, resume.at)
        return True

    # Entering pages

    def _enter(self, sequence: Sequence, until: int) -> None:
        """Enter the pages that rows below `until` fill."""
        state_index = sequence.state_index
        node = self._stands[state_index]
        if node is not None and node.gone:
            self._due[state_index] = _NEVER
            return
        for index in range(self._entered[state_index], until // self._page):
            node = self._enter_page(sequence, index, node)
            if node is None:
                self._due[state_index] = _NEVER
                return
            self._stand(state_index, node)
            self._entered[state_index] = index + 1
        self._due[state_index] = (self._entered[state_index] + 1) * self._page

    def _enter_page(self, sequence: Sequence, index: int, parent: Node | None) -> Node | None:
        """The node of a sequence's page, with whatever it lacked; None if the node there has other patches.

        That can be where arithmetic depends on batching and an entropy is next to the threshold. What was computed
        twice is kept once: the sequence goes on with the pages of the node.
        """
        state_index, start, end = sequence.state_index, index * self._page, (index + 1) * self._page
        ids = _as_bytes(sequence.ids[start:end])
        patch = _newest(sequence, end)
        key = (_above(parent, sequence), ids)
        node = self.tree.nodes.get(key)
        if node is None:
            node = self.tree.add(parent, key, patch.index + 1, patch.end + 1)
            self._made[state_index].append(node)
        elif (node.closed, node.boundary) != (patch.index + 1, patch.end + 1):
            return None
        for number, group in enumerate(self._groups):
            if node.pages[number]:
                group.swap(state_index, index, node.pages[number])
            else:
                self.tree.hold_page(node, number, int(group.table[state_index, index]))
        self._fill_in(sequence, node, start, ids)
        return node

    def _enter_rest(self, sequence: Sequence, until: int) -> None:
        """Keep a page that rows below `until` fill in part, for its resume point."""
        state_index = sequence.state_index
        index = self._entered[state_index]
        start = index * self._page
        # The newest patch may end with the next row, and those before it be forgotten.
        if until == start or sequence.patches[0].end >= until:
            return
        patch = _newest(sequence, until)
        parent = self._stands[state_index]
        ids = _as_bytes(sequence.ids[start : patch.end + 1])
        if patch.end < start or (_above(parent, sequence), ids) in self.tree.points:
            return
        node = self.tree.add(parent, None, patch.index + 1, patch.end + 1)
        for number, group in enumerate(self._groups):
            self.tree.hold_page(node, number, int(group.table[state_index, index]))
        self._fill_in(sequence, node, start, ids)

    def _fill_in(self, sequence: Sequence, node: Node, start: int, ids: bytes) -> None:
        """Give a node, whose page begins at `start` with these ids, the global page and resume point that it lacks."""
        state_index = sequence.state_index
        before = node.parent.closed if node.parent is not None else 0
        if node.closed // self._page > before // self._page:
            at = node.closed // self._page - 1
            if node.whole:
                self._global.swap(state_index, at, node.whole)
            else:
                self.tree.hold_whole(node, int(self._global.table[state_index, at]))
        if node.resume is not None or node.boundary <= start:
            return
        patch = _newest(sequence, node.boundary)
        key = (_above(node.parent, sequence), ids[: 2 * (node.boundary - start)])
        tail = int(self._global.table[state_index, node.closed // self._page]) if node.closed % self._page else 0
        self.tree.add_resume(node, ResumePoint(key, node.boundary, patch, tail))

    def _stand(self, state_index: int, node: Node | None) -> None:
        before = self._stands[state_index]
        if before is node:
            return
        if node is not None:
            node.pins += 1
        self._stands[state_index] = node
        if before is not None:
            before.pins -= 1
            self.tree.prune(before)


def _as_bytes(ids: Ids[int]) -> bytes:
    """Two bytes an id: there are more than 256."""
    return array("H", ids).tobytes()


def _above(parent: Node | None, sequence: Sequence) -> Node | str | None:
    return parent if parent is not None else sequence.request.cache_salt


def _newest(sequence: Sequence, until: int) -> Patch:
    """The newest patch of a sequence that ends before position `until`."""
    return next(patch for patch in reversed(sequence.patches) if patch.end < until)
