"""Writes a completion to standard output as it comes, plain or with colors, and what it cost to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import typer

from fastblt.models.vocabulary import BYTE_OFFSET
from fastblt.server.request import Delta, FinishReason, Ledger, Origin, Round

#: The page's colors (server/api/page/files/page.css, dark), as red, green and blue.
COLORS: dict[Origin, tuple[int, int, int]] = {
    Origin.CAUSAL: (86, 163, 232),
    Origin.DRAFTED: (62, 194, 143),
    Origin.BLOCK: (240, 180, 41),
    Origin.CORRECTED: (255, 122, 92),
    Origin.FILLED: (181, 138, 240),
}
_WORDS: dict[Origin, str] = {
    Origin.CAUSAL: "by the whole model",
    Origin.DRAFTED: "drafted by the decoder, accepted",
    Origin.BLOCK: "drafted by a block, accepted",
    Origin.CORRECTED: "corrected",
    Origin.FILLED: "filled by a block, not verified",
}
_RESET = "\x1b[0m"


@dataclass
class Written:
    """What was written: its bytes, seconds from the request on, and passes."""

    bytes: int
    seconds: float
    ledger: Ledger

    def print_stats(self) -> None:
        """Say on standard error how fast it was and what it took."""
        ledger, count = self.ledger, self.bytes
        lines = [
            f"{count} bytes in {self.seconds:.2f} s: {count / self.seconds:,.0f} bytes a second",
            f"forward passes: {ledger.global_} of the global transformer, {ledger.decoder} of the decoder, "
            f"{ledger.encoder} of the encoder, {ledger.patcher} of the entropy model",
        ]
        if count:
            lines.append(f"weights read: {1000 * ledger.gb / count:.1f} MB a byte")
        if ledger.patches:
            lines.append(f"patches: {ledger.patches}, of {ledger.bytes_per_patch:.1f} bytes")
        if ledger.drafted:
            share = ledger.accepted / ledger.drafted
            lines.append(f"drafts: {ledger.accepted} of {ledger.drafted} bytes accepted ({share:.0%})")
        typer.echo("\n" + "\n".join(lines), err=True)


class _Painter:
    """Colors whole characters: the bytes of one are never apart, and have the color of the first."""

    def __init__(self) -> None:
        self._character = bytearray()
        self._style = ""

    def paint(self, round_: Round) -> bytes:
        painted = bytearray()
        for at, (token, origin) in enumerate(zip(round_.ids, round_.origins, strict=True)):
            if token < BYTE_OFFSET:
                continue
            byte = token - BYTE_OFFSET
            if byte & 0xC0 != 0x80:
                painted += self.end()
                underline = "4;" if round_.start + at in round_.patches else ""
                red, green, blue = COLORS[origin]
                self._style = f"\x1b[{underline}38;2;{red};{green};{blue}m"
            self._character.append(byte)
            if byte < 0x80:
                painted += self.end()
        return bytes(painted)

    def end(self) -> bytes:
        """The character that is not complete yet."""
        character = bytes(self._character)
        self._character.clear()
        if not character.strip():
            # A terminal would color the rest of a line, and underline spaces.
            return character
        return self._style.encode() + character + _RESET.encode()


def write(deltas: Iterable[Delta], *, show: bool = False) -> Written:
    """Write the bytes of a completion as they come. Raises RuntimeError where it ends in an error.

    With `show` its deltas have rounds, and bytes are colored by them; what the colors mean goes to standard error.
    """
    out = sys.stdout.buffer
    start, count, ledger = time.perf_counter(), 0, Ledger()
    painter, seen = _Painter(), dict.fromkeys(Origin, False)
    for delta in deltas:
        if show:
            for one in delta.rounds or ():
                out.write(painter.paint(one))
                seen |= dict.fromkeys(one.origins, True)
        else:
            # Bytes and not text: a terminal puts characters together, and a file gets them exactly.
            out.write(bytes(token - BYTE_OFFSET for token in delta.ids if token >= BYTE_OFFSET))
        out.flush()
        count += len(delta.ids)
        if delta.finish_reason is FinishReason.ERROR:
            raise RuntimeError(delta.error)
        ledger = delta.ledger or ledger
    out.write(painter.end())
    out.flush()
    written = Written(count, time.perf_counter() - start, ledger)
    if sys.stdout.isatty():
        typer.echo()
    if show:
        parts = []
        for origin, there in seen.items():
            if there:
                red, green, blue = COLORS[origin]
                parts.append(f"\x1b[38;2;{red};{green};{blue}m■{_RESET} {_WORDS[origin]}")
        typer.echo("\n" + "   ".join([*parts, "\x1b[4mu\x1b[0m a patch begins"]), err=True)
    return written
