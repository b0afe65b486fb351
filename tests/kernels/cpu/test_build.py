"""The cache of compiled code: whole or made anew, shared by processes, safe, and in words whatever happens.

A small library stands for the real one where compiling counts; its compiler is a script that says when it was called.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastblt.kernels.cpu import build, native
from fastblt.kernels.cpu.build import CompilerError, compiler

REAL = shutil.which("cc")

pytestmark = pytest.mark.skipif(REAL is None, reason="no C compiler")


class World:
    """A folder of sources, a compiler, and a user's cache."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sources, self.home, self.temporary = root / "sources", root / "home", root / "temporary"
        for folder in (self.sources, self.home, self.temporary):
            folder.mkdir()
        self.log = root / "calls"
        self.command = root / "compiler"
        self.command.write_text(f'#!/bin/sh\necho "$@" >> {self.log}\nexec {REAL} "$@"\n')
        self.command.chmod(0o755)
        (self.sources / "one.h").write_text("#define ONE 1\n")
        (self.sources / "one.c").write_text('#include "one.h"\nint one(void) { return ONE; }\n'.replace("int", SHOWN))
        (self.sources / "two.c").write_text("int two(void) { return 2; }\n".replace("int", SHOWN, 1))
        monkeypatch.setattr("tempfile.tempdir", str(self.temporary))
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.setenv("CC", str(self.command))
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    @property
    def folder(self) -> Path:
        return self.home / ".cache" / "fastblt" / "native"

    def compiled(self) -> list[str]:
        """The sources that were compiled since the last question."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return sorted(Path(word).name for line in lines for word in line.split() if word.endswith(".c"))

    def library(self) -> Path:
        (found,) = self.folder.glob("*.so")
        return found


SHOWN = '__attribute__((visibility("default"))) int'


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def one_and_two(world: World) -> tuple[int, int]:
    found = build.load(world.sources)
    assert found.library is not None, found.status
    return found.library.one(), found.library.two()


def test_only_what_changed_is_compiled_again(world: World) -> None:
    assert one_and_two(world) == (1, 2)
    assert world.compiled() == ["one.c", "two.c"]
    assert one_and_two(world) == (1, 2)
    assert world.compiled() == []
    (world.sources / "one.h").write_text("#define ONE 11\n")
    assert one_and_two(world) == (11, 2)
    assert world.compiled() == ["one.c"]
    (world.sources / "two.c").write_text("int two(void) { return 22; }\n".replace("int", SHOWN, 1))
    assert one_and_two(world) == (11, 22)
    assert world.compiled() == ["two.c"]


def test_another_compiler_or_flag_makes_another_library(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_and_two(world) == (1, 2)
    monkeypatch.setenv("CC", f"{world.command} -DONLY_THIS")
    world.compiled()
    assert one_and_two(world) == (1, 2)
    assert world.compiled() == ["one.c", "two.c"]
    monkeypatch.setattr(build, "MORE_FLAGS", {"two.c": ("-DONLY_TWO",)})
    assert one_and_two(world) == (1, 2)
    assert world.compiled() == ["two.c"]


@pytest.mark.parametrize("kind", ["*.so", "*.o"])
@pytest.mark.parametrize("left", [0, 1, 31, 32, 33, 400, -1, -4096])
def test_a_file_that_was_cut_short_is_made_anew(world: World, kind: str, left: int) -> None:
    """Mapping it would end the process with SIGBUS, so this would not fail: it would end the tests."""
    assert one_and_two(world) == (1, 2)
    world.compiled()
    if kind == "*.o":
        world.library().unlink()
    cut = sorted(world.folder.glob(kind))[0]
    whole = cut.read_bytes()
    cut.write_bytes(whole[:left])
    # In a process of its own: this one has the library open.
    assert run("print(build.load(sources).library.one())", world) == "1"
    assert cut.read_bytes() == whole
    assert world.compiled() == ([] if kind == "*.so" else ["one.c"])


def test_a_damaged_library_is_made_anew(world: World) -> None:
    assert one_and_two(world) == (1, 2)
    code = bytearray(world.library().read_bytes())
    code[200] ^= 1
    world.library().write_bytes(code)
    assert run("print(build.load(sources).library.two())", world) == "2"


def started(code: str, world: World) -> subprocess.Popen[str]:
    """A process of its own that knows the world's sources."""
    before = (
        f"from pathlib import Path\nfrom fastblt.kernels.cpu import build\nsources = Path({str(world.sources)!r})\n"
    )
    environment = os.environ | {"TMPDIR": str(world.temporary)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", before + code], env=environment, stdout=pipe, stderr=pipe, text=True)


def run(code: str, world: World) -> str:
    """What such a process prints."""
    process = started(code, world)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 0, complained
    return said.strip()


def test_processes_that_start_together_compile_once(world: World) -> None:
    world.command.write_text(world.command.read_text().replace("exec", "sleep 0.5\nexec"))
    code = "found = build.load(sources); print(found.library.one(), found.status)"
    several = [started(code, world) for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in several]
    assert [line[:8] for line in said] == ["1 C code"] * 4
    assert world.compiled() == ["one.c", "two.c"]


def test_without_a_compiler_the_status_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    found = build.load(world.sources)
    assert found.library is None
    assert "torch" in found.status and "no C compiler: no-such-compiler -O2 was not found" in found.status


def test_what_was_compiled_serves_when_the_compiler_has_gone(world: World) -> None:
    assert one_and_two(world) == (1, 2)
    world.command.unlink()
    assert one_and_two(world) == (1, 2)


def test_a_compiler_that_fails_is_quoted(world: World) -> None:
    world.command.write_text("#!/bin/sh\necho 'cc1: no space for it' >&2\nexit 3\n")
    found = build.load(world.sources)
    assert found.library is None and "failed: cc1: no space for it" in found.status


@pytest.mark.parametrize("command", ["echo", "true", "sh -c true"])
def test_what_makes_nothing_is_no_compiler(world: World, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", command)
    found = build.load(world.sources)
    assert found.library is None
    reason = (
        f"because {command if ' ' not in command else 'sh -c true'} is no C compiler: it ended well and made no .o file"
    )
    assert reason in found.status and "cannot be used" not in found.status and "\n" not in found.status


@pytest.mark.parametrize("command", ["false", "/nonexistent", "/tmp", "cat", "sh -c 'exit 7'"])
def test_what_fails_is_named(world: World, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", command)
    found = build.load(world.sources)
    assert found.library is None and command.split()[0] in found.status and "C compiler" in found.status
    assert "\n" not in found.status


def test_a_full_disk_leaves_the_next_folder(world: World) -> None:
    """It is the compiler that cannot write."""
    world.folder.mkdir(parents=True, mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k,mode=700", "none", world.folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        found = build.load(world.sources)
        assert found.library is not None and f"kept in {temporary(world)}" in found.status
        assert f"{world.folder} cannot be used: No space left on device" in found.status
    finally:
        # The library is mapped from elsewhere.
        subprocess.run(["umount", world.folder], check=True)


def test_a_compiler_that_never_ends_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.command.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(build, "PATIENCE", 0.2)
    found = build.load(world.sources)
    assert found.library is None and "timed out" in found.status


def test_a_file_that_cannot_be_run_is_no_compiler(world: World) -> None:
    world.command.chmod(0o644)
    found = build.load(world.sources)
    assert found.library is None and "Permission denied" in found.status


def test_cc_is_a_command_with_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, command in [("ccache gcc", ("ccache", "gcc")), ("'/a b/cc' -m64", ("/a b/cc", "-m64")), ("  ", ("cc",))]:
        monkeypatch.setenv("CC", given)
        assert compiler() == command
    monkeypatch.delenv("CC")
    assert compiler() == ("cc",)
    monkeypatch.setenv("CC", "gcc '")
    with pytest.raises(CompilerError, match="CC is"):
        compiler()
    assert "CC is" in build.load().status


def temporary(world: World) -> Path:
    return world.temporary / f"fastblt-{os.geteuid()}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_leaves_a_temporary_folder(world: World) -> None:
    world.home.chmod(0o500)
    assert one_and_two(world) == (1, 2)
    assert list(temporary(world).glob("*.so"))


def test_a_file_in_the_way_of_the_cache_leaves_a_temporary_folder(world: World) -> None:
    (world.home / ".cache").write_text("")
    found = build.load(world.sources)
    assert found.library is not None and str(temporary(world)) in found.status and ".cache" in found.status
    world.compiled()
    assert one_and_two(world) == (1, 2)
    assert world.compiled() == []


def test_no_home_and_no_entry_leaves_a_temporary_folder(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert one_and_two(world) == (1, 2)
    assert list(temporary(world).glob("*.so"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become a user that nobody knows")
def test_a_user_whom_nobody_knows_and_without_home_has_c_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as outside:
        world = World(Path(outside), monkeypatch)
        Path(outside).chmod(0o777)
        world.temporary.chmod(0o1777)
        code = "import os; os.setgroups([]); os.setgid(61234); os.setuid(61234); del os.environ['HOME']\n"
        code += "found = build.load(sources); print(found.library.one(), found.status)"
        said = run(code, world)
        assert said.startswith("1 C code, compiled now") and said.endswith(f"{world.temporary}/fastblt-61234")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_may_write_to_is_not_used(world: World, mode: int) -> None:
    assert one_and_two(world) == (1, 2)
    world.folder.chmod(mode)
    (world.sources / "one.h").write_text("#define ONE 5\n")
    assert one_and_two(world) == (5, 2)
    assert len(list(world.folder.glob("*.so"))) == 1
    assert list(temporary(world).glob("*.so"))


def test_a_link_in_place_of_the_temporary_folder_is_not_followed(world: World, tmp_path: Path) -> None:
    (world.home / ".cache").write_text("")
    (tmp_path / "theirs").mkdir(mode=0o700)
    temporary(world).symlink_to(tmp_path / "theirs")
    found = build.load(world.sources)
    assert found.library is not None and "kept nowhere" in found.status
    assert not list((tmp_path / "theirs").iterdir()) and list(world.temporary.iterdir()) == [temporary(world)]


def test_a_folder_of_somebody_else_is_not_used(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_and_two(world) == (1, 2)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert build.is_safe(world.folder) == (os.getuid() == 0)  # what is root's is everybody's
    monkeypatch.undo()


def test_what_cannot_be_loaded_is_told_and_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system whose files may not be executed."""
    real = ctypes.CDLL

    def refuses(path: str) -> ctypes.CDLL:
        if path.startswith(str(world.home)):
            raise OSError("failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(ctypes, "CDLL", refuses)
    found = build.load(world.sources)
    assert found.library is not None and "failed to map segment" in found.status
    assert str(temporary(world)) in found.status


def test_the_status_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "_loaded", None)
    with caplog.at_level(logging.INFO, "fastblt.kernels"):
        assert native.library() is not None
        assert native.status().startswith("C code")
    assert [record.getMessage() for record in caplog.records] == [f"CPU kernels: {native.status()}"]


def test_native_code_may_be_turned_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setenv("FASTBLT_NATIVE", "0")
    assert native.library() is None
    assert "FASTBLT_NATIVE is 0" in native.status() and caplog.records[0].levelno == logging.WARNING


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another processor")
@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3", "x86-64-v4", "icelake-server"])
def test_no_processor_meets_a_warning(target: str) -> None:
    # Plain, AVX2, AVX-512, and AVX-512 with products of bytes: what is compiled differs. How functions hand on vectors
    # does not matter: those that do are static.
    for source in sorted(build.SOURCES.glob("*.c")):
        flags = (*build.FLAGS, f"-march={target}", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fsyntax-only")
        done = subprocess.run([*compiler(), *flags, str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", sorted(build.SOURCES.glob("*.c")), ids=lambda path: path.name)
def test_every_source_compiles_without_a_warning(source: Path, tmp_path: Path) -> None:
    flags = (*build.FLAGS, *build.machine_flags(), *build.MORE_FLAGS.get(source.name, ()))
    if source.name in build.WIDE:
        flags += build.wide_flags()
    strict = ("-O1", "-Wall", "-Wextra", "-Werror")
    command = [*compiler(), *flags, *strict, "-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
