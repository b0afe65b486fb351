"""Options from flags, the environment and a file."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from fastblt.server.cli import app
from fastblt.server.cli.configuration import read_config, read_keys, show_config

toy = typer.Typer(context_settings={"auto_envvar_prefix": "TOY"})


@toy.callback()
def group() -> None: ...


@toy.command()
def go(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(is_eager=True, callback=read_config)] = None,
    port: int = 1,
    name_of_it: str = "default",
    api_key: Annotated[list[str] | None, typer.Option()] = None,
) -> None:
    show_config(context)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text('port = 2\nname-of-it = "file"\napi_key = ["hush-a", "hush-b"]\n')
    return path


def options(caplog: pytest.LogCaptureFixture, *args: str, **env: str) -> str:
    caplog.set_level(logging.DEBUG)
    result = CliRunner().invoke(toy, ["go", *args], env=env)
    assert result.exit_code == 0, result.output
    return caplog.records[-1].getMessage()


def test_flags_come_before_the_environment_and_that_before_the_file(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert options(caplog) == "options: all as they are by default"
    assert caplog.records[-2].getMessage().startswith("all options: config=None, port=1, name_of_it=default")
    text = options(caplog, "--config", str(file))
    assert "port=2 (file), name_of_it=file (file)" in text
    text = options(caplog, "--config", str(file), TOY_GO_PORT="3")
    assert "port=3 (environment), name_of_it=file (file)" in text
    text = options(caplog, "--config", str(file), "--port", "4", TOY_GO_PORT="3")
    assert "port=4 (commandline)" in text


def test_secrets_are_hidden(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    for args, env in (
        ([], {"TOY_GO_API_KEY": "hush-c"}),
        (["--api-key", "hush-d"], {}),
        (["--config", str(file)], {}),
    ):
        text = options(caplog, *args, **env)
        assert "api_key=***" in text and "hush" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot = 1", "no option 'prot'"),
        ("port = ", "toy.toml"),
        ("[port]\nx = 1", "must not be a table"),
        ("port = 'x'", "integer"),
    ],
)
def test_files_of_no_use_are_usage_errors(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    result = CliRunner().invoke(toy, ["go", "--config", str(file)])
    # A long path is broken over the lines of a box.
    said = re.sub(r"[│\s]", "", result.output)
    assert result.exit_code == 2 and message.replace(" ", "") in said


def test_a_missing_file_is_one_too(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["serve", "--config", str(tmp_path / "none")]).exit_code == 2


def test_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n")
    assert read_keys(["zero"], path) == ("zero", "one", "two")
    assert read_keys(None, None) == ()
    path.write_text("\n")
    for keys, file in (
        (None, path),
        (["a b"], None),
        ([""], None),
        ([" "], None),
        (["a", ""], None),
        (None, tmp_path / "none"),
    ):
        with pytest.raises(typer.BadParameter):
            read_keys(keys, file)


def test_a_key_file_may_explain_itself(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbf# who has which\r\none\r\n\r\n  # retired: old\r\n two\t\r\n")
    assert read_keys(None, path) == ("one", "two")
    for useless in ("# only this\n", "", "one\ntwo words\n", "one\u2028two\n", "a\x00b\n"):
        path.write_text(useless)
        with pytest.raises(typer.BadParameter):
            read_keys(None, path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FASTBLT_SERVE_API_KEY", ""),
        ("FASTBLT_SERVE_API_KEY", " \t"),
        ("FASTBLT_SERVE_API_KEY_FILE", ""),
        ("FASTBLT_SERVE_TLS_CERTIFICATE", ""),
        ("FASTBLT_SERVE_CONFIG", ""),
        ("FASTBLT_API_KEY", "secret"),
        ("FASTBLT_SERVE_API_KEYS", "secret"),
    ],
)
def test_what_was_to_close_a_server_stops_it_where_it_cannot(name: str, value: str) -> None:
    result = CliRunner().invoke(app, ["serve", "nothing", "--port", "0"], env={name: value})
    assert result.exit_code == 2 and name in result.output and "secret" not in result.output


@pytest.mark.parametrize("line", ["api-key = []", 'api-key = ""', 'api-key-file = " "', 'api-key = [""]'])
def test_so_does_a_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "fastblt.toml"
    path.write_text(line)
    result = CliRunner().invoke(app, ["serve", "nothing", "--port", "0", "--config", str(path)])
    assert result.exit_code == 2 and "empty" in result.output


def test_files_without_an_end() -> None:
    """A device is read no further than any file of keys or options is long."""
    with pytest.raises(typer.BadParameter, match="more than 1048576 bytes"):
        read_keys(None, Path("/dev/zero"))
    with pytest.raises(typer.BadParameter, match="more than 1048576 bytes"):
        read_config(typer.Context(typer.main.get_command(app)), Path("/dev/zero"))
