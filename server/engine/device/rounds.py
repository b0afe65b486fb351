"""Rounds on a device apart: what `kernels/cpu/decoder_steps.py` and `kernels/cpu/multi_step.py` do in a call of C, as a
chain of passes that asks the host nothing.

It takes the same plans and gives the same results (`Plans`, `Decoded`; int32 columns, `Steps`), so whatever comes
before and after it is one code for both. All passes of a round are given to the device at once, each over rows that the
device itself lays out (`kernels/rounds.py`): a request that has no more rows takes part as the null request. The host
knows how many passes there may be, not how many a request needs. So it asks for few enough that hardly any are in vain:
a text of BLT goes on for a few bytes, a block for a few steps, a filtered draft (`drafting.py`) for a few inner rounds.
What is not done then is left to the next call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastblt.kernels.cpu.decoder_steps import COLUMNS, Decoded, Made, Plans
from fastblt.kernels.cpu.multi_step import FRESH, LIMITS, OPENED, OWNERS, SCANS, STARTS, Steps
from fastblt.kernels.cpu.structs import Spent
from fastblt.kernels.request_ids import RequestIds
from fastblt.kernels.rounds import LATENT, Stepping, place, settle
from fastblt.kernels.selection import EOS
from fastblt.models.vocabulary import MASK_ID
from fastblt.server.engine.device.drafting import Drafted, Drafts, draft
from fastblt.server.engine.device.passes import Passes, captured_size
from fastblt.server.engine.device.staging import Fetch, Staging
from fastblt.server.engine.device_queue import DeviceQueue

#: Most bytes of BLT, and most steps of a block, in one call.
MOST_BYTES, MOST_STEPS = 4, 4

#: Places of `Spent.rows`: rows encoded first, scanned, and encoded behind.
_FIRST, _SCANNED, _AHEAD = range(3)


class RoundPasses:
    """The passes of a round over rows of its N requests. All tensors of requests are int32 [N]."""

    def __init__(self, passes: Passes, texts: RequestIds, *, encoder_input: bool) -> None:
        self.passes = passes
        self.texts = texts
        # Made once: by how many requests, and how many places each has.
        self._nothing: dict[int, Tensor] = {}
        self._first_rows: dict[tuple[int, int], Tensor] = {}
        #: Whether decoder rows begin as encoder states.
        self.encoder_input = encoder_input

    def encode(self, owners: Tensor, starts: Tensor, counts: Tensor, width: int) -> None:
        """Encodes `counts` (at most `width`) positions of each request."""
        if width > 0:
            self.passes.encode(self._place(width, owners, starts, counts))

    def scan(self, owners: Tensor, starts: Tensor, counts: Tensor, width: int) -> Tensor:
        """Entropies fp32 [N, width] (nats) of as many positions."""
        if width <= 0:
            return torch.zeros(len(owners), 0, device=owners.device)
        made = self.passes.scan(self._place(width, owners, starts, counts))
        return made[: len(owners) * width].view(len(owners), width).clone()

    def fill(self, these: Stepping, first_rows: Tensor, size: int, width: int, most: int) -> None:
        """A pass over the rows that were laid out, and up to `most` - 1 more over blocks of at most `width`."""
        settle(self.passes.decode(size), first_rows, these, self.texts, 1, MASK_ID)
        behind, nothing = self.first_rows(these.owners, width), self.nothing(these.owners)
        for step in range(2, most + 1):
            size = captured_size(len(these.owners) * width)
            rows = self.passes.rows(size)
            place(rows, width, these.owners, these.ends, nothing, these.left, these.latents, these.blocks)
            settle(self.passes.decode(size), behind, these, self.texts, step, MASK_ID)

    def fill_behind(self, these: Stepping, width: int, most: int) -> None:
        """`fill`, the rows laid out here: causal rows and blocks of at most `width` together."""
        size = captured_size(len(these.owners) * width)
        place(
            self.passes.rows(size), width, these.owners, these.starts, these.causals, these.sizes, these.latents,
            these.blocks,
        )  # fmt: skip
        self.fill(these, self.first_rows(these.owners, width), size, width, most)

    def single_rows(self, owners: Tensor, latents: Tensor) -> Stepping:
        """Requests that take one row at a time, each over the byte before (`next_byte`). None has a row yet."""
        nothing = self.nothing(owners)
        starts, live = torch.zeros(2, len(owners), dtype=torch.int32, device=owners.device)
        columns = {"owners": owners, "starts": starts, "causals": live, "selects": live, "latents": latents}
        columns |= dict.fromkeys(("sizes", "rules", "lasts", "mosts"), nothing)
        none = torch.zeros(len(owners), 1, dtype=torch.int32, device=owners.device)
        return Stepping.of(columns, nothing.float(), none, 1)

    def next_byte(self, these: Stepping) -> Tensor:
        """A row of every request of `single_rows` that has one (`causals`), at `starts`, and the byte behind it, which
        goes into its text: int32 [N]."""
        size = captured_size(len(these.owners))
        place(self.passes.rows(size), 1, these.owners, these.starts, these.causals, these.sizes, these.latents)
        settle(self.passes.decode(size), self.first_rows(these.owners, 1), these, self.texts, 1, MASK_ID)
        return these.chosen[:, 0]

    def first_rows(self, owners: Tensor, width: int) -> Tensor:
        """Where the rows of each request begin, if each has `width` places: int32 [N], not to be written."""
        found = self._first_rows.get((len(owners), width))
        if found is None:
            found = torch.arange(len(owners), dtype=torch.int32, device=owners.device) * width
            self._first_rows[len(owners), width] = found
        return found

    def nothing(self, owners: Tensor) -> Tensor:
        """Zeros int32 [N], not to be written."""
        found = self._nothing.get(len(owners))
        if found is None:
            found = self._nothing[len(owners)] = torch.zeros_like(owners)
        return found

    def _place(self, width: int, owners: Tensor, starts: Tensor, counts: Tensor) -> int:
        size, nothing = captured_size(len(owners) * width), self.nothing(owners)
        place(self.passes.rows(size), width, owners, starts, counts, nothing, nothing)
        return size


class Rounds:
    """The calls of a device apart. `send` sends what was staged, with what changed in the page tables."""

    def __init__(
        self, queue: DeviceQueue, staging: Staging, fetch: Fetch, own: RoundPasses, send: Callable[[], None]
    ) -> None:
        self._queue, self._staging, self._fetch, self._own, self.send = queue, staging, fetch, own, send

    @property
    def encoder_input(self) -> bool:
        """Whether decoder rows begin as encoder states."""
        return self._own.encoder_input


class RowRounds(Rounds):
    """Several bytes of each request, as `fastblt.kernels.cpu.multi_step.MultiStep`."""

    def __call__(
        self, columns: np.ndarray, threshold: float, longest: int | None, *, sampled: bool, truncated: bool
    ) -> Steps:
        """As `MultiStep`; bytes that stay are at most MOST_BYTES, and their last may not close a patch. The last is
        encoded if it was scanned, for then the text goes on."""
        stays = columns[OPENED] >= 0
        limits = np.where(stays, np.minimum(columns[LIMITS], MOST_BYTES), columns[LIMITS])
        scans = int(columns[SCANS][~stays].max(initial=0))
        self._staging.begin()
        part = self._staging.take(*columns.shape)
        part.host[:] = columns
        part.host[LIMITS] = limits
        count = int(limits.max())

        staying, begins = bool(stays.any()), bool(columns[FRESH].any())

        def run() -> list[Tensor]:
            if begins:
                self._own.encode(part.each[OWNERS], part.each[STARTS], part.each[FRESH], 1)
            return self._run(part.each, count, staying, scans, threshold, longest)

        self.send()
        made, scanned, bad, ids, entropies = self._fetch(self._queue.run(run))
        drafted = scanned[~stays]
        behind = np.where(stays, scanned == made, (scanned > 0) & self.encoder_input).astype(np.int32)
        spent = Spent()
        spent.rows[:] = int(columns[FRESH].sum()), int(drafted.sum()), int(behind.sum())
        return Steps(made, scanned, ids, entropies, bad, spent, behind)

    def _run(
        self, columns: tuple[Tensor, ...], count: int, staying: bool, scans: int, threshold: float, longest: int | None
    ) -> list[Tensor]:
        own = self._own
        owners, starts, latents, limits, wanted, opened, _ = columns
        stays = opened >= 0
        live, nothing = limits > 0, own.nothing(owners)
        made, scanned, rows = nothing, nothing, own.single_rows(owners, latents)
        ids: list[Tensor] = []
        entropies: list[Tensor] = []
        positions = starts
        for turn in range(count):
            rows.starts, rows.causals, rows.selects = positions, live.int(), live.int()
            chosen = own.next_byte(rows).clone()
            positions, made = positions + 1, made + live.int()
            ids.append(chosen)
            going = live & (made < limits)
            if staying:
                # A text that stays ends with EOS; a draft goes on whatever it says.
                scan = live & stays & (rows.bad == 0) & (chosen != EOS) & (scanned < wanted)
                entropy = own.scan(owners, positions, scan.int(), 1)[:, 0]
                closes = entropy > threshold
                if longest:
                    closes = closes | (positions + 1 - opened >= longest)
                scanned = scanned + scan.int()
                entropies.append(entropy)
                going = going & torch.where(stays, scan & ~closes, True)
            live = going
            if turn + 1 < count and (staying or own.encoder_input):
                encoded = live if own.encoder_input else live & stays
                own.encode(owners, positions, encoded.int(), 1)
        if staying:
            own.encode(owners, starts + made, (stays & (scanned == made) & (made > 0)).int(), 1)
        made_ids = torch.stack(ids, 1)
        own_entropies = torch.stack(entropies, 1) if entropies else torch.zeros_like(made_ids, dtype=torch.float32)
        if scans:
            drafted, end = torch.where(stays, 0, wanted), starts + limits + 1
            whole = own.scan(owners, end - drafted, drafted, scans)
            if own.encoder_input:
                own.encode(owners, end - 1, (drafted > 0).int(), 1)
            scanned = torch.where(stays, scanned, drafted)
            wide = max(scans, own_entropies.shape[1])
            both = [torch.nn.functional.pad(each, (0, wide - each.shape[1])) for each in (own_entropies, whole)]
            own_entropies = torch.where(stays[:, None], both[0], both[1])
        return [made, scanned, rows.bad, made_ids, own_entropies]


class PlanRounds(Rounds):
    """Verifications, blocks and drafts, as `fastblt.kernels.cpu.decoder_steps.DecoderSteps`."""

    def __init__(
        self, queue: DeviceQueue, staging: Staging, fetch: Fetch, own: RoundPasses, send: Callable[[], None]
    ) -> None:
        super().__init__(queue, staging, fetch, own, send)
        #: Bytes that an inner round of a filtered draft gives, on average.
        self._gain = 4.0
        #: Whether filtered drafts shall have their whole length, at the price of passes in vain.
        self.whole = False

    def __call__(self, plans: Plans, *, sampled: bool, truncated: bool) -> Decoded:
        """As `DecoderSteps`; blocks take at most MOST_STEPS steps, and filtered drafts may be shorter than asked."""
        asked = dict(zip(COLUMNS, np.array(plans.rows, dtype=np.int32).T, strict=True))
        count, bounds = len(plans.rows), np.array(plans.bounds, dtype=np.float32)
        causals, sizes, selects = asked["causals"], asked["sizes"], asked["selects"]
        rows_of = causals + sizes
        total, width, selected = int(rows_of.sum()), int(sizes.max()), int(selects.max())
        first_rows = (rows_of.cumsum() - rows_of).astype(np.int32)
        self._staging.begin()
        given = self._staging.take(len(COLUMNS) + 2, count)
        given.host[: len(COLUMNS)] = list(asked.values())
        given.host[-2], given.host[-1] = bounds.view(np.int32), first_rows
        blocks = self._staging.take(count, max(width, 1))
        blocks.host[:] = MASK_ID
        blocks.host[np.arange(blocks.host.shape[1]) < sizes[:, None]] = plans.blocks
        main = self._staging.take(6, captured_size(total)) if total else None
        if main is not None:
            _lay_out(main.host, plans, asked, first_rows, total)
        ends = asked["starts"] + causals
        fresh = np.maximum(ends - asked["encoded"], 0) if self.encoder_input else np.zeros_like(ends)
        scans = np.where(asked["untils"] > asked["scanned"], asked["untils"] - asked["scanned"], 0)
        begun = np.maximum(asked["encoded"], ends) if self.encoder_input else asked["encoded"]
        aheads = np.where(scans > 0, asked["untils"] - begun, 0)
        stepping = (sizes > 0) & (asked["rules"] >= 0)
        most = min(int(np.where(stepping, asked["mosts"], 1).max()), MOST_STEPS)
        drafts = Drafts.of(asked, bounds, self._gain, whole=self.whole)

        def run() -> list[Tensor]:
            own = self._own
            columns = dict(zip((*COLUMNS, "bounds", "first_rows"), given.each, strict=True))
            names = ("owners", "starts", "causals", "selects", "sizes", "latents", "rules", "lasts", "mosts")
            these = Stepping.of(
                {name: columns[name] for name in names}, columns["bounds"].view(torch.float32), blocks.tensor, selected
            )
            owners = these.owners
            own.encode(owners, columns["encoded"], these.ends - columns["encoded"], int(fresh.max(initial=0)))
            if main is not None:
                size = own.passes.enter(main.tensor)
                own.fill(these, columns["first_rows"], size, width, most)
            inside = torch.arange(these.blocks.shape[1], device=owners.device) < these.sizes[:, None]
            done = ~((these.blocks == MASK_ID) & inside).any(-1)
            further = torch.where(done, (columns["untils"] - columns["scanned"]).clamp_min(0), 0)
            entropies = own.scan(owners, columns["scanned"], further, int(scans.max()))
            start = torch.maximum(columns["encoded"], these.ends) if own.encoder_input else columns["encoded"]
            behind = torch.where(further > 0, columns["untils"] - start, 0)
            own.encode(owners, start, behind, int(aheads.max()))
            results = [these.chosen, these.accepted, these.blocks, these.fixed, these.steps, these.bad, entropies]
            if drafts is not None:
                latents = _latents_behind(these, None if main is None else main.tensor, columns["first_rows"])
                results += draft(own, drafts, these, columns, latents)
            return results

        self.send()
        arrays = self._fetch(self._queue.run(run))
        return self._decoded(arrays, drafts, asked, (fresh, scans, aheads), width, selected)

    def _decoded(
        self,
        arrays: list[np.ndarray],
        drafts: Drafts | None,
        asked: dict[str, np.ndarray],
        beside: tuple[np.ndarray, np.ndarray, np.ndarray],
        width: int,
        selected: int,
    ) -> Decoded:
        chosen, accepted, blocks, fixed, steps, bad, entropies = arrays[:7]
        count, sizes = len(accepted), asked["sizes"]
        inside = np.arange(blocks.shape[1]) < sizes[:, None]
        done = ~((blocks == MASK_ID) & inside).any(-1)
        fresh, scans, aheads = beside
        spent = Spent()
        spent.rows[:] = int(fresh.sum()), int(scans[done].sum()), int(aheads[done].sum())
        made = Made(
            blocks[:, :width].tolist(), fixed[:, :width], steps.tolist(), bad.astype(np.uint8).tobytes(),
            entropies.tolist(),
        )  # fmt: skip
        lines, after = [-1] * count, Made([], np.zeros((0, 0), np.int32), [], b"", [])
        if drafts is not None:
            drafted = Drafted(*arrays[7:])
            lines = [at if size > 0 else -1 for at, size in enumerate(drafted.sizes.tolist())]
            after = drafted.made()
            for at, rows in enumerate(drafted.passes_beside(asked, encoder_input=self.encoder_input)):
                spent.rows[at] += rows
            if (gain := drafted.gain()) is not None:
                self._gain += 0.1 * (gain - self._gain)
        return Decoded(chosen[:, :selected].tolist(), accepted.tolist(), made, lines, after, spent)


def _latents_behind(these: Stepping, rows: Tensor | None, first_rows: Tensor) -> Tensor:
    """The latent that the last accepted row of each request read."""
    if rows is None:
        return these.latents
    row = first_rows + these.causals - these.selects + these.accepted
    own = rows[LATENT][row.clamp(0, rows.shape[1] - 1)]
    return torch.where(these.selects > 0, own, these.latents)


def _lay_out(rows: np.ndarray, plans: Plans, asked: dict[str, np.ndarray], first_rows: np.ndarray, total: int) -> None:
    """The first rows of all requests, int32 [6, padded]; of causal rows each reads its own latent."""
    rows[:] = 0
    rows[2], rows[5] = 1, -1
    owners, positions, highs, firsts, latents, block = rows[:, :total]
    causals, sizes = asked["causals"], asked["sizes"]
    request = np.arange(len(causals), dtype=np.int32).repeat(causals + sizes)
    offset = np.arange(total, dtype=np.int32) - first_rows[request]
    behind, start, end = offset >= causals[request], asked["starts"][request], (asked["starts"] + causals)[request]
    owners[:] = asked["owners"][request]
    np.add(start, offset, out=positions)
    highs[:] = np.where(behind, end + sizes[request], positions + 1)
    firsts[:] = np.where(behind, end, positions)
    latents[:] = asked["latents"][request]
    block[behind] = plans.blocks
    lengths: list[int] = []
    reads = iter(plans.reads)
    for first, runs in zip(asked["starts"].tolist(), asked["runs"].tolist(), strict=True):
        for _ in range(runs):
            until, _slot = next(reads)
            lengths.append(until - first)
            first = until
    latents[~behind] = np.repeat([slot for _, slot in plans.reads], lengths)
