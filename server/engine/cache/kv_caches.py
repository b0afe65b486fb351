"""The paged caches of an engine: four groups of keys and values, and two small stores (design §4).

Every running request owns one *state index*: its row in each page table, and in every other array that is kept by
request. State 0 belongs to the null request, to which padding rows belong: its tables point to the null page.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fastblt.models.blt import Blt
from fastblt.models.config import BltConfig, StackConfig
from fastblt.server.engine.cache.page_pool import PagePool
from fastblt.server.engine.device_queue import DeviceQueue
from fastblt.server.request import MAX_BLOCK_SIZE, MAX_DRAFT_LENGTH
from fastblt.server.settings import EngineSettings

#: How many positions past the end of a completion a block or a draft may touch.
OVERSHOOT = MAX_BLOCK_SIZE + 1

#: Of a GPU's memory, what passes and captured graphs may take: this part of it, and at least so many bytes.
_ROOM, _LEAST_ROOM = 10, 2 << 30


class PageTables:
    """The page tables of some groups: int32 [groups, states, pages], the host's in `host`, the device's in `device`.

    On a CPU both are the same memory. A device apart gets what changed (`changes`), together with the integers of its
    next pass: its table is of the moment at which a pass was given to it, whatever the host has written since.
    """

    def __init__(self, groups: int, states: int, pages: int, queue: DeviceQueue) -> None:
        shape = (groups, states, pages)
        self.queue = queue
        self.host: np.ndarray = np.zeros(shape, dtype=np.int32)
        here = torch.from_numpy(self.host)
        self.device = torch.zeros(shape, dtype=torch.int32, device=queue.device) if queue.apart else here
        self._changed: list[int] | None = [] if queue.apart else None

    def enter(self, group: int, state_index: int, first: int, pages: Sequence[int]) -> None:
        """The pages of a request in a group, from its page number `first` on."""
        self.host[group, state_index, first : first + len(pages)] = pages
        if self._changed is not None:
            place = (group * self.host.shape[1] + state_index) * self.host.shape[2] + first
            self._changed += range(place, place + len(pages))

    def changes(self) -> np.ndarray | None:
        """What was entered since the last call: int32 [2, changes], places in the flattened table and pages."""
        if not self._changed:
            return None
        places = np.unique(np.array(self._changed, dtype=np.int32))
        self._changed.clear()
        return np.stack((places, self.host.reshape(-1)[places]))

    def send_whole(self) -> None:
        """Copy the whole table to the device, for who wrote to `host` directly."""
        if self._changed is not None:
            self._changed.clear()
            whole = torch.from_numpy(self.host.copy())
            self.queue.run(lambda: self.device.copy_(whole))


class CacheGroup:
    """Pages of one module over positions (bytes, or patches for the global transformer).

    `layers` holds one tensor [slots, ...] a layer, slot = page * page_size + position % page_size. A request's pages
    cover [first page, last page) of its positions; those that a window has left behind are given back. Pages may be
    shared with other requests as long as nobody writes to them.
    """

    def __init__(
        self,
        name: str,
        pages: int,
        page_size: int,
        tables: PageTables,
        number: int,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        window: int | None,
    ) -> None:
        self.name = name
        self.window = window
        self.page_size = page_size
        self.pool = PagePool(pages)
        device = tables.queue.device
        self.layers = [torch.empty((pages + 1) * page_size, *shape, dtype=dtype, device=device) for shape in shapes]
        for layer in self.layers:
            layer[:page_size].zero_()
        self.tables = tables
        self._number = number
        #: Pages of every request, int32 [states, pages]; and what the device reads, at an address that stays.
        self.table: np.ndarray = tables.host[number]
        self.device_table = tables.device[number]
        #: Told of every copy of a page: source, target, and how many positions.
        self.on_copy: Callable[[int, int, int], None] | None = None
        self._first = [0] * len(self.table)
        #: By state index: the page behind its last one.
        self.last = [0] * len(self.table)

    def _enter(self, state_index: int, first: int, *pages: int) -> None:
        self.tables.enter(self._number, state_index, first, pages)

    def first_page(self, position: int) -> int:
        """The first page that a row at `position` attends to."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.page_size

    def missing(self, state_index: int, length: int) -> int:
        """Pages still needed to cover the positions below `length`."""
        return max(0, -(-length // self.page_size) - self.last[state_index])

    def held(self, state_index: int) -> int:
        """Pages that a request has, shared ones too."""
        return self.last[state_index] - self._first[state_index]

    def extend(self, state_index: int, length: int) -> None:
        """Take pages until the positions below `length` are covered; so many must be available (`missing`)."""
        for index in range(self.last[state_index], -(-length // self.page_size)):
            self._enter(state_index, index, self.pool.take())
            self.last[state_index] = index + 1

    def free_from(self, state_index: int, length: int) -> None:
        """Give back the pages at and after `length`."""
        keep = max(-(-length // self.page_size), self._first[state_index])
        if keep >= self.last[state_index]:
            return
        for index in range(keep, self.last[state_index]):
            self._drop(state_index, index)
        self.last[state_index] = keep

    def free_before(self, state_index: int, position: int) -> None:
        """Give back the pages that lie wholly before `position`."""
        until = min(position // self.page_size, self.last[state_index])
        for index in range(self._first[state_index], until):
            self._drop(state_index, index)
        self._first[state_index] = max(self._first[state_index], until)

    def clear(self, state_index: int) -> None:
        """Give back every page of a request."""
        # The last first: of kept pages, those that others build on go longest unevicted.
        for index in reversed(range(self._first[state_index], self.last[state_index])):
            self._drop(state_index, index)
        self._first[state_index] = self.last[state_index] = 0

    def attach(self, state_index: int, first: int, pages: list[int]) -> None:
        """Let a request without pages share these, from page `first` of its positions on."""
        for page in pages:
            self.pool.share(page)
        self._first[state_index], self.last[state_index] = first, first + len(pages)
        self._enter(state_index, first, *pages)

    def copy_last(self, state_index: int, count: int) -> None:
        """Put a page of its own, with the first `count` positions copied, in place of a request's last, shared one."""
        index = self.last[state_index] - 1
        shared, own = int(self.table[state_index, index]), self.pool.take()
        self.copy(shared, own, count)
        self._enter(state_index, index, own)
        self.pool.give_back(shared)

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` positions of a page to another, in every layer."""

        def work() -> None:
            for layer in self.layers:
                pages = layer.view(-1, self.page_size, *layer.shape[1:])
                pages[target, :count] = pages[source, :count]

        self.tables.queue.run(work)
        if self.on_copy is not None:
            self.on_copy(source, target, count)

    def swap(self, state_index: int, index: int, page: int) -> None:
        """Share a page of the same content in place of the request's own."""
        own = int(self.table[state_index, index])
        if own != page:
            self.pool.share(page)
            self._enter(state_index, index, page)
            self.pool.give_back(own)

    def slots(self, num_states: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 slots of positions; state indexes and positions broadcast against each other."""
        return self.table[num_states, positions // self.page_size].astype(np.int64) * self.page_size + (
            positions % self.page_size
        )

    def _drop(self, state_index: int, index: int) -> None:
        self.pool.give_back(int(self.table[state_index, index]))
        self._enter(state_index, index, 0)


class KvCaches:
    """All groups and stores of one engine.

    Groups `patcher`, `encoder`, `decoder` count bytes, `global` counts patches; `states` keeps encoder states from the
    open patch on. `latents` [slots, C, 2, k, Hkv, D] holds the decoder's keys and values of closed patches that a row
    may still read; slot 0 is null.
    """

    def __init__(
        self, model: Blt, config: BltConfig, settings: EngineSettings, queue: DeviceQueue, dtype: torch.dtype
    ) -> None:
        self.queue = queue
        device = queue.device
        page = settings.page_size
        num_states = settings.max_running + 1
        wide = torch.finfo(dtype).bits // 8
        stacks = {
            "patcher": (config.patcher, torch.float32),
            "encoder": (config.encoder, dtype),
            "decoder": (config.decoder, dtype),
            "global": (config.global_, dtype),
        }
        per_slot = {name: _slot_bytes(stack, torch.finfo(kind).bits // 8) for name, (stack, kind) in stacks.items()}
        per_slot["states"] = config.encoder.hidden_size * wide
        windows: dict[str, int | None] = {name: stack.window for name, (stack, _) in stacks.items()}
        # Encoder states are read until their patch closes: a bounded stretch only where patches are bounded.
        windows["states"] = config.max_patch_length
        self.max_length, pages = _sizes(settings, windows, per_slot, device)
        self.groups: dict[str, CacheGroup] = {}
        self.tables = PageTables(len(pages), num_states, -(-self.max_length // page), queue)
        for number, (name, count) in enumerate(pages.items()):
            shapes: list[tuple[int, ...]] = [(config.encoder.hidden_size,)]
            kind = dtype
            if name != "states":
                stack, kind = stacks[name]
                shapes = [(2, stack.num_kv_heads, stack.head_dim)] * stack.num_layers
            self.groups[name] = CacheGroup(name, count, page, self.tables, number, shapes, kind, windows[name])
        self.byte_groups = [self.groups[name] for name in ("patcher", "encoder", "decoder", "states")]
        self._global = self.groups["global"]
        decoder = config.decoder
        # Every row may close a patch: those of a chunk, or of a whole draft of every request. The newest latent stays.
        self.latent_pool = PagePool(num_states * (MAX_DRAFT_LENGTH + 4) + settings.max_pass_rows)
        self.latents = torch.zeros(
            self.latent_pool.size + 1, len(model.local_decoder.cross_attn_layers), 2, config.cross_attn_k,
            decoder.num_kv_heads, decoder.head_dim, dtype=dtype, device=device,
        )  # fmt: skip
        self._free_states = list(range(num_states - 1, 0, -1))
        self.page_size = page
        self._reached = [(0, 0)] * num_states
        self._num_states = num_states - 1

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all caches."""
        return self.latents.nbytes + sum(layer.nbytes for group in self.groups.values() for layer in group.layers)

    def take_state_index(self) -> int | None:
        """A free state index, or None."""
        return self._free_states.pop() if self._free_states else None

    def reserve(self, state_index: int, length: int, patches: int) -> bool:
        """Cover `length` bytes in every byte group and `patches` patches: all of it, or nothing and False."""
        # Mostly the pages are there already. Byte groups grow together, so one answers for all.
        page = self.page_size
        if length <= self.byte_groups[0].last[state_index] * page and patches <= self._global.last[state_index] * page:
            return True
        wanted = [(group, length) for group in self.byte_groups] + [(self._global, patches)]
        if any(group.missing(state_index, upto) > group.pool.available for group, upto in wanted):
            return False
        for group, upto in wanted:
            group.extend(state_index, upto)
        return True

    def free_unread(self, state_index: int, computed: int, patches: int, unpooled: int) -> None:
        """Give back the pages that no row from `computed` on reads, and global pages past `patches`.

        Encoder states are needed from position `unpooled` on.
        """
        page = self.page_size
        if patches <= (self._global.last[state_index] - 1) * page:
            self._global.free_from(state_index, patches)
        # Nothing can be left behind before `computed` or the first unpooled state enters another page.
        reached = (computed // page, unpooled // page)
        if self._reached[state_index] == reached:
            return
        self._reached[state_index] = reached
        for group in self.byte_groups:
            if group.name == "states":
                group.free_before(state_index, min(unpooled, computed))
            elif group.window is not None:
                group.free_before(state_index, computed - group.window + 1)

    def clear(self, state_index: int) -> None:
        """Give back every page of a request."""
        for group in self.groups.values():
            group.clear(state_index)
        self._reached[state_index] = (0, 0)

    def release(self, state_index: int) -> None:
        """Give back a state index with every page of its request."""
        self.clear(state_index)
        self._free_states.append(state_index)

    def balanced(self) -> bool:
        """Whether everything is free or cached: true whenever no request is running."""
        pools = [*(group.pool for group in self.groups.values()), self.latent_pool]
        return all(pool.available == pool.size for pool in pools) and len(self._free_states) == self._num_states


def _slot_bytes(stack: StackConfig, wide: int) -> int:
    return 2 * stack.num_kv_heads * stack.head_dim * stack.num_layers * wide


def _sizes(
    settings: EngineSettings, windows: dict[str, int | None], per_slot: dict[str, int], device: torch.device
) -> tuple[int, dict[str, int]]:
    """The longest request that can always be served, and pages by group, for the settings' memory.

    Windowed groups get what `max_running` requests can hold at most, within half of the memory; the others share the
    rest in equal numbers of positions, since a patch may be a single byte. Where that leaves enough for two requests of
    the greatest length, windowed groups get a quarter of the memory at least: the prefix cache needs their pages too.
    """
    page = settings.page_size
    budget = settings.cache_bytes if settings.cache_bytes is not None else _default_bytes(device)
    # What a request may ask for, and what a block or a draft may touch behind that.
    positions = settings.max_model_len + OVERSHOOT
    longest = -(-positions // page)
    chunk = -(-settings.max_pass_rows // page) + 2
    windowed = {name: min(-(-w // page) + 2, longest) for name, w in windows.items() if w is not None}
    pages = {name: settings.max_running * each + chunk for name, each in windowed.items()}
    unbounded = [name for name in windows if name not in windowed]
    each_page = page * sum(per_slot[name] for name in unbounded)

    def taken() -> int:
        return sum(pages[name] * page * per_slot[name] for name in windowed)

    cost = taken()
    wanted = min(budget // 4, budget - 2 * longest * each_page) if cost <= budget // 2 else budget // 2
    if windowed and (cost > budget // 2 or wanted > cost):
        for name, each in windowed.items():
            pages[name] = min(max(each + chunk, pages[name] * wanted // cost), settings.max_running * longest + chunk)
        cost = taken()
    count = min(max(budget - cost, 0) // each_page, settings.max_running * longest)
    least = min(chunk, longest)
    if count < least:
        raise ValueError(
            f"cache_bytes = {budget} holds less than one request: give at least {cost + least * each_page}"
        )
    for name in unbounded:
        pages[name] = count
    if device.type == "cpu" and (used := cost + count * each_page) > (there := _machine_bytes()):
        raise ValueError(f"the caches would take {used} bytes, and there are {there}: give a smaller cache_bytes")
    # Whatever its patches, one request alone must fit: it can then always be finished.
    return min(positions, count * page), pages


def _default_bytes(device: torch.device) -> int:
    """An eighth of a machine's memory. Of a GPU's, what weights have left but for room for passes and graphs."""
    if device.type != "cuda":
        return _machine_bytes() // 8
    free, total = torch.cuda.mem_get_info(device)
    return max(free - max(total // _ROOM, _LEAST_ROOM), free // 2)


def _machine_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Memory for this process: the machine's, within the container's limit."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(found, int(limit.read_text()))
    except (OSError, ValueError):
        # No such file, or "max".
        return found
