"""The package as users have it: built, installed, and run in a folder that has our folders' names for its own code."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest
from hatchling.build import build_sdist, build_wheel

from tests.server.api.running import until

ROOT = Path(__file__).resolve().parents[1]
#: Folders of the checkout that are the package's; of deploy/ only what Ray imports.
FOLDERS = ("models", "kernels", "server", "benchmarks", "deploy/ray")
SMALL = ["--cache-size", "64MiB", "--max-model-len", "1024", "--threads", "1"]


def build(source: Path, target: Path) -> Path:
    """The wheel that pip would make of a tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(source)
        return target / build_wheel(str(target))


def files(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_is_one_package_with_all_its_files(wheel: Path) -> None:
    found = files(wheel)
    assert {re.sub(r"-[\d.]+\.dist-info$", "", name.split("/")[0]) for name in found} == {"fastblt"}
    expected = {"__init__.py", "__main__.py", "deploy/__init__.py"}
    for folder in FOLDERS:
        paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
        expected |= {str(path.relative_to(ROOT)) for path in paths}
    assert {name.removeprefix("fastblt/") for name in found if name.startswith("fastblt/")} == expected
    # Read at run time, each by another part.
    assert {
        "models/pretrained/model.safetensors",
        "kernels/cpu/csrc/stack.c",
        "benchmarks/checks/schemas.json",
    } <= expected


def test_the_wheel_of_the_sdist_is_the_same(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build_sdist(str(tmp_path))) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = (path for path in tmp_path.iterdir() if path.is_dir())
    assert files(build(unpacked, tmp_path)) == files(wheel)


def test_no_import_leaves_the_wheel(wheel: Path) -> None:
    found = files(wheel)
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in found}
    with ZipFile(wheel) as archive:
        trees = {name: ast.parse(archive.read(name)) for name in found if name.endswith(".py")}
    for name, tree in trees.items():
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        assert {one for one in imported if one.split(".")[0] == "fastblt"} <= modules, name


def test_bare_names_are_refused() -> None:
    code = "import benchmarks.cli\nimport deploy\nimport kernels\nfrom models.blt import Blt\nfrom server import llm\n"
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "json", "-"]
    result = subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True)
    assert [found["location"]["row"] for found in json.loads(result.stdout)] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module", params=["wheel", "editable"])
def programs(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an environment has its programs in which we are installed, and else what this one has."""
    folder = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(symlinks=True).create(folder)
    [packages] = folder.glob("lib/*/site-packages")
    # A path in a .pth file is searched; .pth files that lie there, such as our own, are not read.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    what = [str(wheel)] if request.param == "wheel" else ["--editable", str(ROOT)]
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--no-index", "--no-deps", "--no-build-isolation", *what], check=True)
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder: modules and packages of our folders' names, that are not ours to import."""
    for name in ("server", "deploy", "kernels"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the user has a module of this name')\n")
    for name in ("models", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the user has a package of this name')\n")
    return tmp_path


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def run(folder: Path, *command: str | Path) -> str:
    return subprocess.run(
        command, cwd=folder, env=environment(), check=True, stdout=subprocess.PIPE, text=True, timeout=120
    ).stdout


def test_a_program_generates(programs: Path, elsewhere: Path) -> None:
    program = (
        "import fastblt\n"
        "from fastblt import LLM, SamplingParams, DecodingParams\n"
        "params = SamplingParams(max_tokens=8, temperature=0, decoding=DecodingParams('blt-s'))\n"
        "[done] = LLM(max_model_len=256, cache_bytes=2**26).generate('def add(a, b):', params)\n"
        "print(len(done.ids), fastblt.__version__)\n"
    )
    (elsewhere / "program.py").write_text(program)
    count, version = run(elsewhere, programs / "python", "program.py").split()
    assert count == "8" and version[0].isdigit() and "unknown" not in version


def test_the_command_is_a_module_too(programs: Path, elsewhere: Path) -> None:
    text = run(elsewhere, programs / "python", "-m", "fastblt", "--help")
    assert {"serve", "generate", "bench", "eval"} <= set(text.split())


def processes(pid: int) -> Iterator[str]:
    """Command lines of a process's children, and of theirs."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
        yield from processes(int(child))


def test_a_server_and_its_processes(programs: Path, elsewhere: Path) -> None:
    command = [programs / "fastblt", "serve", *SMALL, "--port", "0", "--tensor-parallel-size", "2"]
    with (
        (elsewhere / "log").open("w") as log,
        subprocess.Popen(command, cwd=elsewhere, env=environment(), stderr=log) as process,
    ):
        try:
            read = (elsewhere / "log").read_text
            until(lambda: "ready: " in read() or process.poll() is not None, 90)
            found = re.search(r"http://127\.0\.0\.1:\d+", read())
            assert found and process.poll() is None, read()
            body = {"prompt": "{", "max_tokens": 8, "structured_outputs": {"regex": "[0-9]{4}"}}
            answer = httpx.post(f"{found[0]}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert re.fullmatch("[0-9]{4}", answer.json()["choices"][0]["text"])
            running = " ".join(processes(process.pid))
            for module in ("process.engine_main", "process.grammar_probe", "engine.device.follower"):
                assert f"-m fastblt.server.{module}" in running
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
