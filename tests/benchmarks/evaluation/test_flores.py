"""Translation with a SentencePiece model that is trained here: sacrebleu's own cannot be downloaded everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sacrebleu.tokenizers.tokenizer_spm as spm
from typer.testing import CliRunner

from fastblt.benchmarks.cli import app
from fastblt.benchmarks.evaluation.flores import PIECES, Pair, bleu, jobs, read

FRENCH = ["Le chat dort.", "Il pleut beaucoup aujourd'hui.", "Où est la gare ?", "Merci !", "Je lis un livre.", "Oui."]
ENGLISH = ["The cat sleeps.", "It rains a lot today.", "Where is the station?", "Thank you!", "I read a book.", "Yes."]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    for name, lines in (("fra", FRENCH), ("eng", ENGLISH)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    return tmp_path / "fra", tmp_path / "eng"


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that sacrebleu looks for models in, with a model under the name of that of flores101."""
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("\n".join(ENGLISH * 20))
    model = tmp_path / "models" / PIECES["flores101"]
    model.parent.mkdir()
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_writer=file, vocab_size=60, hard_vocab_limit=False, minloglevel=2
        )
    monkeypatch.setattr(spm, "SACREBLEU_DIR", str(tmp_path))
    return model


def test_files(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert read(*files) == [Pair(one, other) for one, other in zip(FRENCH, ENGLISH, strict=True)]
    (tmp_path / "short").write_text("a\n")
    (tmp_path / "nothing").write_text("")
    # A sentence may have what Python takes for the end of a line.
    (tmp_path / "odd").write_text("a\x85b\u2028c\n")
    assert read(tmp_path / "short", tmp_path / "odd") == [Pair("a", "a\x85b\u2028c".strip())]
    for name in ("short", "nothing"):
        with pytest.raises(ValueError, match="same number"):
            read(files[0], tmp_path / name)


def test_four_shots(files: tuple[Path, Path]) -> None:
    pairs = read(*files)
    [job, _] = jobs(pairs, pairs[4:], ("French", "English"))
    assert isinstance(job.prompt, str) and job.prompt.startswith("French: Le chat dort.\nEnglish: The cat sleeps.\n\n")
    assert job.prompt.endswith("English: Thank you!\n\nFrench: Je lis un livre.\nEnglish:") and job.body["stop"] == [
        "\n"
    ]
    with pytest.raises(ValueError, match="4 are needed"):
        jobs(pairs[:3], pairs, ("French", "English"))


def test_spbleu_counts_pieces(pieces: Path) -> None:
    import sacrebleu
    import sentencepiece

    assert bleu(ENGLISH, ENGLISH)["bleu"] == pytest.approx(100)
    written = ["The cat sleeps.", "It snows a lot.", "Where is the train?", "Thanks!", "I read books.", "No."]
    row = bleu(written, ENGLISH)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    split = [[" ".join(processor.encode(line, out_type=str)) for line in lines] for lines in (written, ENGLISH)]
    assert row["bleu"] == pytest.approx(sacrebleu.corpus_bleu(split[0], [split[1]], tokenize="none", force=True).score)
    assert row["is_spbleu"] and "tok:flores101" in row["signature"] and 0 < row["chrf++"] < 100
    assert not bleu(written, ENGLISH, "13a")["is_spbleu"]


def test_without_the_model_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spm, "SACREBLEU_DIR", str(tmp_path))
    # Nobody listens there.
    monkeypatch.setitem(spm.SPM_MODELS["flores101"], "url", f"http://127.0.0.1:9/{PIECES['flores101']}")
    with pytest.raises(RuntimeError, match=r"sacrebleu_tokenizer_spm\.model.*no spBLEU"):
        bleu(["a"], ["a"])


def test_the_command(url: str, files: tuple[Path, Path], pieces: Path, tmp_path: Path) -> None:
    names = [str(file) for file in files]
    options = ["--base-url", url, "--max-tokens", "8", "--limit", "2", "--output", str(tmp_path), "--setting", "blt"]
    command = ["eval", "flores", "--examples", *names, "--test", *names, *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "flores.json").read_text())["settings"]["blt"]
    assert found["completions"] == 2 and found["is_spbleu"] and 0 <= found["bleu"] < 50
    # Answers that are there already, as a good translator would have given them.
    head, *records = map(json.loads, (tmp_path / "flores-answers.jsonl").read_text().splitlines())
    for record, text in zip(sorted(records, key=lambda r: r["key"]), ENGLISH, strict=False):
        record["text"] = f" {text}"
    (tmp_path / "flores-answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (head, *records)))
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and "| blt | 100.00 | 100.00 |" in again.output
