"""Translation, 4-shot, judged by BLEU over SentencePiece pieces (spBLEU). Input files have one sentence on each line.

These may be FLORES-101's own files: `dev` for the examples, `devtest` for the test. The paper (arXiv 2605.08044) gives
no prompt template. This one has a line for each sentence, after the name of its language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastblt.benchmarks.evaluation.completions import Job, complete_all, cost, digest, key
from fastblt.benchmarks.evaluation.endpoint import Target
from fastblt.benchmarks.evaluation.journal import Journal, Record
from fastblt.benchmarks.settings import every_method

SHOTS = 4
MAX_TOKENS = 512
#: sacrebleu's tokenizers with SentencePiece, and the model file of each, in ~/.sacrebleu/models or downloaded.
PIECES = {
    "flores101": "sacrebleu_tokenizer_spm.model",
    "flores200": "flores200sacrebleuspm",
    "spBLEU-1K": "spbleu-1k_tokenizer_spm.model",
}


@dataclass(frozen=True)
class Pair:
    """A sentence and its translation."""

    source: str
    target: str


def read(source: Path, target: Path) -> list[Pair]:
    """The sentence pairs of two files. Raises ValueError if the files are empty or differ in their number of lines."""
    sides = [path.read_text(encoding="utf-8").split("\n") for path in (source, target)]
    for lines in sides:
        if lines[-1] == "":
            lines.pop()
    if len(sides[0]) != len(sides[1]) or not sides[0]:
        raise ValueError(
            f"{source} has {len(sides[0])} lines and {target} {len(sides[1])}; they must have the same number of them"
        )
    return [Pair(one.strip(), other.strip()) for one, other in zip(*sides, strict=True)]


def jobs(
    examples: Sequence[Pair], test: Sequence[Pair], languages: tuple[str, str], max_tokens: int = MAX_TOKENS
) -> list[Job]:
    """Jobs for greedy translations of `test`, after the first four examples. Raises ValueError if there are fewer."""
    if len(examples) < SHOTS:
        raise ValueError(f"{len(examples)} example sentences were given; {SHOTS} are needed")

    def asked(pair: Pair) -> str:
        return f"{languages[0]}: {pair.source}\n{languages[1]}:"

    shots = "".join(f"{asked(pair)} {pair.target}\n\n" for pair in examples[:SHOTS])
    body = {"max_tokens": max_tokens, "temperature": 0, "stop": ["\n"]}
    return [Job(str(number), shots + asked(pair), body) for number, pair in enumerate(test)]


def bleu(written: Sequence[str], wanted: Sequence[str], tokenizer: str = "flores101") -> Record:
    """Corpus BLEU over the tokenizer's pieces, with sacrebleu's signature, and chrF++, which needs no tokenizer.

    Raises RuntimeError if the tokenizer's model is neither present nor can be downloaded.
    """
    from sacrebleu.metrics import BLEU, CHRF

    try:
        metric = BLEU(tokenize=tokenizer)
    # sacrebleu exits the process when a download fails.
    except (OSError, ImportError, SystemExit) as error:
        file = PIECES.get(tokenizer)
        raise RuntimeError(
            f"the tokenizer {tokenizer} is not at hand ({error}). Put {file} into ~/.sacrebleu/models (or models of "
            "the folder that SACREBLEU names), or say --tokenizer 13a or intl: they need no file, but their BLEU is no "
            "spBLEU and does not compare with the paper's"
        ) from error
    score = metric.corpus_score(list(written), [list(wanted)])
    return {
        "bleu": score.score,
        "signature": str(metric.get_signature()),
        "is_spbleu": tokenizer in PIECES,
        "chrf++": CHRF(word_order=2).corpus_score(list(written), [list(wanted)]).score,
    }


async def evaluate(
    target: Target,
    settings: Sequence[str] | None,
    asked: Sequence[Job],
    wanted: Sequence[str],
    tokenizer: str,
    output: Path,
) -> Record:
    """BLEU and cost by setting. Raises EndpointError, JournalError, and RuntimeError without a tokenizer's model."""
    # Fail now if the tokenizer is missing, and not after hours of translation.
    bleu(["a"], ["a"], tokenizer)
    async with target.open() as endpoint:
        served = await endpoint.served()
        settings = list(settings or every_method(served.block_sizes))
        run = {"task": "flores", "model": vars(served), "jobs": digest(asked)}
        journal = Journal(output / "flores-answers.jsonl", run)
        await complete_all(endpoint, journal, settings, asked)
    print(f"| flores | BLEU ({tokenizer}) | chrF++ | bytes/s | decoder NFE | global NFE |\n|{'---|' * 6}")
    rows = {}
    for setting in settings:
        records = [journal.records[key(setting, job.name)] for job in asked]
        row = bleu([record["text"].strip() for record in records], wanted, tokenizer) | cost(records)
        rows[setting] = row
        print(
            f"| {setting} | {row['bleu']:.2f} | {row['chrf++']:.2f} | {row['bytes_per_second']} "
            f"| {row['decoder_nfe']} | {row['global_nfe']} |"
        )
    return {"model": vars(served), "settings": rows}
