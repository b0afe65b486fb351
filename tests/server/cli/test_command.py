"""Help, version, other names of options, and what `generate` writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import fastblt
from fastblt.models.vocabulary import encode
from fastblt.server.cli import app
from fastblt.server.cli.command import VLLM_NAMES
from fastblt.server.cli.written import write
from fastblt.server.request import DecodingMethod, Delta, FinishReason, Ledger, Origin, Round

COMMANDS = ("serve", "generate", "convert", "widen")


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"], env={"FASTBLT_VERSION": "other"})
    assert result.exit_code == 0 and result.stdout == f"fastblt {fastblt.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_and_names_every_option_whole(command: str) -> None:
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).stdout
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for option in get_command(app).commands[command].params:  # type: ignore[attr-defined]
        for name in option.opts:
            assert name.startswith("--") is False or name in text, name


def options(command: str) -> list[Any]:
    found = get_command(app).commands[command].params  # type: ignore[attr-defined]
    return [option for option in found if option.param_type_name == "option"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_its_default(command: str) -> None:
    for option in options(command):
        assert option.help, option.name
        if option.default is None:
            assert "Default: " in option.help, option.name


def test_vllm_s_names_are_taken() -> None:
    ours = {name for option in options("serve") for name in (*option.opts, *option.secondary_opts)}
    assert set(VLLM_NAMES.values()) <= ours and not set(VLLM_NAMES) & ours
    for args in (["--max-num-seqs", "0"], ["--max-num-seqs=0"]):
        result = CliRunner().invoke(app, ["serve", *args])
        assert result.exit_code == 2 and "max-running" in result.output


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('cors-origin = "http://a"', 'cors-origin must be a list: cors-origin = ["http://a"]'),
        ("port = [1]", "port must be one value"),
        ("port = 'x'", "port: "),
        ("log-format = 'xml'", "log-format: "),
    ],
)
def test_a_wrong_value_in_a_file_names_file_and_option(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "fastblt.toml"
    path.write_text(line)
    result = CliRunner().invoke(app, ["serve", "--config", str(path)], env={"COLUMNS": "200"})
    told = " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())
    assert result.exit_code == 2 and "fastblt.toml" in told and words in told


def deltas(text: bytes, origins: list[Origin]) -> list[Delta]:
    """Two deltas of one round each, cut within a character."""
    ids, at = encode(text), len(text) // 2
    rounds = [
        Round(DecodingMethod.BLT_S, start, part, made, [], 0, [], [], patches, 0.1, 1, 1, 1, 1, 0.1, 0.1)
        for start, part, made, patches in ((0, ids[:at], origins[:at], [0]), (at, ids[at:], origins[at:], []))
    ]
    return [
        Delta("r", rounds[0].ids, rounds=[rounds[0]]),
        Delta("r", rounds[1].ids, rounds=[rounds[1]], finish_reason=FinishReason.LENGTH, ledger=Ledger(decoder=3)),
    ]


def test_bytes_are_written_as_they_are(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    text = "naïve\n\xff".encode("latin-1")
    written = write(iter(deltas(text, [Origin.CAUSAL] * len(text))))
    assert capfdbinary.readouterr().out == text
    assert written.bytes == len(text) and written.ledger.decoder == 3


def test_colors_leave_characters_whole(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    text = "aï€ b\n".encode()
    kinds = [Origin.DRAFTED, Origin.BLOCK, Origin.CORRECTED, Origin.CAUSAL, Origin.FILLED]
    write(iter(deltas(text, [kinds[at % 5] for at in range(len(text))])), show=True)
    out, err = capfdbinary.readouterr()
    assert re.sub(rb"\x1b\[[\d;]*m", b"", out) == text
    for character in ("a", "ï", "€", "b"):
        assert b"m" + character.encode() + b"\x1b[0m" in out
    # The first byte begins a patch.
    assert out.startswith(b"\x1b[4;38;2;") and b"accepted" in err
