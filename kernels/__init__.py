"""The operations of the engine, one a file: each says its mathematics and shapes, has a torch version, and picks what
serves a tensor's device.

Imports point one way:

    types, backend, attention, noise    what all of them share
    cpu/native.py                       the C code, compiled and loaded
    selection, paged_attention, ...     one operation a file
    cpu/                                calls that make several operations at once, on a CPU in fp32
    gpu/                                Triton, imported by the first call that needs it
"""
