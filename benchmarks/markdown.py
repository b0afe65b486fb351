"""Tables in Markdown, and the formats of numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a line for each row."""
    return "\n".join(_line(row) for row in (columns, ["---"] * len(columns), *rows))


class Table:
    """A table that is printed row by row, as soon as each is measured."""

    def __init__(self, *columns: str) -> None:
        print(table(columns, ()), flush=True)

    def row(self, *cells: str) -> None:
        """Print a row."""
        print(_line(cells), flush=True)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """A rate or a count: 3,113; below 100 with a decimal."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def percent(share: float | None, digits: int = 0) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


def day(date: str) -> str:
    """20261129-004348 -> 2026-11-29."""
    return f"{date[:4]}-{date[4:6]}-{date[6:8]}"
