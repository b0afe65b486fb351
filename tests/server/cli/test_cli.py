"""The command line, as users run it: in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import typer
from typer.testing import CliRunner

from fastblt.server.cli import app
from fastblt.server.cli.options import parse_size
from tests.server.api.running import save_tiny, until

SMALL = ["--cache-size", "64MiB", "--max-model-len", "4096", "--threads", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(Path(tmp_path_factory.mktemp("tiny")))


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "fastblt", *args]


def environment(**more: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    return inherited | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | more


def run(*args: str, **more: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*args), env=environment(**more), capture_output=True, timeout=120)


class Served:
    """`fastblt serve` in a process, on a free port."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log
        until(lambda: re.search(r"listening on (\S+),", self.log()) or process.poll() is not None, 60)
        found = re.search(r"listening on (\S+),", self.log())
        assert found, self.log()
        self.http = httpx.Client(base_url=found[1], timeout=60)

    def log(self) -> str:
        return self._log.read_text()

    def status(self) -> int:
        return self.http.get("/health").status_code


@contextmanager
def serving(tmp_path: Path, *args: str) -> Iterator[Served]:
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command("serve", *args, "--port", "0"), env=environment(), stdout=output, stderr=output, text=True
        )
    try:
        yield Served(process, log)
    finally:
        process.kill()
        process.wait()


def test_serve_answers_drains_and_exits_with_zero(checkpoint: str, tmp_path: Path) -> None:
    decoding = ("--method", "blt-s", "--draft-length", "3", "--block-size", "5", "--allow-untrained-block-size")
    with serving(tmp_path, checkpoint, *SMALL, "--served-model-name", "mine", *decoding) as served:
        until(lambda: served.status() == 200, 60)
        assert served.http.get("/v1/models").json()["data"][0]["id"] == "mine"
        for asked, runs in (
            ({}, {"draft_length": 3, "paper_accounting": False}),
            ({"draft_length": 4}, {"draft_length": 4, "paper_accounting": False}),
            ({"method": "blt-dv"}, {"block_size": 5, "unmasking": "one_step", "paper_accounting": False}),
        ):
            answer = served.http.post("/v1/completions", json={"prompt": "Hi", "decoding": asked}).json()
            assert answer["efficiency"]["settings"] == runs
        body = {"model": "mine", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        # What ran was finished, to the last event.
        assert rest[-2:] == ["data: [DONE]", ""] and '"finish_reason":"length"' in rest[-4]
        assert served.process.wait(20) == 0
        assert "Traceback" not in served.log()


def test_serve_gives_running_requests_a_bounded_time(checkpoint: str, tmp_path: Path) -> None:
    with serving(tmp_path, checkpoint, *SMALL, "--shutdown-timeout", "0.3") as served:
        until(lambda: served.status() == 200, 60)
        body = {"prompt": "Hi", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGINT)
            rest = list(lines)
        # Cut short, and told so.
        assert rest[-2:] == ["data: [DONE]", ""] and '"finish_reason":"abort"' in rest[-4]
        assert served.process.wait(20) == 0


def test_a_second_signal_ends_at_once(checkpoint: str, tmp_path: Path) -> None:
    with serving(tmp_path, checkpoint, *SMALL) as served:
        until(lambda: served.status() == 200, 60)
        body = {"prompt": "Hi", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            until(lambda: "Shutting down" in served.log())
            served.process.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert served.process.wait(5) == 0
        assert "Traceback" not in served.log()


def test_serve_exits_when_its_engine_dies_if_the_policy_says_so(checkpoint: str, tmp_path: Path) -> None:
    with serving(tmp_path, checkpoint, *SMALL, "--on-engine-failure", "exit") as served:
        until(lambda: served.status() == 200, 60)
        [engine] = children(served.process.pid)
        os.kill(engine, signal.SIGKILL)
        assert served.process.wait(20) == 1
        assert served.log().splitlines()[-1].endswith("the engine process was killed by SIGKILL")


def test_the_engine_goes_when_the_server_is_killed(checkpoint: str, tmp_path: Path) -> None:
    with serving(tmp_path, checkpoint, *SMALL) as served:
        until(lambda: served.status() == 200, 60)
        [engine] = children(served.process.pid)
        served.process.kill()
        until(lambda: not Path(f"/proc/{engine}").exists(), 10)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_serve_says_what_is_wrong_with_a_checkpoint(tmp_path: Path) -> None:
    with serving(tmp_path, str(tmp_path)) as served:
        assert served.process.wait(60) == 1
        last = served.log().splitlines()[-1]
        assert last.startswith("fastblt: cannot serve") and "config.json" in last
        assert "Traceback" not in served.log()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--draft-length", "0"), "fastblt: decoding.draft_length must be at least 1"),
        (("--block-size", "5"), "block_size 5 was not trained; this checkpoint has 4, 8"),
        (("--dtype", "float16", "--block-size", "99"), "decoding.block_size must be"),
    ],
)
def test_serve_says_what_is_wrong_with_its_defaults(checkpoint: str, args: tuple[str, ...], message: str) -> None:
    result = run("serve", checkpoint, *SMALL, "--port", "0", *args)
    assert result.returncode == 1
    assert message in result.stderr.decode() and b"Traceback" not in result.stderr


def test_serve_says_that_a_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", str(port))
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr.decode() and b"Traceback" not in result.stderr


def test_generate_writes_the_bytes_and_keeps_threads_quiet(checkpoint: str) -> None:
    args = ("generate", "Hello", "--model", checkpoint, "--max-tokens", "30", *SMALL, "--ignore-eos")
    result = run(*args, "--stats", OMP_DISPLAY_ENV="true")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) == 30
    # libgomp read it, though the command set it after Python had started.
    assert b"OMP_WAIT_POLICY = 'PASSIVE'" in result.stderr
    assert b"30 bytes in" in result.stderr
    drafted = CliRunner().invoke(app, [*args, "--method", "blt-s", "--draft-length", "4"])
    assert drafted.stdout_bytes == result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "x", "--model", "/nowhere/at/all"], "no such folder"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--block-size", "99"], "decoding.block_size"),
        (["convert", "/nowhere/a", "/nowhere/b", "/nowhere/c"], "no such folder"),
    ],
)
def test_errors_are_one_line(args: list[str], message: str) -> None:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("fastblt: ") and message in result.stderr and result.stderr.count("\n") == 1


def test_an_empty_prompt_is_refused(checkpoint: str) -> None:
    result = CliRunner().invoke(app, ["generate", "", "--model", checkpoint, *SMALL])
    assert result.exit_code == 1 and "the prompt is empty" in result.stderr


@pytest.mark.parametrize(
    "args",
    [["generate", "x", "--method", "magic"], ["serve", "--port", "70000"], ["serve", "--cache-size", "lots"], ["no"]],
)
def test_wrong_usage(args: list[str]) -> None:
    assert CliRunner().invoke(app, args).exit_code == 2


def test_train_gets_its_arguments_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = ModuleType("fastblt.models.training.train")
    module.main = lambda argv: seen.append(list(argv)) or 0  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "fastblt.models.training.train", module)
    assert CliRunner().invoke(app, ["train", "--help", "-x", "1", "name"]).exit_code == 0
    assert seen == [["--help", "-x", "1", "name"]]


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 2**29), ("2GiB", 2**31), ("1.5g", 3 * 2**29), ("10 kb", 10240), ("4096", 4096), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1e9", "GiB", "2 PiB", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size(text)


@pytest.mark.parametrize(
    "module",
    [
        "fastblt",
        "fastblt.server",
        "fastblt.server.request",
        "fastblt.server.settings",
        "fastblt.server.cli",
        "fastblt.server.api.app",
    ],
)
def test_what_answers_at_once_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--shutdown-timeout", "inf"], "shutdown_timeout must be from 0 to"),
        (["--shutdown-timeout", "nan"], "'--shutdown-timeout'"),
        (["--queue-timeout", "1e300"], "queue_timeout must be from 0 to"),
        (["--stall-timeout", "inf"], "stall_timeout must be from 0 to"),
        (["--cache-size", "9" * 20 + "t"], "is no size"),
        (["--cache-size", "99999t"], "cache_bytes must be from 1 to"),
        (["--max-model-len", str(10**30)], "max_model_len must be from 1 to 16777216, not a far larger number"),
        (["--max-running", str(10**12)], "max_running must be from"),
        (["--threads", str(10**9)], "threads must be from 1 to 1024"),
        (["--max-hold-ms", "inf"], "max_hold_ms must be from"),
        (["--patching-threshold", "nan"], "patching_threshold must be from"),
        (["--host", "a" * 100], "cannot listen on"),
        (["--tls-certificate", "/dev/zero", "--tls-key", "/dev/zero"], "/dev/zero is no file"),
    ],
)
def test_numbers_out_of_range_end_in_one_line(options: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["serve", *options, "--port", "0"])
    # Typer draws a frame around its own.
    told = " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert result.exit_code in (1, 2) and named in told, told
    assert result.exception is None or isinstance(result.exception, SystemExit)
