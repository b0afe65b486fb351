"""How many examples the fuzzers try: few and always the same ones, or by FASTBLT_FUZZ as many new ones."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

_ASKED = int(os.environ.get("FASTBLT_FUZZ", "0"))

few = settings(
    max_examples=_ASKED or 20,
    derandomize=not _ASKED,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

#: Of what was asked for nobody knows how long it takes.
timeout = pytest.mark.timeout(0 if _ASKED else 300)
