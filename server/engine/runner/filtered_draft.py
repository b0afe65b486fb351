"""What a call that made a whole filtered draft did, told from how each of its bytes was made (BLT-DSV)."""

from __future__ import annotations

from collections.abc import Sequence

from fastblt.kernels.cpu.decoder_steps import CORRECTED, PASSED


class FilteredDraft:
    """A draft of as many bytes as `origins` (`ALONE`, `PASSED`, `CORRECTED`), of blocks of up to `block` bytes, made in
    so many passes of the decoder. It should have had `length` bytes: a device apart may end it early."""

    def __init__(self, origins: Sequence[int], block: int, passes: int, length: int) -> None:
        #: Of every inner round, the size of its block.
        self.blocks: list[int] = []
        self.passed = 0
        at = 0
        for end, origin in enumerate(origins, 1):
            self.passed += origin == PASSED
            if origin == CORRECTED:
                # As the round began, a byte behind the block's last was to come from the filter.
                self.blocks.append(min(block, length - at - 1))
                at = end
        #: Bytes behind the last round, each a row of its own.
        self.singles = len(origins) - at
        self.proposed = sum(self.blocks) - len(self.blocks)
        #: Denoising steps of all blocks.
        self.block_steps = passes - len(self.blocks) - self.singles

    @property
    def encoder_passes(self) -> int:
        """Passes of the encoder before those of the decoder, where drafted rows begin as its states."""
        return 2 * len(self.blocks) + self.singles

    def rows_of_passes(self) -> list[int]:
        """Rows of every pass of the decoder; steps beyond one a block are told of the first."""
        rows: list[int] = []
        further = self.block_steps - len(self.blocks)
        for size in self.blocks:
            rows += [1 + size, *[size] * further, size]
            further = 0
        return rows + [1] * self.singles
