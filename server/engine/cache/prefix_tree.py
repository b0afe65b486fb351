"""The tree of the prefix cache: its nodes, the cache pages that they hold, and what goes when memory is short."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fastblt.server.engine.cache.kv_caches import KvCaches
from fastblt.server.engine.sequence import Patch

T = TypeVar("T")

#: A node, or the request's salt at the root, and ids behind it as bytes.
Key = tuple["Node | str | None", bytes]


@dataclass(slots=True, eq=False)
class ResumePoint:
    """Position `at`, where a patch begins: a request with the same ids before it can go on there.

    `patch` is the closed patch before it, whose slot is its latent's. `tail` is the global page that the closed patches
    fill in part, or 0 where they end with a page. `key` is where `PrefixTree.points` has it.
    """

    key: Key
    at: int
    patch: Patch
    tail: int


@dataclass(slots=True, eq=False)
class Node:
    """One byte page of some request's ids.

    `pages` are its pages in the groups `patcher`, `encoder` and `decoder`, 0 where evicted; `whole` is the global page
    that the patches ending here fill up, or 0. `closed` patches end before this page does, the newest of them just
    before position `boundary`. `key` is None for a page that its request never filled: it is kept for its resume point
    only. `pins` counts the running requests whose newest page this is. A node that has been removed is `gone`: requests
    that stand there enter nothing more.
    """

    parent: Node | None
    key: Key | None
    pages: list[int]
    closed: int
    boundary: int
    whole: int = 0
    resume: ResumePoint | None = None
    pins: int = 0
    gone: bool = False


class PrefixTree:
    """Nodes over an engine's caches.

    Holding a page keeps its content beyond its users (`PagePool.keep`). When a pool has no free page left it evicts
    here, and whatever cannot be used without that page is let go too.
    """

    def __init__(self, caches: KvCaches) -> None:
        #: Groups whose pages nodes hold one for one, by byte.
        self.groups = [caches.groups[name] for name in ("patcher", "encoder", "decoder")]
        self._global = caches.groups["global"]
        self._latents = caches.latent_pool
        #: Full pages, and the nodes with a resume point behind the ids of its key.
        self.nodes: dict[Key, Node] = {}
        self.points: dict[Key, list[Node]] = {}
        self.children: dict[Node, set[Node]] = {}
        # Who holds a page: one node in a byte group; several may share a global page or a latent.
        self.owners: list[dict[int, Node]] = [{} for _ in self.groups]
        self.global_holders: dict[int, list[Node]] = {}
        self.latent_holders: dict[int, list[Node]] = {}
        for group, owners in zip(self.groups, self.owners, strict=True):
            group.pool.evict = partial(self._evict_bytes, owners)
        self._global.pool.evict = self._evict_global
        self._latents.evict = self._evict_latent

    def add(self, parent: Node | None, key: Key | None, closed: int, boundary: int) -> Node:
        """A new node without pages; one with a key is found under it."""
        node = Node(parent, key, [0] * len(self.groups), closed, boundary)
        if key is not None:
            self.nodes[key] = node
        if parent is not None:
            self.children.setdefault(parent, set()).add(node)
        return node

    def hold_page(self, node: Node, number: int, page: int) -> None:
        """Keep a page of group `number` for a node."""
        node.pages[number] = page
        self.owners[number][page] = node
        self.groups[number].pool.keep(page)

    def hold_whole(self, node: Node, page: int) -> None:
        """Keep the global page that a node's patches fill up."""
        node.whole = page
        self._hold_global(node, page)

    def add_resume(self, node: Node, resume: ResumePoint) -> None:
        """Give a node its resume point, with the latent and the partial global page that it needs."""
        node.resume = resume
        for other in list(self.points.get(resume.key, ())):
            # A page that was never filled is of no use next to one that was.
            if other.key is None:
                self.drop_resume(other)
        self.points.setdefault(resume.key, []).append(node)
        self._latents.keep(resume.patch.slot)
        self.latent_holders.setdefault(resume.patch.slot, []).append(node)
        if resume.tail:
            self._hold_global(node, resume.tail)

    def _hold_global(self, node: Node, page: int) -> None:
        self._global.pool.keep(page)
        self.global_holders.setdefault(page, []).append(node)

    def _evict_bytes(self, owners: dict[int, Node], page: int) -> None:
        node = owners[page]
        # Nobody can go on in a page that is not all there.
        self.drop_resume(node)
        for number, mine in enumerate(self.owners):
            if mine is owners:
                self._drop_bytes(node, number)
        self.prune(node)

    def _evict_global(self, page: int) -> None:
        for node in list(self.global_holders[page]):
            if node.whole == page:
                self.remove_tree(node)
            else:
                self.drop_resume(node)

    def _evict_latent(self, slot: int) -> None:
        for node in list(self.latent_holders[slot]):
            self.drop_resume(node)

    def drop_resume(self, node: Node) -> None:
        """Take away a node's resume point; a node that was there for it alone goes too."""
        resume, node.resume = node.resume, None
        if resume is None:
            return
        _let_go(self.points, resume.key, node)
        if _let_go(self.latent_holders, resume.patch.slot, node):
            self._latents.drop(resume.patch.slot)
        if resume.tail:
            self._drop_global(node, resume.tail)
        if node.key is None:
            self._remove(node)
            self.prune(node.parent)

    def _drop_bytes(self, node: Node, number: int) -> None:
        page, node.pages[number] = node.pages[number], 0
        if page:
            del self.owners[number][page]
            self.groups[number].pool.drop(page)

    def _drop_global(self, node: Node, page: int) -> None:
        if _let_go(self.global_holders, page, node):
            self._global.pool.drop(page)

    def _remove(self, node: Node) -> None:
        """Take a node out, with all that it holds but its children."""
        node.gone = True
        if node.key is not None and self.nodes.get(node.key) is node:
            del self.nodes[node.key]
        if node.parent is not None and (siblings := self.children.get(node.parent)) is not None:
            siblings.discard(node)
            if not siblings:
                del self.children[node.parent]
        for number in range(len(self.groups)):
            self._drop_bytes(node, number)
        whole, node.whole = node.whole, 0
        if whole:
            self._drop_global(node, whole)
        self.drop_resume(node)

    def remove_tree(self, node: Node) -> None:
        """Take a node out with everything that builds on it."""
        stack = [node]
        while stack:
            one = stack.pop()
            stack += self.children.get(one, ())
            self._remove(one)
        if node.parent is not None:
            self.prune(node.parent)

    def prune(self, node: Node | None) -> None:
        """Take out nodes that hold nothing and lead nowhere, from the leaf up."""
        while node is not None and not (any(node.pages) or node.whole or node.pins or node in self.children):
            self._remove(node)
            node = node.parent


def _let_go(holders: dict[T, list[Node]], held: T, node: Node) -> bool:
    """Take a node from the holders of something; whether it was the last of them."""
    left = holders[held]
    left.remove(node)
    if left:
        return False
    del holders[held]
    return True
