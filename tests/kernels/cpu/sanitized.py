"""The C code under AddressSanitizer and UndefinedBehaviorSanitizer: the kernels' tests, and engines with all methods.

By hand: `make sanitize`, or with pytest's arguments: python -m tests.kernels.cpu.sanitized -k stack

One process compiles the code with both (and without most optimizations, which take a minute there), the next runs
pytest with the sanitizers loaded before Python, which was not built with them. Memory that is never freed is not looked
for: Python and torch have plenty. Whatever is found ends that process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastblt.kernels.cpu import build, native

ROOT = Path(__file__).parents[3]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1")

#: What runs: every C function, alone and within engines.
CASES = (
    *("tests/kernels/cpu/test_dense.py", "tests/kernels/cpu/test_linear.py", "tests/kernels/cpu/test_stack.py"),
    "tests/kernels/cpu/test_team.py",
    *("tests/kernels/cpu/test_upstream.py", "tests/kernels/cpu/test_decoder_steps.py"),
    *("tests/kernels/test_paged_attention.py", "tests/kernels/test_latent_attention.py"),
    *("tests/kernels/test_hash_embedding.py", "tests/kernels/test_request_ids.py", "tests/kernels/test_paged_rows.py"),
    *("tests/kernels/test_verification.py", "tests/kernels/test_selection.py"),
    "tests/kernels/cpu/sanitized_engine.py",
    "tests/server/engine/test_multi_step.py::test_many_bytes_a_call_are_those_of_single_calls",
    "tests/server/engine/test_decoder_steps.py::test_all_steps_in_a_call_are_those_of_single_passes",
)
#: Without torch's versions, in which there is nothing to find, and without statistics of many draws.
CHOSEN = "not torch and not distribution"


def use_sanitizers() -> None:
    """Have this process compile and load the code with the sanitizers."""
    build.FLAGS = (*SANITIZERS, "-O1", *(flag for flag in build.FLAGS if flag != "-O3"))
    build.LINK_FLAGS = (*SANITIZERS, *build.LINK_FLAGS)


def environment() -> dict[str, str]:
    """That of a process that may load such code. Raises CompilerError where the compiler has no sanitizers."""
    preloaded = []
    # The C++ library beside them: they look up what they replace of it when they are loaded.
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [*build.compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if path == name:
            raise build.CompilerError(f"the compiler has no {name}")
        preloaded.append(path)
    return os.environ | {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "FASTBLT_SANITIZED": "1",
    }


def compile_all(sources: Path, folder: Path) -> Path:
    """The library of these sources in a folder. The compiler itself would be slow under the sanitizers."""
    made = build.Build(build.compiler(), sources)
    made.into(folder)
    return folder / made.name


def main(arguments: list[str]) -> int:
    use_sanitizers()
    if "FASTBLT_SANITIZED" in os.environ:
        print("CPU kernels:", native.status())
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", CHOSEN]
        return int(native.library() is None or pytest.main([*options, *CASES, *arguments]))
    folder = next(build.folders())
    build.prepare(folder)
    compile_all(build.SOURCES, folder)
    command = [sys.executable, "-m", "tests.kernels.cpu.sanitized", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
