"""One palette for all charts, and for the page at / (server/api/page/files/page.css): a method has its bytes' color."""

from __future__ import annotations

#: Of methods; of `blt-d` with its block size, the darker the larger.
METHODS = {
    "blt": "#2f7fd0",
    "blt-s": "#17936a",
    "blt-dv": "#c28400",
    "blt-dsv": "#d4462f",
    "auto": "#15202b",
    "blt-d": "#8552d6",
    "blt-d-4": "#b394e8",
    "blt-d-8": "#8552d6",
    "blt-d-16": "#4f2a96",
}
#: Of series that are no methods.
SERIES = ("#2f7fd0", "#c28400", "#17936a", "#8552d6", "#d4462f", "#8492a1")
