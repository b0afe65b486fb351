"""The order of the layers: imports point down, without circles, and files stay small enough to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fastblt import _HOMES

ROOT = Path(__file__).resolve().parent.parent

#: The top-level folders that together are the package `fastblt`.
FOLDERS = ("kernels", "models", "server", "deploy", "benchmarks")

#: From the bottom up. A module belongs to the longest name here that it begins with, and imports its own layer or lower
#: ones only.
LAYERS = (
    ("kernels",),
    ("models",),
    # What every part of the server shares.
    ("server.request", "server.framing", "server.logs", "server.child_process"),
    ("server.settings",),
    ("server.decoding",),
    ("server.engine",),
    ("server.process",),
    ("server.api",),
    # Offline use, and whatever else has no layer of its own.
    ("server",),
    ("server.cli",),
    ("deploy",),
    ("benchmarks",),
)

#: The engine's rooms, from the bottom up. The files beside them may stand anywhere between, as long as nothing goes in
#: a circle.
ROOMS = (
    ("server.engine.constraints",),
    ("server.engine.cache",),
    ("server.engine.device",),
    ("server.engine.runner",),
    ("server.engine.engine",),
)

MOST_LINES = 400


def modules() -> dict[str, Path]:
    """Every module of the package, without `fastblt.` in front, and its file."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, *, at_load: bool = False) -> set[str]:
    """The modules of ours that a module imports; `at_load` leaves out imports within functions.

    A public name of `fastblt` stands for the module that has it.

    Imports under `if TYPE_CHECKING` are never run and do not count.
    """
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(MODULES[name].read_text("utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            assert node.module is not None
            # What is imported from a package may be one of its modules.
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                home = _HOMES.get(alias.name, "fastblt") if node.module == "fastblt" else node.module
                found.add(inner if inner.removeprefix("fastblt.") in MODULES else home)
        todo += ast.iter_child_nodes(node)
    return {one.removeprefix("fastblt.") for one in found if one.startswith("fastblt.")}


def floor_of(name: str, floors: tuple[tuple[str, ...], ...]) -> int:
    """The number of the floor that a module belongs to; -1 for none."""
    best, number = "", -1
    for at, names in enumerate(floors):
        for prefix in names:
            if (name == prefix or name.startswith(prefix + ".")) and len(prefix) > len(best):
                best, number = prefix, at
    return number


@pytest.mark.parametrize("floors", [LAYERS, ROOMS], ids=["layers", "rooms"])
def test_imports_point_down(floors: tuple[tuple[str, ...], ...]) -> None:
    upward = [
        f"{name} imports {one}"
        for name in MODULES
        for one in sorted(imports(name))
        if floor_of(one, floors) > floor_of(name, floors) >= 0
    ]
    assert upward == []


def circles() -> list[list[str]]:
    """Modules that wait for each other while they load: strongly connected components of more than one."""
    edges = {name: [one for one in imports(name, at_load=True) if one in MODULES and one != name] for name in MODULES}
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for one in edges[name]:
            if one not in order:
                visit(one)
            if one in stack:
                low[name] = min(low[name], low[one])
        if low[name] == order[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in MODULES:
        if name not in order:
            visit(name)
    return found


def test_no_circle_of_imports() -> None:
    assert circles() == []


@pytest.mark.parametrize("name", ["__init__", "__main__"])
def test_the_package_itself_loads_none_of_its_modules(name: str) -> None:
    """It is loaded before every module, so an import of one would be a circle."""
    tree = ast.parse((ROOT / "src" / "fastblt" / f"{name}.py").read_text("utf-8"))
    at_load = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [line for line in at_load if "fastblt" in line] == []


def test_the_bare_folder_names_are_not_imported() -> None:
    """A user's own `models/` must not be found in place of ours."""
    bare = []
    for path in [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "src").glob("*/*.py"))]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            bare += [f"{path.relative_to(ROOT)}: {one}" for one in names if one.split(".")[0] in FOLDERS]
    assert bare == []


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_files_stay_small(folder: str) -> None:
    long = {}
    for pattern in ("*.py", "*.c", "*.h"):
        for path in (ROOT / folder).rglob(pattern):
            if (lines := len(path.read_text("utf-8").splitlines())) > MOST_LINES:
                long[str(path.relative_to(ROOT))] = lines
    assert long == {}
