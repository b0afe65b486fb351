"""Builds the Dockerfile without a container engine, in a chroot, and tests the resulting server.

    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm BASE
    python -m fastblt.deploy.image.prove BASE WORK [--build-arg NAME=VALUE] [--copy PATH]

It needs root, on Linux. Every FROM of a Python image becomes a copy of BASE, a plain Debian with Python 3.11. Every RUN
is executed by `/bin/sh -c` in a chroot of its stage, with the environment and user that the Dockerfile sets. Then the
ENTRYPOINT is started as that user, the HEALTHCHECK must succeed, a completion is requested, and SIGTERM must end the
server with status 0. Layers and the image format itself are not tested.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from fastblt.deploy.image.dockerfile import Instruction, expand, read

ROOT = Path(__file__).resolve().parents[2]

#: The PATH that a Python image sets and a plain Debian does not.
_PATH = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"


@dataclass
class Stage:
    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    directory: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def command(self, words: list[str], *, build: bool = False) -> list[str]:
        """The command that runs `words` in this stage. Build arguments are visible only with `build`."""
        values = (self.arguments if build else {}) | self.environment
        given = [f"{name}={value}" for name, value in values.items()]
        script = ["/bin/sh", "-c", f'cd {self.directory} && exec "$@"', "sh", *words]
        return ["chroot", f"--userspec={self.user}", str(self.folder), "env", "-i", *given, *script]

    def path(self, name: str) -> Path:
        return self.folder / os.path.normpath(os.path.join(self.directory, name)).lstrip("/")


class Builder:
    """Builds stages under `work` from copies of `base`.

    `given` are build arguments. `extra` are files of this machine to copy into every base, such as certificates.
    """

    def __init__(self, base: Path, work: Path, given: dict[str, str], extra: list[Path]) -> None:
        self._base, self._work, self._given, self._extra = base, work, given, extra
        self._global: dict[str, str] = {}
        self._stages: dict[str, Stage] = {}
        self._stage: Stage | None = None

    def build(self, text: str) -> Stage:
        """Build all stages; returns the last one.

        Raises CalledProcessError when a step fails, ValueError for an unknown instruction.
        """
        for instruction in read(text):
            began = time.monotonic()
            self._carry_out(instruction)
            print(f"{time.monotonic() - began:7.1f} s  {instruction.name} {instruction.rest[:90]}", flush=True)
        assert self._stage is not None, "there is no FROM"
        return self._stage

    def _carry_out(self, instruction: Instruction) -> None:
        name, stage = instruction.name, self._stage
        if name == "FROM":
            return self._begin(instruction)
        if name == "ARG":
            return self._argue(instruction.rest)
        assert stage is not None, f"{name} before FROM"
        match name:
            case "ENV":
                for word in instruction.words():
                    key, _, value = word.partition("=")
                    stage.environment[key] = expand(value, stage.arguments | stage.environment)
            case "WORKDIR":
                stage.directory = instruction.rest
                path = stage.path(".")
                if not path.exists():
                    path.mkdir(parents=True)
            case "COPY":
                self._copy(stage, instruction)
            case "RUN":
                subprocess.run(stage.command(["/bin/sh", "-c", instruction.rest], build=True), check=True)
            case "USER":
                stage.user = instruction.rest
            case "ENTRYPOINT":
                stage.entrypoint = instruction.words()
            case "HEALTHCHECK":
                stage.health = json.loads(instruction.rest[instruction.rest.index("[") :])
            case "EXPOSE" | "STOPSIGNAL":
                pass
            case _:
                raise ValueError(f"{name} is not known here")

    def _begin(self, instruction: Instruction) -> None:
        source, *rest = expand(instruction.rest, self._global).split()
        name = rest[1] if rest else "last"
        folder = self._work / name
        before = self._stages.get(source)
        _copy_tree(before.folder if before else self._base, folder)
        self._stage = Stage(folder)
        if before:
            self._stage = Stage(
                folder, dict(before.environment), {}, before.directory, before.user, before.entrypoint, before.health
            )
        else:
            self._make_python(folder)
        self._stages[name] = self._stage

    def _make_python(self, folder: Path) -> None:
        """Add what a Python image has and a plain Debian does not, and the `extra` files."""
        link = folder / "usr/local/bin/python"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to("/usr/bin/python3")
        for path in self._extra:
            target = folder / str(path).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target)

    def _argue(self, rest: str) -> None:
        name, has_default, default = rest.partition("=")
        value = self._given.get(name, default if has_default else None)
        if self._stage is None:
            self._global[name] = value or ""
            return
        value = value if value is not None else self._global.get(name)
        if value is not None:
            self._stage.arguments[name] = value

    def _copy(self, stage: Stage, instruction: Instruction) -> None:
        *sources, target = instruction.words()
        if origin := instruction.flags.get("from"):
            for source in sources:
                _copy_tree(self._stages[origin].path(source), stage.path(target))
            return
        for source in sources:
            inside = stage.path(target)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, inside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / source, inside / source if target.endswith("/") else inside)


def try_it(stage: Stage, port: int = 8000) -> None:
    """Start the entrypoint and test it as a user would. Raises AssertionError."""
    with subprocess.Popen(stage.command(stage.entrypoint)) as process:
        try:
            deadline = time.monotonic() + 180
            while subprocess.run(stage.command(stage.health), capture_output=True).returncode != 0:
                assert process.poll() is None, f"the server ended with status {process.returncode}"
                assert time.monotonic() < deadline, "the health check never succeeded"
                time.sleep(1)
            print("the health check succeeds", flush=True)
            body = json.dumps({"prompt": "def add(a, b):\n", "max_tokens": 24, "temperature": 0}).encode()
            kind = {"content-type": "application/json"}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, kind)
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = json.load(response)
            assert answer["usage"]["completion_tokens"] == 24, answer
            print(f"a completion: {answer['choices'][0]['text']!r}", flush=True)
            owners = _owners(process.pid)
            assert owners == {int(stage.user.split(":")[0])} - {0}, f"processes of users {owners}"
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, f"SIGTERM ended it with status {process.returncode}"
    print("SIGTERM ends it with status 0", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path, help="an empty folder for the stages, some gigabytes")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--copy", action="append", default=[], type=Path, help="a path of this machine to have in every base"
    )
    asked = parser.parse_args(arguments)
    given = dict(argument.split("=", 1) for argument in asked.build_arg)
    extra = [Path("/etc/resolv.conf"), Path("/etc/hosts"), Path("/etc/ssl/certs/ca-certificates.crt"), *asked.copy]
    stage = Builder(asked.base, asked.work, given, extra).build((ROOT / "Dockerfile").read_text())
    try_it(stage)


def _owners(pid: int) -> set[int]:
    """The user ids of a process and its descendants."""
    found = {os.stat(f"/proc/{pid}").st_uid}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found |= _owners(int(child))
    return found


def _copy_tree(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", "--reflink=auto", f"{source}/.", str(target)], check=True)


if __name__ == "__main__":
    main()
