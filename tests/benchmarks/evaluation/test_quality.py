from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fastblt.benchmarks.cli import app
from fastblt.benchmarks.evaluation import paired
from fastblt.benchmarks.evaluation.journal import Record
from fastblt.benchmarks.evaluation.next_lines import Cut, cuts, parses
from fastblt.benchmarks.evaluation.publish import questions
from fastblt.benchmarks.evaluation.quality import judge, speed
from fastblt.benchmarks.prompts import held_out_sources


def answer(text: str) -> Record:
    return {"text": text, "bytes": 8, "decoder_nfe": 4, "gb_paper": 0.002}


def test_cuts_are_places_in_held_out_files() -> None:
    chosen = cuts(60)
    assert chosen == cuts(60) and len({cut.prompt for cut in chosen}) == 60
    files = [source.data.decode("utf-8", "replace") for source in held_out_sources()]
    # Blanks aside, since methods are brought to the left margin.
    files = ["\n".join(map(str.strip, file.splitlines())) for file in files]
    for cut in chosen:
        text = "\n".join(map(str.strip, f"{cut.prompt}{cut.line}".splitlines()))
        assert any(text in file for file in files)
        assert 256 <= len(cut.prompt.encode()) <= 1500 and parses(cut.prompt, cut.line)
        assert cut.line not in cut.others and cut.prompt.endswith("\n") and not cut.prompt[0].isspace()
    with pytest.raises(ValueError, match="ask for fewer"):
        cuts(100_000)


def test_questions_have_the_right_line_at_every_place() -> None:
    chosen = cuts(12)
    rows = questions(chosen)
    assert [row["answerKey"] for row in rows[:5]] == ["A", "B", "C", "D", "A"]
    right = [row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])] for row in rows]
    assert right == [cut.line for cut in chosen if len(cut.others) == 3]
    assert all(len(set(row["choices"]["text"])) == 4 for row in rows)


def test_judging() -> None:
    cut = Cut("def f(x):\n", "    return x", ())
    texts = {"    return x\n    more": 1, "\n\n    return x": 1, "    return x  ": 1, "    return y": 0, "return x": 0}
    for text, right in texts.items():
        assert judge([cut], [answer(text)])["exact_match"] == right, text
    row = judge([cut] * 4, [answer(text) for text in ("    return x", "    for y in x:\n", "    ret urn", "")])
    assert (row["exact_match"], row["parses"], row["parses_strictly"]) == (0.25, 0.5, 0.25)
    assert row["bytes_right"] == (12 + 4 + 7 + 0) / 4
    assert row["decoder_nfe_per_byte"] == 0.5 and row["gb_paper_per_kilobyte"] == pytest.approx(0.25)


def test_intervals_are_of_pairs() -> None:
    """Two settings that fail at the same places differ by nothing; at chance, by as much as half of the places say."""
    places = np.random.default_rng(1).random(1500) < 0.7
    same = paired.share(places.tolist(), places.tolist())
    assert same == {"value": 1.0, "low": 1.0, "high": 1.0}
    shuffled = np.random.default_rng(2).permutation(places)
    found = paired.difference(places.tolist(), shuffled.tolist())
    error = 1.96 * (2 * 0.7 * 0.3 / 1500) ** 0.5
    assert found["value"] == 0.0
    assert found["high"] == pytest.approx(error, rel=0.1) and found["low"] == pytest.approx(-error, rel=0.1)
    fewer = places & (np.arange(1500) % 10 > 0)
    lost = paired.share(fewer.tolist(), places.tolist())
    assert 0.87 < lost["low"] < lost["value"] == pytest.approx(0.9, abs=0.02) and lost["high"] < 0.93


def test_speed_is_of_all_groups_together() -> None:
    group = {"seconds": 1.0, "processor_seconds": 0.5, "answers": [answer("x")] * 4}
    other = {"seconds": 3.0, "processor_seconds": 1.5, "answers": [answer("x")]}
    assert speed([group, other]) == {"bytes_per_second": 10.0, "bytes_per_processor_second": 20.0}
    assert speed([group | {"processor_seconds": None}])["bytes_per_processor_second"] is None


def test_the_command(url: str, tmp_path: Path) -> None:
    options = ["--base-url", url, "--prompts", "4", "--alone", "2", "--bytes", "8", "--output", str(tmp_path)]
    names = ["blt", "blt-s k4", "blt-dv-4 1step", "blt-d-4 a0.7", "blt-d-8 g1.0"]
    chosen = [word for name in names for word in ("--setting", name)]
    result = CliRunner().invoke(app, ["eval", "quality", *options, *chosen])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "quality.json").read_text())
    assert list(found["settings"]) == names and all(f"| {name} |" in result.output for name in names)
    for name, row in found["settings"].items():
        assert row["prompts"] == 4 and row["together"]["bytes_per_second"] > 0 and row["alone"]["bytes_per_second"] > 0
        assert row["together"]["bytes_per_processor_second"] > 0
        if name in ("blt-s k4", "blt-dv-4 1step"):
            assert row["exact_match"] == found["settings"]["blt"]["exact_match"]
    # A pass a byte, and another for the beginnings of prompts.
    assert 1 <= found["settings"]["blt"]["decoder_nfe_per_byte"] < 1.5
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "quality.jsonl").read_text()
    again = CliRunner().invoke(app, ["eval", "quality", *options, *chosen, "--processor-clock"])
    assert "of the other" not in again.output
    compared = CliRunner().invoke(app, ["eval", "quality", *options, *chosen, "--against", str(tmp_path)])
    assert compared.exit_code == 0 and compared.output.count("+0.0 (+0.0 to +0.0)") == len(names), compared.output
    assert found["settings"]["blt-s k4"]["kept"]["value"] in (1.0, 0.0)
    assert again.exit_code == 0 and (tmp_path / "quality.jsonl").read_text() == lines
