"""The documentation's pages, as the tests read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Paths in it are those of the day on which a line was written.
NOTEBOOK = ROOT / "docs" / "notebook.md"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "models" / "pretrained" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PRESENT = [page for page in PAGES if page != NOTEBOOK]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_blocks(text: str, kind: str | None = None) -> list[str]:
    """What stands between fences, of one language or of all."""
    found = re.findall(r"^```([\w-]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [body for language, body in found if kind is None or language == kind]


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    """What stands between backticks; it may go on in the next line of a paragraph."""
    return [
        re.sub(r"\s+", " ", code)
        for paragraph in re.split(r"\n\s*\n|\n(?=\|)", without_code_blocks(text))
        for code in re.findall(r"`([^`]+)`", paragraph)
    ]


def anchors(text: str) -> set[str]:
    """What a link may name after #: headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", without_code_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(text: str) -> Iterator[str]:
    """Lines of code blocks and inline code that call this project's command or a module, comments left out."""
    lines = [line for block in code_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *inline_code(text)]:
        line = re.sub(r"\s+#.*", "", line.strip())
        if re.match(r"(\S+=\S+ )*((\S*/)?fastblt|(\S*/)?python -m fastblt[\w.]*)(\s|$)", line):
            yield line
