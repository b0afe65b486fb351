"""The structs of the C code, field by field as in the headers beside this file, which say what the fields are.

`struct places` is `Places` here, and so on. Sizes are compared when the library is loaded (`native.py`), names and
types by a test (`tests/kernels/cpu/test_structs.py`). What a pointer points to must outlive the struct.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int64, c_void_p
from typing import Any


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Pages(ctypes.Structure):
    """A page table (paged_rows.h)."""

    _fields_ = [("table", c_void_p), *_fields(c_int64, "stride page")]


class Tables(ctypes.Structure):
    """Byte and hash tables (hash_embedding.h)."""

    _fields_ = [
        ("powers", c_void_p),
        *_fields(c_int64, "width count vocab"),
        *_fields(c_void_p, "bytes hashed"),
        *_fields(c_int64, "type size"),
    ]


class Places(ctypes.Structure):
    """Where the rows of a pass stand (paged_attention.h)."""

    _fields_ = [
        *_fields(c_void_p, "turns table rows positions firsts highs"),
        *_fields(c_int64, "window table_stride page"),
    ]


class Packed(ctypes.Structure):
    """Packed weights (dense.h)."""

    _fields_ = [("panels", c_void_p), ("narrow", c_int64)]


class Linear(ctypes.Structure):
    """One of several linear maps of the same rows (dense.h)."""

    _fields_ = [("weights", c_void_p), ("outputs", c_int64), ("out", c_void_p)]


class Columns(ctypes.Structure):
    """What rows are selected by (selection.h)."""

    _fields_ = [
        ("logits", c_void_p),
        ("stride", c_int64),
        *_fields(c_void_p, "temperature top_k top_p min_p seeds positions forbid_eos repetition presence frequency"),
        *_fields(c_void_p, "counts prompt_seen bias allowed"),
    ]


class Selection(ctypes.Structure):
    """Where results of selection go (selection.h)."""

    _fields_ = _fields(c_void_p, "ids logprobs confidences entropies bad")


class Pooling(ctypes.Structure):
    """Weights that pool patches (upstream.h)."""

    _fields_ = [
        *_fields(c_void_p, "projection query_gain queries key_gain keys values out"),
        *_fields(c_float, "query_eps key_eps"),
        *_fields(c_int64, "k size heads kv_heads dim"),
    ]


class Patches(ctypes.Structure):
    """Closed patches (upstream.h)."""

    _fields_ = [("states", c_void_p), ("pages", Pages), *_fields(c_void_p, "owners starts ends")]


class Reader(ctypes.Structure):
    """Weights of one of the decoder's cross-attentions (upstream.h)."""

    _fields_ = [*_fields(c_void_p, "gain keys values"), ("eps", c_float)]


class Reading(ctypes.Structure):
    """Where keys and values of latents go (upstream.h)."""

    _fields_ = [
        ("projection", c_void_p),
        ("readers", POINTER(Reader)),
        *_fields(c_int64, "k size count narrow"),
        *_fields(c_void_p, "slots store"),
    ]


class Layer(ctypes.Structure):
    """Weights of a layer (stack.h)."""

    _fields_ = [
        *_fields(c_void_p, "cross_gain cross_queries cross_out gain queries keys values out inner_gain gate up down"),
        *_fields(c_float, "cross_eps eps inner_eps"),
    ]


class Module(ctypes.Structure):
    """The layers of a module (stack.h)."""

    _fields_ = [("layers", POINTER(Layer)), *_fields(c_int64, "count size inner heads kv_heads dim")]


class Latents(ctypes.Structure):
    """The latents that cross-attentions read (stack.h)."""

    _fields_ = [*_fields(c_void_p, "store slots"), *_fields(c_int64, "slot_size layer_size keys")]


class Source(ctypes.Structure):
    """What rows begin as (stack.h)."""

    _fields_ = [
        *_fields(c_void_p, "block block_table ids"),
        *_fields(c_int64, "stride pad"),
        ("hashed", POINTER(Tables)),
        *_fields(c_void_p, "table states"),
        ("pages", Pages),
    ]


class Sink(ctypes.Structure):
    """What becomes of rows (stack.h)."""

    _fields_ = [
        *_fields(c_void_p, "read gain head entropies states"),
        ("pages", Pages),
        ("vocabulary", c_int64),
        ("eps", c_float),
    ]


class Part(ctypes.Structure):
    """A module over the paged caches of running requests (stack.h)."""

    _fields_ = [
        ("module", POINTER(Module)),
        ("caches", POINTER(c_void_p)),
        ("at", POINTER(Places)),
        ("from", POINTER(Source)),
        ("to", POINTER(Sink)),
    ]


class Spent(ctypes.Structure):
    """What a call of several passes spent (stack.h).

    Seconds as one thread's, in entropy model, encoder and decoder, and altogether; and how many rows the passes beside
    the steps had: first ones encoded, new ones scanned by the entropy model, new ones encoded."""

    _fields_ = [("seconds", c_double * 4), ("rows", c_int64 * 3)]


class Choice(ctypes.Structure):
    """How requests' bytes are chosen (choice.h)."""

    _fields_ = [
        *_fields(c_void_p, "head temperature top_k top_p min_p seeds eos_from texts"),
        *_fields(c_int64, "stride vocabulary eos"),
    ]


class Requests(ctypes.Structure):
    """Requests whose bytes are made row by row (single_rows.h)."""

    _fields_ = [
        *_fields(c_void_p, "owners starts latents limits scans opened fresh made scanned ids entropies bad"),
        *_fields(c_int64, "count most"),
    ]


class Rule(ctypes.Structure):
    """When patches close (single_rows.h)."""

    _fields_ = [("threshold", c_double), *_fields(c_int64, "longest encoder_input")]


class Made(ctypes.Structure):
    """What becomes of blocks and drafts (decoder_steps.h)."""

    _fields_ = [*_fields(c_void_p, "ids fixed steps bad entropies"), *_fields(c_int64, "width longest")]


class Call(ctypes.Structure):
    """A call of decoder steps (decoder_steps.h)."""

    _fields_ = [
        *_fields(c_void_p, "asked bounds allowed chosen accepted lines"),
        *_fields(Made, "made drafts"),
        *_fields(c_int64, "count runs selected mask encoder_input"),
    ]


#: All of them.
ALL: tuple[type[ctypes.Structure], ...] = (
    *(Pages, Tables, Places, Packed, Linear, Columns, Selection, Pooling, Patches, Reader, Reading, Layer, Module),
    *(Latents, Source, Sink, Part, Spent, Choice, Requests, Rule, Made, Call),
)


def c_name(kind: type[ctypes.Structure]) -> str:
    """The name of its C struct."""
    return kind.__name__.lower()
