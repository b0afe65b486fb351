"""The passes of entropy model, encoder and decoder over rows that lie at one address, as captured graphs where the
device has them.

A decoder pass is over a hundred kernels, most of them shorter than their launch. The shape of a pass is its number of
rows, padded to a power of two, and all that differs between two passes of a shape lies at addresses that stay: rows,
page tables, ids, sampling parameters. So there are few graphs, whatever requests ask for; all are captured when the
engine starts (`capture`), and a round is a chain of them (`rounds.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastblt.kernels.cpu.choice import Draws
from fastblt.kernels.cpu.upstream import PatchRows
from fastblt.kernels.rounds import BLOCK, FIRST, HIGH, LATENT, OWNER, POSITION, Chosen
from fastblt.kernels.row_draws import row_draws
from fastblt.kernels.selection import select
from fastblt.server.engine.device.cuda_graphs import CudaGraphs
from fastblt.server.engine.device.forward import ModuleForward, Patches, Rows

#: Rows of the smallest pass, and of the largest that is captured; larger passes hide their launches.
LEAST, MOST_CAPTURED = 8, 1024

#: Most patches of an upstream pass that is captured, and the bytes that it has room for, for each patch.
MOST_PATCHES, BYTES_A_PATCH = 256, 8

#: Adjacent rows of a request in passes of several rows: attention takes its tiles for so many.
_LONGEST = 32


def captured_size(count: int) -> int:
    """The rows that a pass of `count` rows is padded to."""
    return max(LEAST, 1 << (count - 1).bit_length()) if count else LEAST


def is_captured(patches: Tensor, inside: Tensor) -> bool:
    """Whether an upstream pass over staged patches (`Passes.upstream`) is a captured one."""
    count = patches.shape[1]
    return count <= MOST_PATCHES and inside.shape[1] == BYTES_A_PATCH * count


class Passes:
    """Passes over the rows of `rows(size)`, int32 [6, size], as `kernels/rounds.py` lays them out."""

    def __init__(self, forward: ModuleForward, draws: Draws, most_rows: int) -> None:
        self._forward = forward
        self._draws = draws
        self._graphs = CudaGraphs(forward.device)
        words = 8 * MOST_PATCHES, 2 * BYTES_A_PATCH * MOST_PATCHES
        self._patches, self._bytes = (torch.zeros(count, dtype=torch.int32, device=forward.device) for count in words)
        self._room = torch.zeros(6 * captured_size(most_rows), dtype=torch.int32, device=forward.device)

    def rows(self, size: int) -> Tensor:
        """Where the rows of the next pass of this (padded) size are to be written."""
        return self._room[: 6 * size].view(6, size)

    def enter(self, sent: Tensor) -> int:
        """Take staged rows int32 [6, size]; of causal rows that no decoder reads [3, size]. Returns their number."""
        count, size = sent.shape
        self.rows(size)[:count].copy_(sent)
        if count == 3:
            self.rows(size)[FIRST].copy_(sent[POSITION])
        return size

    def scan(self, size: int) -> Tensor:
        """Entropies fp32 [size] (nats) of the rows' next bytes."""
        return self._run("scan", size, lambda rows: self._forward.entropies(rows))[0]

    def encode(self, size: int) -> Tensor:
        """The encoder's states [size, d]."""
        return self._run("encode", size, lambda rows: self._forward.encode(rows))[0]

    def decode(self, size: int) -> Chosen:
        """The byte that each row gives, or that its place of a block may get."""
        return Chosen(*self._run("decode", size, lambda rows: self._choose(size, rows)))

    def upstream(self, patches: Tensor, inside: Tensor) -> None:
        """Pooling and global transformer over staged patches, int32 [8, P]: owner, index, first and last position,
        latent slot, index + 1, and the first of their bytes and how many there are. `inside` int32 [2, B]: owners and
        positions of the bytes, one patch behind another."""
        count, total = patches.shape[1], inside.shape[1]
        if not is_captured(patches, inside):
            self._upstream(patches, inside)
            return
        kept, kept_inside = self._patches[: 8 * count].view(8, -1), self._bytes[: 2 * total].view(2, -1)
        kept.copy_(patches)
        kept_inside.copy_(inside)

        def run() -> tuple[Tensor, ...]:
            self._upstream(kept, kept_inside)
            return ()

        self._graphs.run(("upstream", count), run)

    def capture(self, say: Callable[[str], None], *, upstream: bool = True) -> int:
        """Capture all passes, the largest first, so that the others fit into its memory; `upstream` ones too, unless
        other ranks take part in them. Returns how many there are. Rows are the null request's."""
        size = min(MOST_CAPTURED, len(self._room) // 6)
        while size >= LEAST:
            rows = self.rows(size)
            rows.zero_()
            rows[HIGH], rows[BLOCK] = 1, -1
            for each in (self.scan, self.encode, self.decode):
                each(size)
            if upstream and size <= MOST_PATCHES:
                patches = torch.zeros(8, size, dtype=torch.int32, device=rows.device)
                patches[5] = patches[7] = 1
                self.upstream(patches, torch.zeros(2, BYTES_A_PATCH * size, dtype=torch.int32, device=rows.device))
            say(f"captured the passes of {size} rows: {len(self)} graphs")
            size //= 2
        return len(self)

    def _upstream(self, patches: Tensor, inside: Tensor) -> None:
        owners, index, starts, ends, latents, highs, firsts, counts = patches.unbind()
        rows = Rows(owners, index, index, highs, [(0, min(len(owners), _LONGEST))])
        bytes_ = PatchRows(inside[0], inside[1], firsts, counts)
        self._forward.upstream(Patches(rows, starts, ends, latents, 0, bytes_))

    def __len__(self) -> int:
        return len(self._graphs)

    def _run(self, kind: str, size: int, function: Callable[[Rows], Tensor | tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        columns = self.rows(size)
        spans = [(0, 1 if size == LEAST and kind == "encode" else min(size, _LONGEST))]

        def run() -> tuple[Tensor, ...]:
            rows = Rows(columns[OWNER], columns[POSITION], columns[FIRST], columns[HIGH], spans)
            made = function(rows)
            return made if isinstance(made, tuple) else (made,)

        return run() if size > MOST_CAPTURED else self._graphs.run((kind, size), run)

    def _choose(self, size: int, rows: Rows) -> tuple[Tensor, ...]:
        columns = self.rows(size)
        block = columns[BLOCK] if self._forward.has_blocks else None
        states = self._forward.decode(rows, columns[LATENT], block)
        logits = self._forward.raw_logits(states)
        chosen = select(logits, row_draws(self._draws, columns), need_statistics=True)
        assert chosen.confidence is not None and chosen.entropy is not None
        return chosen.ids, chosen.confidence, chosen.entropy, chosen.bad
