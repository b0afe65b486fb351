"""The operations of the engine, one file for each.

A file documents the operation's mathematics and shapes, has a torch version, and picks the implementation for a
tensor's device. Imports point one way, downwards in this list:

    types, backend, attention, noise    shared by all operations
    cpu/native.py                       compiles and loads the C code
    selection, paged_attention, ...     the operations
    cpu/                                calls that run several operations at once, on a CPU in fp32
    gpu/                                Triton, imported by the first call that needs it
"""
