"""What there is to learn in the first minutes on a machine with a GPU: `make gpu-check`.

    python3 -m fastblt.benchmarks.gpu.check                    all parts, most information first, 7 minutes at most
    python3 -m fastblt.benchmarks.gpu.check --dry-run          what would be done, and what is missing; takes a second
    python3 -m fastblt.benchmarks.gpu.check --device cpu --shape none --quick    all parts, at toy size

It needs no package index and builds no environment: it runs with the Python that has torch. What that lacks may come
from a folder of wheels (`--wheels`). Every part is a process of its own with a bound on its time, and fails alone. The
results go into one JSON file and one page (`--out`). Nothing but the standard library is imported here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: What the parts import, beside the standard library: without these nothing runs, or some part does not.
NEEDED = ("torch", "numpy", "safetensors", "msgspec", "typer")
OPTIONAL = ("triton", "pytest", "hypothesis", "llguidance", "httpx", "starlette", "uvicorn", "pydantic")


@dataclass(frozen=True)
class Part:
    """A command, and its bound in seconds. `needs`: packages without which it is left out."""

    name: str
    seconds: int
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def parts(device: str, shape: str, dtype: str | None, folder: Path, *, quick: bool) -> list[Part]:
    """All parts, most information first."""
    kind = ("--dtype", dtype) if dtype else ()
    contact = ("-m", "fastblt.benchmarks.gpu.contact", "--device", device, "--shape", shape, *kind)
    small = ("--quick",) if quick else ()
    tests = ("tests/gpu/test_model.py",) if device == "cpu" else ("tests/gpu",)
    return [
        Part(
            "tests", 60 if quick else 150, ("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests),
            ("pytest", "hypothesis", "triton"),
        ),
        Part("engine", 180, (*contact, *small, "--json", str(folder / "engine.json"))),
        Part("auto", 60, (*contact, *small, "--only", "auto", "--json", str(folder / "auto.json"))),
        Part(
            "server", 60, ("-m", "fastblt.benchmarks.gpu.contact", "--device", device, "--only", "server", *small,
            "--json", str(folder / "server.json")), ("starlette", "uvicorn", "pydantic", "httpx"),
        ),
        Part("kernels", 60, ("-m", "fastblt.benchmarks.kernels.run", "gpu"), ("triton", "cuda")),
    ]  # fmt: skip


def missing(names: tuple[str, ...]) -> list[str]:
    """Those of these packages that this Python cannot import."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def has_gpu() -> bool:
    """Asked of the driver, without importing torch."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists()


def plan(given: list[Part], gpu: bool) -> list[tuple[Part, list[str]]]:
    """Each part with what it lacks here."""
    every = set(missing((*NEEDED, *OPTIONAL)))
    return [
        (part, [name for name in (*NEEDED, *part.needs) if name in every or (name == "cuda" and not gpu)])
        for part in given
    ]


def install(wheels: Path, folder: Path) -> None:
    """Unpack wheels from a folder beside the Python that runs; raises CalledProcessError."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    names = missing((*NEEDED, *OPTIONAL))
    subprocess.run([*command, "--target", str(folder), *names], check=True)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


def run(part: Part, seconds: float, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Run a part; what became of it, with the end of what it printed."""
    began, log = time.monotonic(), folder / f"{part.name}.log"
    with log.open("w") as out:
        try:
            code = subprocess.run(
                [sys.executable, *part.command], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
                timeout=min(part.seconds, seconds),
            ).returncode  # fmt: skip
            state = "passed" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            state = "out of time"
    found: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - began, 1)}
    found["end"] = log.read_text(errors="replace").splitlines()[-12:]
    result = folder / f"{part.name}.json"
    if result.exists():
        found["result"] = json.loads(result.read_text())
    return found


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# GPU check", "", "| part | outcome | seconds |", "| --- | --- | --- |"]
    lines += [f"| {name} | {one['state']} | {one['seconds']} |" for name, one in results.items()]
    for name, one in results.items():
        lines += ["", f"## {name}", ""]
        for key, value in one.get("result", {}).items():
            lines += [f"- {key}: `{json.dumps(value, default=str)[:1500]}`"]
        lines += ["```", *one["end"], "```"] if one["end"] else []
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--shape", default="1b", choices=("1b", "3b", "none"))
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what this Python lacks")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--seconds", type=float, default=420.0, help="of all parts together")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--quick", action="store_true", help="smallest sizes")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    gpu = has_gpu()
    site = given.out / "site"
    if given.wheels is not None and not given.dry_run:
        install(given.wheels, site)
    planned = plan(parts(given.device, given.shape, given.dtype, given.out, quick=given.quick), gpu)
    print(f"{sys.executable}, Python {sys.version.split()[0]}; a GPU: {'yes' if gpu else 'no'}")
    for part, lacking in planned:
        note = f" - left out, missing: {', '.join(lacking)}" if lacking else ""
        print(f"{part.name:8} {part.seconds:4} s at most  {' '.join(part.command)}{note}")
    if given.dry_run:
        return 0
    if given.device != "cpu" and not gpu:
        print("gpu-check needs a GPU: try --device cpu --shape none --quick, or --dry-run", file=sys.stderr)
        return 1
    paths = [str(ROOT / "src"), str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if given.device == "cpu":
        environment["FASTBLT_KERNELS"] = "apart"
    results: dict[str, Any] = {}
    end = time.monotonic() + given.seconds
    for part, lacking in planned:
        if lacking:
            results[part.name] = {"state": f"left out: no {', '.join(lacking)}", "seconds": 0.0, "end": []}
            continue
        results[part.name] = run(part, max(end - time.monotonic(), 1.0), environment, given.out)
        print(f"{part.name}: {results[part.name]['state']}, {results[part.name]['seconds']} s", flush=True)
        (given.out / "gpu-check.json").write_text(json.dumps(results, indent=1) + "\n")
        (given.out / "gpu-check.md").write_text(page(results))
    print(f"wrote {given.out / 'gpu-check.json'} and gpu-check.md")
    return int(any("failed" in one["state"] or "time" in one["state"] for one in results.values()))


if __name__ == "__main__":
    sys.exit(main())
