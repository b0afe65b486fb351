"""structs.py says what the C headers say: every field, its place, its type. A library that differs is refused."""

from __future__ import annotations

import ctypes
import re

import pytest

from fastblt.kernels.cpu import build, decoder_steps, native, structs
from fastblt.kernels.cpu.native import LayoutError, library

HEADERS = "\n".join(path.read_text() for path in sorted(build.SOURCES.glob("*.h")))
#: What stands for a C type in a struct; pointers are checked apart.
NUMBERS = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double}


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def fields_in_c(name: str) -> list[tuple[str, str, bool, int]]:
    """Of each field the name, the type's name, whether it is a pointer, and its length if it is an array (else 1)."""
    found = re.search(rf"struct {name} \{{(.*?)\n\}};", without_comments(HEADERS), re.DOTALL)
    assert found, f"there is no struct {name}"
    fields = []
    for line in found[1].replace("const ", "").split(";")[:-1]:
        kind, rest = re.fullmatch(r"\s*((?:struct )?\w+)\s+(.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]
        for one in rest.split(","):
            pointer, field, length = re.fullmatch(r"\s*([*\s]*(?:const)?)\s*(\w+)(?:\[(.*)\])?\s*", one).groups()  # type: ignore[union-attr]
            fields.append((field, kind.removeprefix("struct "), "*" in pointer, length))
    return fields


@pytest.mark.parametrize("kind", structs.ALL, ids=structs.c_name)
def test_fields_are_those_of_the_header(kind: type[ctypes.Structure]) -> None:
    lengths = {"MODULES + 1": 4, "BESIDE": 3}
    in_c = fields_in_c(structs.c_name(kind))
    assert [field for field, *_ in in_c] == [name for name, _ in kind._fields_]
    known = {structs.c_name(other): other for other in structs.ALL}
    for (field, named, pointer, length), (_, mirrored) in zip(in_c, kind._fields_, strict=True):  # type: ignore[misc]
        if pointer:
            expected = known.get(named)
            assert mirrored is ctypes.c_void_p or mirrored._type_ in (expected, ctypes.c_void_p), field
        elif length:
            assert mirrored is NUMBERS[named] * lengths[length], field
        else:
            assert mirrored is (known.get(named) or NUMBERS[named]), field


def test_the_columns_of_decoder_steps_are_those_of_the_header() -> None:
    found = re.search(r"enum \{\s*(OWNERS,.*?)\s*COLUMNS\s*\};", without_comments(HEADERS), re.DOTALL)
    assert found is not None
    names = [name.strip().lower() for name in found[1].split(",") if name.strip()]
    assert names == list(decoder_steps.COLUMNS)


@pytest.mark.skipif(library() is None, reason="no C compiler")
def test_every_function_that_the_library_shows_is_declared_and_none_else() -> None:
    exported = set()
    for source in build.SOURCES.glob("*.c"):
        exported |= set(re.findall(r"^EXPORT \w+ (\w+)\(", source.read_text(), re.MULTILINE))
    assert exported == set(native.PROTOTYPES)


@pytest.mark.skipif(library() is None, reason="no C compiler")
@pytest.mark.parametrize("kind", [structs.Call, structs.Places, structs.Spent], ids=structs.c_name)
def test_a_struct_of_another_size_is_refused(kind: type[ctypes.Structure], monkeypatch: pytest.MonkeyPatch) -> None:
    grown = type(kind.__name__, (ctypes.Structure,), {"_fields_": [*kind._fields_, ("more", ctypes.c_int64)]})
    monkeypatch.setattr(structs, "ALL", tuple(grown if one is kind else one for one in structs.ALL))
    monkeypatch.setattr(native, "_loaded", None)
    with pytest.raises(LayoutError, match=f"struct {structs.c_name(kind)} has"):
        library()


@pytest.mark.skipif(library() is None, reason="no C compiler")
def test_a_struct_that_c_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structs, "ALL", (type("Nobody", (ctypes.Structure,), {"_fields_": []}),))
    monkeypatch.setattr(native, "_loaded", None)
    with pytest.raises(LayoutError, match="struct nobody has -1 bytes"):
        library()
