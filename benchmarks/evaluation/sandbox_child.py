"""Runs one program with as few rights as the system allows. `sandbox.py` starts it as a script.

Standard input has a line of JSON, then the program. Standard output gets one line: the token if the program ran to its
end, or what ended it. It imports only the standard library, since it runs without site packages.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import sys
from typing import Any

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_MODE_FILTER = 2


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def main() -> None:
    settings = json.loads(sys.stdin.buffer.readline())
    source = sys.stdin.buffer.read()
    answer = _hide_files()
    _limit(settings["limits"])
    if settings["uid"] is not None:
        _reach_library()
        _become(settings["uid"])
    if settings["filter"] is not None:
        _load_filter(base64.b64decode(settings["filter"]))
    os.write(answer, _run(source, settings["token"]).encode("utf-8", "replace")[:500])
    # Exit without running exit handlers that the program may have registered.
    os._exit(0)


def _run(source: bytes, token: str) -> str:
    """Run the program. Returns the token, or the type and message of the exception that ended it."""
    try:
        exec(compile(source, "program", "exec"), {"__name__": "program"})
    except BaseException as error:
        try:
            return f"{type(error).__name__}: {error}"
        except BaseException:
            return "an error that cannot be printed"
    return token


def _hide_files() -> int:
    """Give the program /dev/null for the standard streams. Returns the descriptor of the real output."""
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    return answer


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def _reach_library() -> None:
    """Open the folders of the standard library and import from these descriptors.

    Otherwise another user cannot load modules if the path to them is closed to it, as below root's home folder.
    """
    moved = {}
    for folder in sys.path:
        if os.path.isdir(folder):
            moved[folder] = f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY)}"
    sys.path[:] = moved.values()
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        # Packages that are already loaded have their own search path.
        if isinstance(paths := getattr(module, "__path__", None), list):
            paths[:] = [_moved(path, moved) for path in paths]


def _moved(path: str, folders: dict[str, str]) -> str:
    for folder, there in sorted(folders.items(), key=lambda item: -len(item[0])):
        if path.startswith(folder + os.sep):
            return there + path[len(folder) :]
    return path


def _become(uid: int) -> None:
    """Become the user `uid` for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # Otherwise /proc/self would still belong to root.
    _prctl(_PR_SET_DUMPABLE, 1)


def _load_filter(code: bytes) -> None:
    buffer = ctypes.create_string_buffer(code, len(code))
    # A filter instruction has eight bytes.
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def _prctl(option: int, *arguments: Any) -> None:
    call = ctypes.CDLL(None, use_errno=True).prctl
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if call(option, *values) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")


if __name__ == "__main__":
    main()
