"""The environment of processes that the server starts from its own code."""

from __future__ import annotations

import os
from pathlib import Path

import fastblt

#: The folder that has the package: of an installation, or `src` of a checkout.
_ROOT = Path(fastblt.__file__).absolute().parent.parent


def child_environment() -> dict[str, str]:
    """This process's environment, in which `python -P -m fastblt...` finds the same code as runs here.

    Variables `FASTBLT_SERVE_*` are left out: they are the server's own options, and there may be keys among them.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    # Waiting threads that spin would cost their neighbors whole time slices; read when torch is imported.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": path}
    return {name: value for name, value in environment.items() if not name.startswith("FASTBLT_SERVE_")}
