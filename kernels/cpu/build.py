"""Compiles the C files beside this one into a shared library, keeps it for the next start, and loads it.

A kept file is named by a hash of what it was made from: an object file by its source, the headers that it includes,
the flags and the compiler's command; the library by its objects. So only what changed is compiled again. Every kept
file ends with the SHA-256 of what stands before it, where no loader looks: what was cut short or damaged is made anew,
and never mapped.

Files are kept in the user's cache folder, else in a folder of the user's own under the temporary one. Code is loaded
from a folder only if nobody else can have written there.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import re
import shlex
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Tells whoever waits what takes so long (`server/logs.py`).
_progress = logging.getLogger("fastblt.progress")

SOURCES = Path(__file__).resolve().parent / "csrc"
#: Sums are reordered only where the source says so; NaN and infinity survive.
FLAGS = (
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=gnu11",
    "-fvisibility=hidden",
    "-Wall",
)
LINK_FLAGS = ("-shared", "-fopenmp")
#: More flags of single files. Scores are rounded after every operation, as they are by torch.
MORE_FLAGS = {"selection.c": ("-ffp-contract=off",)}
#: Files whose inner loops are written for vectors of any width: they may have all that the processor knows.
WIDE = ("linear.c", "linear_int8.c")
#: What such a file may use, each with all before it: the processor's name of it, and the compiler's flag.
WIDE_FLAGS = (
    {"f16c": "-mf16c"},
    {name: f"-m{name}" for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl")},
    {"avx512_vnni": "-mavx512vnni"},
)
#: Seconds that the compiler has for a file.
PATIENCE = 120

#: Seconds between two words of progress.
_TELL_SECONDS = 5

#: What all files together take, and the compiler's own while it works.
_ROOM = 16 * 2**20

_SEAL = hashlib.sha256().digest_size


class CompilerError(Exception):
    """The C code cannot be compiled here; says why."""


@dataclass(frozen=True)
class Found:
    """The library, None where there is none, and in words what was chosen and why."""

    library: ctypes.CDLL | None
    status: str


def load(sources: Path = SOURCES) -> Found:
    """The library of the C files in a folder, kept or new. Never raises for what the machine lacks."""
    troubles: list[str] = []
    try:
        build = Build(compiler(), sources)
    except CompilerError as error:
        return Found(None, _without(str(error)))
    for folder in folders():
        path = folder / build.name
        if is_safe(folder) and unsealed(path) is not None and (found := _open(path, troubles)) is not None:
            return Found(found, _words(f"C code, compiled earlier, from {path}", troubles))
    for folder in folders():
        try:
            prepare(folder)
            with _only_one(folder):
                began = time.monotonic()
                made = build.into(folder)
                path, seconds = folder / build.name, time.monotonic() - began
        except CompilerError as error:
            if (reason := _full(folder)) is None:
                return Found(None, _without(str(error)))
            troubles.append(f"{folder} cannot be used: {reason}")
            continue
        except OSError as error:
            troubles.append(f"{folder} cannot be used: {error.strerror or error}")
            continue
        if (found := _open(path, troubles)) is not None:
            files = f"{made} files" if made != 1 else "1 file"
            return Found(
                found, _words(f"C code, compiled now ({files} in {seconds:.1f} s), kept in {folder}", troubles)
            )
    return _in_passing(build, troubles)


def _in_passing(build: Build, troubles: list[str]) -> Found:
    """The library from a folder that goes away once it is loaded."""
    try:
        with tempfile.TemporaryDirectory(prefix="fastblt-") as folder:
            build.into(Path(folder))
            found = _open(Path(folder) / build.name, troubles)
    except CompilerError as error:
        return Found(None, _without(str(error)))
    except OSError as error:
        troubles.append(f"no temporary folder can be used: {error.strerror or error}")
        found = None
    if found is None:
        return Found(None, _without("; ".join(troubles)))
    return Found(found, _words("C code, compiled now, kept nowhere", troubles))


def _full(folder: Path) -> str | None:
    """Why a compiler that failed could not write into a folder; None if that was not its trouble."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, _ROOM)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _open(path: Path, troubles: list[str]) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # of another machine, or on a file system whose files may not be executed
        troubles.append(f"{path} cannot be loaded: {error}")
        return None


def _words(chosen: str, troubles: list[str]) -> str:
    return f"{chosen}; {'; '.join(troubles)}" if troubles else chosen


def _without(reason: str) -> str:
    return f"torch, several times slower than C code, because {reason}"


def compiler() -> tuple[str, ...]:
    """The C compiler's command: `CC`, which may have arguments (`ccache gcc`), or cc. Raises CompilerError."""
    given = os.environ.get("CC", "")
    try:
        return tuple(shlex.split(given)) or ("cc",)
    except ValueError as error:
        raise CompilerError(f"CC is {given!r}: {error}") from None


def machine_flags() -> tuple[str, ...]:
    """Flags for what this machine's processor can do."""
    return ("-mavx2", "-mfma") if {"avx2", "fma"} <= _known() else ()


def wide_flags() -> tuple[str, ...]:
    """Further flags of the files in `WIDE`, where `machine_flags` are there."""
    flags: list[str] = []
    for names in WIDE_FLAGS if machine_flags() else ():
        if not names.keys() <= _known():
            break
        flags += names.values()
    return tuple(flags)


@cache
def _known() -> frozenset[str]:
    """What an x86 processor says that it can do."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


def read_with_headers(source: Path) -> bytes:
    """A source and all headers of ours that it includes, in an order that depends on them alone."""
    seen: dict[Path, bytes] = {}

    def visit(path: Path) -> None:
        if path not in seen:
            seen[path] = path.read_bytes()
            for name in re.findall(rb'^#include "(.+)"', seen[path], re.MULTILINE):
                visit(path.parent / name.decode())

    visit(source)
    return b"".join(path.name.encode() + b"\0" + text for path, text in seen.items())


class Build:
    """The library that a compiler's command makes of all C files of a folder."""

    def __init__(self, command: tuple[str, ...], sources: Path) -> None:
        self._command = command
        self._objects: dict[str, tuple[Path, list[str]]] = {}
        for source in sorted(sources.glob("*.c")):
            flags = [*FLAGS, *machine_flags(), *MORE_FLAGS.get(source.name, ())]
            if source.name in WIDE:
                flags += wide_flags()
            key = _hash(read_with_headers(source), *command, *flags, platform.machine())
            self._objects[f"{source.stem}-{key}.o"] = (source, flags)
        #: The library's file name.
        self.name = f"fastblt-{_hash(b'', *LINK_FLAGS, *self._objects)}.so"

    def into(self, folder: Path) -> int:
        """Have the library in a folder; returns how many files were compiled. Raises CompilerError, OSError."""
        if unsealed(folder / self.name) is not None:  # made by another process meanwhile
            return 0
        kept = {name: unsealed(folder / name) for name in self._objects}
        missing = [name for name, code in kept.items() if code is None]
        if missing:
            _progress.info("compiling %d files of C, once for this machine; it may take a minute", len(missing))
        told = time.monotonic()
        with tempfile.TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor(_cores()) as pool:
            compiled = pool.map(lambda name: self._compile(name, Path(scratch)), missing)
            for done, (name, code) in enumerate(zip(missing, compiled, strict=True), 1):
                keep(folder / name, code)
                if time.monotonic() - told >= _TELL_SECONDS:
                    told = time.monotonic()
                    _progress.info("compiled %d of %d files", done, len(missing))
            for name, old in kept.items():
                if old is not None:
                    (Path(scratch) / name).write_bytes(old)
            keep(folder / self.name, self._link(Path(scratch)))
        return len(missing)

    def _compile(self, name: str, scratch: Path) -> bytes:
        source, flags = self._objects[name]
        return self._run(*flags, "-c", str(source), to=scratch / name)

    def _link(self, scratch: Path) -> bytes:
        objects = (str(scratch / name) for name in self._objects)
        return self._run(*LINK_FLAGS, *objects, "-lm", to=scratch / self.name)

    def _run(self, *arguments: str, to: Path) -> bytes:
        """What the compiler makes in the file `to`."""
        command = [*self._command, *arguments, "-o", str(to)]
        # Its own files too go where there is room for the result.
        environment = {**os.environ, "TMPDIR": str(to.parent)}
        try:
            subprocess.run(
                command, check=True, capture_output=True, timeout=PATIENCE, text=True, errors="replace", env=environment
            )
        except FileNotFoundError:
            raise CompilerError(f"there is no C compiler: {shlex.join(self._command)} was not found") from None
        except subprocess.CalledProcessError as error:
            said = " | ".join(error.stderr.strip().splitlines()[:3]) or f"status {error.returncode}"
            raise CompilerError(f"the C compiler {shlex.join(self._command)} failed: {said}") from None
        except (OSError, subprocess.SubprocessError) as error:
            raise CompilerError(f"the C compiler {shlex.join(self._command)} failed: {error}") from None
        try:
            return to.read_bytes()
        except FileNotFoundError:
            raise CompilerError(
                f"{shlex.join(self._command)} is no C compiler: it ended well and made no {to.suffix} file; see CC"
            ) from None


def _hash(code: bytes, *words: str) -> str:
    return hashlib.sha256(code + "\0".join(words).encode()).hexdigest()[:16]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep(path: Path, code: bytes) -> None:
    """Write a file with its seal, whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(code + hashlib.sha256(code).digest())
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def unsealed(path: Path) -> bytes | None:
    """What was kept in a file; None where it is not there, or not as it was written."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    code, seal = whole[:-_SEAL], whole[-_SEAL:]
    return code if code and hashlib.sha256(code).digest() == seal else None


def folders() -> Iterator[Path]:
    """Where the library may be kept, the best first."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        yield Path(given) / "fastblt" / "native"
    else:
        with suppress(RuntimeError):  # a user without HOME and without an entry in the list of users
            yield Path.home() / ".cache" / "fastblt" / "native"
    with suppress(OSError):
        yield Path(tempfile.gettempdir()) / f"fastblt-{os.geteuid()}"


def is_safe(folder: Path) -> bool:
    """Whether a folder is there, and nobody but this user and root can write to it."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    ours = found.st_uid in (os.geteuid(), 0)
    return stat.S_ISDIR(found.st_mode) and ours and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def prepare(folder: Path) -> None:
    """Make a folder that only this user can write to. Raises OSError where that is not so."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_safe(folder):
        raise PermissionError(f"others may write to {folder}")


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Of processes that compile at the same time all but one wait, and find its files."""
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
