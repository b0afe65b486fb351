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
        self.enabled = enabled
        self._page = caches.page_size
        self.tree = PrefixTree(caches)
        self._groups = self.tree.groups
        self._states = caches.groups["states"]
        self._global = caches.groups["global"]
        self._latents = caches.latent_pool
        # By state index: the node of the newest page that the request inserted, how many pages these are, the number of
        # rows that fills the next one, and the nodes that it made.
        states = len(self._global.table)
        self._newest_nodes: list[Node | None] = [None] * states
        self._pages_inserted = [0] * states
        self._next_page_rows = [_NEVER] * states
        self._own_nodes: list[list[Node]] = [[] for _ in range(states)]
        #: Bytes of prompts that were looked up, and how many of them need not be computed; BOS is not counted.
        self.queries = self.hits = 0
        #: How many of the latter others computed while the request waited for them.
        self.joined = 0

    def admit(self, sequence: Sequence) -> None:
        """Let a newly admitted sequence resume at the deepest point that is cached for it, or at its start."""
        state_index = sequence.state_index
        self._pages_inserted[state_index] = 0
        if not self.enabled:
            sequence.resume(0, None)
            return
        # A request for logprobs of its prompt needs every row of it.
        matches = sequence.params.prompt_logprobs is None
        path = self._match(sequence) if matches else []
        resume = path[-1].resume if path else None
        if resume is not None and self._attach(state_index, path, resume):
            sequence.resume(resume.at, resume.patch)
            self._pages_inserted[state_index] = resume.at // self._page
        else:
            sequence.resume(0, None)
        self._next_page_rows[state_index] = (self._pages_inserted[state_index] + 1) * self._page
        if sequence.cached is None:
            sequence.cached = max(sequence.decoded - 1, 0)
            self.queries += sequence.prompt_length - 1 if matches else 0
            self.hits += sequence.cached

    def join(self, sequence: Sequence, before: int) -> None:
        """Let a running sequence, which gave back all it had, go on behind what others have computed of its prompt
        since it was admitted; `before` rows were there then."""
        self.admit(sequence)
        more = max(sequence.decoded - before, 0)
        sequence.cached = (sequence.cached or 0) + more
        self.hits += more
        self.joined += more

    def reach(self, sequence: Sequence) -> int:
        """The position at which a sequence could resume if it were admitted now."""
        path = self._match(sequence) if self.enabled and sequence.params.prompt_logprobs is None else []
        return path[-1].resume.at if path and path[-1].resume is not None else 0

    def insert(self, sequence: Sequence) -> None:
        """Insert the pages that a sequence's rows have filled. To be called before it frees pages or forgets
        patches."""
        if sequence.decoded >= self._next_page_rows[sequence.state_index]:
            self._insert_pages(sequence, min(sequence.decoded, sequence.known))

    def release(self, sequence: Sequence) -> None:
        """Insert what is left of a sequence whose pages are about to be freed."""
        state_index = sequence.state_index
        if self._next_page_rows[state_index] != _NEVER:
            # Rows past the known ids belong to drafts, which are dropped.
            until = min(sequence.decoded, sequence.known)
            self._insert_pages(sequence, until)
            if self._next_page_rows[state_index] != _NEVER:
                self._insert_partial(sequence, until)
        self._move_to(state_index, None)
        self._next_page_rows[state_index] = _NEVER
        self._own_nodes[state_index].clear()

    def forget(self, sequence: Sequence) -> None:
        """Remove the nodes of a running sequence that produced NaN, unless others build on them.

        What others use has proved sound, or they end as it did.
        """
        state_index = sequence.state_index
        self._move_to(state_index, None)
        self._next_page_rows[state_index] = _NEVER
        for node in reversed(self._own_nodes[state_index]):
            if not (node.gone or node.pins or node in self.tree.children):
                self.tree.remove_tree(node)

    def shared_pages(self, sequence: Sequence) -> int:
        """Global pages in use that a waiting sequence would share if it were admitted now."""
        path = self._match(sequence) if self.enabled and sequence.params.prompt_logprobs is None else []
        return sum(self._global.pool.in_use(node.whole) for node in path if node.whole)

    # Looking up pages

    def _match(self, sequence: Sequence) -> list[Node]:
        """The path to the deepest node from which a sequence can resume; empty where there is none."""
        # One row at least is computed. Beyond the prompt, only rows whose patches are known for the report.
        limit = min(sequence.known - 1, max(sequence.prompt_length - 1, sequence.reached))
        size = 2 * self._page
        ids = _as_bytes(sequence.ids[:limit])
        parent: Node | str | None = sequence.request.cache_salt
        path: list[Node] = []
        deepest: tuple[int, Node | None] = (0, None)
        # For every group the number of pages without a gap up to here; and the global pages filled so far.
        runs = [0] * len(self._groups)
        global_pages = 0
        for index in range(limit // self._page + 1):
            part = ids[index * size : (index + 1) * size]
            node = self.tree.nodes.get((parent, part)) if len(part) == size else None
            if node is not None and self._can_resume(node, index, runs, global_pages):
                deepest = (index, node)
            else:
                rest = self._match_partial(parent, part, index, runs, global_pages)
                deepest = deepest if rest is None else (index, rest)
            if node is None:
                break
            path.append(node)
            runs = [run + 1 if page else 0 for run, page in zip(runs, node.pages, strict=True)]
            global_pages += node.whole > 0
            parent = node
        index, last = deepest
        return [] if last is None else [*path[:index], last]

    def _match_partial(
        self, parent: Node | str | None, part: bytes, index: int, runs: list[int], global_pages: int
    ) -> Node | None:
        """The node with the deepest usable resume point in page `index`, whose first ids are these of the request."""
        longest = min(len(part), 2 * self._page - 2)
        # Where pages before this one are missing even for the last position, no resume point helps.
        last = index * self._page + longest // 2
        if any(run < index - group.first_page(last) for run, group in zip(runs, self._groups, strict=True)):
            return None
        for length in range(longest, 0, -2):
            for node in reversed(self.tree.points.get((parent, part[:length]), ())):
                if self._can_resume(node, index, runs, global_pages):
                    return node
        return None

    def _can_resume(self, node: Node, index: int, runs: list[int], global_pages: int) -> bool:
        """Whether a request can resume at a node of page `index`; `runs` and `global_pages` count the pages before
        it."""
        resume = node.resume
        if resume is None or global_pages + (node.whole > 0) != node.closed // self._page:
            return False
        return all(run >= index - group.first_page(resume.at) for run, group in zip(runs, self._groups, strict=True))

    def _attach(self, state_index: int, path: list[Node], resume: ResumePoint) -> bool:
        """Give a request the pages before the last node's resume point: whole ones shared, partial ones copied.

        False where no page is left for the copies.
        """
        filled = [node.whole for node in path if node.whole]
        self._global.attach(state_index, 0, [*filled, resume.tail] if resume.tail else filled)
        whole, inside = divmod(resume.at, self._page)
        for number, group in enumerate(self._groups):
            first = group.first_page(resume.at)
            pages = [node.pages[number] for node in path[first:]]
            group.attach(state_index, first, pages)
        self._states.attach(state_index, whole, [])
        # Shared pages are not evicted; so those to be copied are safe from here on.
        copying = [*self._groups] if inside else []
        wanted = [*copying, self._states] if inside else []
        if resume.tail:
            wanted.append(self._global)
        if not all(group.pool.available for group in wanted):
            for group in (*self._groups, self._states, self._global):
                group.clear(state_index)
            return False
        self._latents.share(resume.patch.slot)
        self._move_to(state_index, path[whole - 1] if whole else None)
        for group in copying:
            group.copy_last(state_index, inside)
        if resume.tail:
            self._global.copy_last(state_index, (resume.patch.index + 1) % self._page)
        self._states.extend(state_index, resume.at)
        return True

    # Inserting pages

    def _insert_pages(self, sequence: Sequence, until: int) -> None:
        """Insert the pages that rows below `until` fill."""
        state_index = sequence.state_index
        node = self._newest_nodes[state_index]
        if node is not None and node.gone:
            self._next_page_rows[state_index] = _NEVER
            return
        for index in range(self._pages_inserted[state_index], until // self._page):
            node = self._insert_page(sequence, index, node)
            if node is None:
                self._next_page_rows[state_index] = _NEVER
                return
            self._move_to(state_index, node)
            self._pages_inserted[state_index] = index + 1
        self._next_page_rows[state_index] = (self._pages_inserted[state_index] + 1) * self._page

    def _insert_page(self, sequence: Sequence, index: int, parent: Node | None) -> Node | None:
        """The node of a sequence's page, new or completed; None if the node there has other patches.

        Patches can differ where arithmetic depends on batching and an entropy is next to the threshold. What two
        requests computed is kept once: the sequence goes on with the pages of the node.
        """
        state_index, start, end = sequence.state_index, index * self._page, (index + 1) * self._page
        ids = _as_bytes(sequence.ids[start:end])
        patch = _newest_patch(sequence, end)
        key = (_parent_or_salt(parent, sequence), ids)
        node = self.tree.nodes.get(key)
        if node is None:
            node = self.tree.add(parent, key, patch.index + 1, patch.end + 1)
            self._own_nodes[state_index].append(node)
        elif (node.closed, node.boundary) != (patch.index + 1, patch.end + 1):
            return None
        for number, group in enumerate(self._groups):
            if node.pages[number]:
                group.swap(state_index, index, node.pages[number])
            else:
                self.tree.hold_page(node, number, int(group.table[state_index, index]))
        self._complete(sequence, node, start, ids)
        return node

    def _insert_partial(self, sequence: Sequence, until: int) -> None:
        """Insert a page that rows below `until` fill in part, for its resume point."""
        state_index = sequence.state_index
        index = self._pages_inserted[state_index]
        start = index * self._page
        # Nothing to resume at: the page is empty, or the closed patch before its end is forgotten.
        if until == start or sequence.patches[0].end >= until:
            return
        patch = _newest_patch(sequence, until)
        parent = self._newest_nodes[state_index]
        ids = _as_bytes(sequence.ids[start : patch.end + 1])
        if patch.end < start or (_parent_or_salt(parent, sequence), ids) in self.tree.points:
            return
        node = self.tree.add(parent, None, patch.index + 1, patch.end + 1)
        for number, group in enumerate(self._groups):
            self.tree.hold_page(node, number, int(group.table[state_index, index]))
        self._complete(sequence, node, start, ids)

    def _complete(self, sequence: Sequence, node: Node, start: int, ids: bytes) -> None:
        """Add the global page and the resume point that a node lacks; its page begins at `start` with these ids."""
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
        patch = _newest_patch(sequence, node.boundary)
        key = (_parent_or_salt(node.parent, sequence), ids[: 2 * (node.boundary - start)])
        tail = int(self._global.table[state_index, node.closed // self._page]) if node.closed % self._page else 0
        self.tree.add_resume(node, ResumePoint(key, node.boundary, patch, tail))

    def _move_to(self, state_index: int, node: Node | None) -> None:
        before = self._newest_nodes[state_index]
        if before is node:
            return
        if node is not None:
            node.pins += 1
        self._newest_nodes[state_index] = node
        if before is not None:
            before.pins -= 1
            self.tree.prune(before)


def _as_bytes(ids: Ids[int]) -> bytes:
    """Ids as bytes, two for each: there are more than 256 ids."""
    return array("H", ids).tobytes()


def _parent_or_salt(parent: Node | None, sequence: Sequence) -> Node | str | None:
    return parent if parent is not None else sequence.request.cache_salt


def _newest_patch(sequence: Sequence, until: int) -> Patch:
    """The newest patch of a sequence that ends before position `until`."""
    return next(patch for patch in reversed(sequence.patches) if patch.end < until)
