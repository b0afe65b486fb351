"""The C code of the CPU path as one library, with the types of its functions.

`library()` compiles it once per machine (`build.py`) and loads it; where that cannot be done it is None, and the torch
versions serve: several times slower, otherwise equal. `status()` says which of these it was, and why.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

from fastblt.kernels.cpu import build, structs

_logger = logging.getLogger("fastblt.kernels")

_STEPS = (POINTER(structs.Latents), POINTER(structs.Choice))

#: What a function returns, and what it takes.
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fastblt_rms_norm": (None, (c_void_p, c_int64, c_int64, c_void_p, c_float, c_void_p)),
    "fastblt_project": (
        c_int, (c_void_p, c_int64, c_int64, c_void_p, c_float, POINTER(structs.Linear), c_int64),
    ),
    "fastblt_project_add": (
        None, (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p),
    ),
    "fastblt_feed_forward": (
        c_int,
        (c_void_p, c_int64, c_int64, c_void_p, c_float, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    ),
    "fastblt_linear": (c_int, (c_void_p, c_int64, c_int64, c_void_p, *[c_int64] * 3, c_void_p)),
    "fastblt_pack": (None, (c_void_p, *[c_int64] * 4, c_void_p)),
    "fastblt_linear_int8": (c_int, (c_void_p, c_int64, c_int64, c_void_p, *[c_int64] * 2, c_void_p)),
    "fastblt_pack_int8": (c_float, (c_void_p, *[c_int64] * 3, c_void_p)),
    "fastblt_hash_embedding": (None, (c_void_p, c_int64, POINTER(structs.Tables), c_void_p)),
    "fastblt_latent_attention": (c_int, (*[c_void_p] * 3, *[c_int64] * 7, c_void_p)),
    "fastblt_paged_attention": (
        c_int, (*[c_void_p] * 3, POINTER(structs.Places), c_void_p, *[c_int64] * 5, c_void_p),
    ),
    "fastblt_stack": (
        c_int,
        (
            POINTER(structs.Module), POINTER(c_void_p), POINTER(structs.Places), POINTER(structs.Latents),
            POINTER(structs.Source), POINTER(structs.Sink), c_int64, c_int64, c_void_p,
        ),
    ),
    "fastblt_pool": (c_int, (POINTER(structs.Pooling), POINTER(structs.Patches), c_int64, c_int64, c_void_p)),
    "fastblt_store_latents": (c_int, (POINTER(structs.Reading), c_void_p, c_int64, c_int64, c_int64)),
    "fastblt_select": (None, (POINTER(structs.Columns), POINTER(structs.Selection), c_int64, c_int64)),
    "fastblt_rough_gumbel": (None, (c_void_p, c_int64, c_void_p)),
    "fastblt_pick": (None, (c_int32, c_float, c_void_p, c_void_p, c_int64, c_void_p)),
    "fastblt_verify": (None, (*[c_void_p] * 3, c_int64, c_int64, c_void_p, c_void_p)),
    "fastblt_read_ids": (None, (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p)),
    "fastblt_write_ids": (None, (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p)),
    "fastblt_multi_step": (
        c_int,
        (POINTER(structs.Part), POINTER(structs.Requests), *_STEPS, POINTER(structs.Rule), c_int64,
         POINTER(structs.Spent)),
    ),
    "fastblt_decoder_steps": (
        c_int, (POINTER(structs.Part), POINTER(structs.Call), *_STEPS, c_int64, POINTER(structs.Spent)),
    ),
    "fastblt_size_of": (c_int64, (ctypes.c_char_p,)),
}  # fmt: skip


class LayoutError(RuntimeError):
    """Python and C do not agree on a struct: structs.py was changed without its header, or the header without it."""


@dataclass(frozen=True)
class _Loaded:
    library: ctypes.CDLL | None
    status: str


_lock = threading.Lock()
_loaded: _Loaded | None = None


def library() -> ctypes.CDLL | None:
    """The library with its functions' types, or None where C code cannot serve. `FASTBLT_NATIVE=0` turns it off.

    The first call compiles and loads; it may take some seconds. Raises LayoutError.
    """
    return (_loaded or _load()).library


def status() -> str:
    """Which code serves the CPU, and why, in words for a log."""
    return (_loaded or _load()).status


def require() -> ctypes.CDLL:
    """`library()` for callers that have asked whether it is there. Raises RuntimeError where it is not."""
    found = library()
    if found is None:
        raise RuntimeError(f"there is no C code here ({status()}): ask `library` first")
    return found


def _load() -> _Loaded:
    global _loaded
    with _lock:
        if _loaded is None:
            if os.environ.get("FASTBLT_NATIVE") == "0":
                _loaded = _Loaded(None, "torch, several times slower than C code, because FASTBLT_NATIVE is 0")
            else:
                found = build.load()
                if found.library is not None:
                    declare(found.library)
                _loaded = _Loaded(found.library, found.status)
            _logger.log(logging.WARNING if _loaded.library is None else logging.INFO, "CPU kernels: %s", _loaded.status)
        return _loaded


def declare(library: ctypes.CDLL) -> None:
    """Give a library's functions their types, and compare the sizes of structs. Raises LayoutError."""
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    for kind in structs.ALL:
        name, size = structs.c_name(kind), ctypes.sizeof(kind)
        actual = library.fastblt_size_of(name.encode())
        if actual != size:
            raise LayoutError(f"struct {name} has {actual} bytes in C and {size} in kernels/cpu/structs.py")
