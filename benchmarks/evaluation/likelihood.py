"""Likelihood tasks through lm-evaluation-harness: its own (ARC, PIQA, HellaSwag, MMLU), and files in ARC's format.

Scores are the causal head's, whatever the decoding method: it is the prompt's log-probabilities that are asked for.
They can be compared with those of one forward pass of the model a text, without a server or a harness.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastblt.benchmarks import markdown
from fastblt.benchmarks.evaluation.endpoint import Endpoint, Served, Target
from fastblt.benchmarks.evaluation.journal import Record
from fastblt.benchmarks.markdown import percent
from fastblt.models.blt import Blt
from fastblt.models.vocabulary import encode, with_bos

#: The paper's five.
TASKS = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "mmlu")


def local_task(data: Path, folder: Path) -> str:
    """Describe a JSON-lines file in ARC's format in `folder`; the name of the task, which is the file's.

    Prompt, choices and metrics are the harness's own for ARC. Raises ValueError where the file has another format.
    """
    import lm_eval
    import yaml

    _check(data)
    template = Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_easy.yaml"
    task = yaml.safe_load(template.read_text())
    for name in ("tag", "dataset_name", "training_split", "validation_split"):
        task.pop(name, None)
    name = f"local_{data.stem}"
    task |= {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
    }
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return name


def run(
    url: str,
    target: Target,
    tasks: Sequence[str],
    folder: Path,
    *,
    local: bool,
    limit: int | None = None,
    samples: bool = False,
) -> Record:
    """The harness's results of tasks at the server at `url`. Where `local` it knows those of `folder` only, and nothing
    is downloaded; else those beside its own.

    What it has asked of a model it keeps in `folder` and does not ask again. Raises EndpointError, and ImportError
    without the extra `harness`.
    """
    served = asyncio.run(_served(url, target))
    of = hashlib.sha256(json.dumps(vars(served)).encode()).hexdigest()[:12]
    offline = {"HF_HUB_OFFLINE": "1"} if local else {}
    with _environment({"OPENAI_API_KEY": target.api_key or "none", **offline}):
        # They read the environment when they are imported.
        import lm_eval
        from lm_eval.tasks import TaskManager

        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": served.name,
                "base_url": f"{url}/v1/completions",
                "tokenizer_backend": "remote",
                # Bytes; the harness's own default would cut prompts.
                "max_length": min(served.max_model_len, 8192),
                "num_concurrent": target.concurrency,
                "max_retries": 5,
            },
            tasks=list(tasks),
            task_manager=TaskManager(include_path=str(folder), include_defaults=not local),
            batch_size=8,
            limit=limit,
            use_cache=str(folder / f"answers of {of}"),
            log_samples=samples,
            bootstrap_iters=1000,
        )
    kept = ("results", "n-shot", "versions", "n-samples", *(["samples"] if samples else []))
    return {"model": vars(served)} | {name: results[name] for name in kept if name in results}


async def _served(url: str, target: Target) -> Served:
    async with Endpoint(url, target.api_key) as endpoint:
        return await endpoint.served()


def table(results: Record) -> str:
    """In Markdown: shares of questions whose likeliest choice is right, plain and by length."""
    rows = []
    for task, row in results["results"].items():
        cells = [percent(row.get(f"{metric},none"), 2) or "-" for metric in ("acc", "acc_norm")]
        rows.append([task, *cells, str(results.get("n-samples", {}).get(task, {}).get("effective", ""))])
    return markdown.table(("task", "acc %", "acc_norm %", "questions"), rows)


def loglikelihood(model: Blt, context: str, continuation: str) -> float:
    """Log-probability (nats) of a continuation, by float64 sums of the model's log-softmax.

    As the harness does, spaces at the end of the context belong to the continuation.
    """
    bare = context.rstrip()
    ids = with_bos(encode((context + continuation).encode()))
    first = 1 + len(bare.encode())
    with torch.inference_mode():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return float(sum(rows[at - 1][ids[at]] for at in range(first, len(ids))))


def largest_difference(model: Blt, samples: list[dict[str, object]]) -> float:
    """Between the harness's log-likelihoods and the model's own, over all choices of its logged samples."""
    worst = 0.0
    for sample in samples:
        for (context, continuation), [(value, _)] in zip(sample["arguments"], sample["resps"], strict=True):  # type: ignore[call-overload]
            worst = max(worst, abs(float(value) - loglikelihood(model, context, continuation)))
    return worst


def _check(data: Path) -> None:
    try:
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        for row in rows:
            row["question"] + "".join(row["choices"]["text"])
            row["choices"]["label"].index(row["answerKey"])
        if not rows:
            raise ValueError("it is empty")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{data} is not in ARC's format, a line of JSON a question: "
            '{"question": "...", "choices": {"text": ["...", "..."], "label": ["A", "B"]}, "answerKey": "A"}: '
            f"{type(error).__name__} {error}"
        ) from None


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """The harness takes its key from the environment."""
    before: dict[str, Any] = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
