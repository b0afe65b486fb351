"""Likelihood tasks through lm-evaluation-harness: its own (ARC, PIQA, HellaSwag, MMLU), and files in ARC's format.

The scores are log-probabilities of prompts. They come from the causal head and do not depend on the decoding method.
`largest_difference` compares them with one forward pass of the model for each text, without server and harness.
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

#: The five tasks of the paper (arXiv 2605.08044).
TASKS = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "mmlu")


def local_task(data: Path, folder: Path) -> str:
    """Write a task description for a JSON-lines file in ARC's format to `folder`. Returns the name of the task.

    Prompt, choices and metrics are the harness's own for ARC. Raises ValueError if the file has another format.
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
    # The harness reads YAML, of which JSON is a part.
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
    """The harness's results for tasks on the server at `url`.

    With `local`, only the tasks described in `folder` are known, and nothing is downloaded. Otherwise the harness's own
    are known too. Answers are cached in `folder`, by model. Raises EndpointError, and ImportError without the extra
    `harness`.
    """
    served = asyncio.run(_served(url, target))
    of = hashlib.sha256(json.dumps(vars(served)).encode()).hexdigest()[:12]
    offline = {"HF_HUB_OFFLINE": "1"} if local else {}
    with _environment({"OPENAI_API_KEY": target.api_key or "none", **offline}):
        # These packages read the environment when they are imported.
        import lm_eval
        from lm_eval.tasks import TaskManager

        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": served.name,
                "base_url": f"{url}/v1/completions",
                "tokenizer_backend": "remote",
                # In bytes. The harness's default is too short and would cut prompts.
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
    """A Markdown table: the share of questions whose most likely choice is right, plain and normalized by length."""
    rows = []
    for task, row in results["results"].items():
        cells = [percent(row.get(f"{metric},none"), 2) or "-" for metric in ("acc", "acc_norm")]
        rows.append([task, *cells, str(results.get("n-samples", {}).get(task, {}).get("effective", ""))])
    return markdown.table(("task", "acc %", "acc_norm %", "questions"), rows)


def loglikelihood(model: Blt, context: str, continuation: str) -> float:
    """Log-probability (nats) of a continuation: float64 sums of the model's log-softmax.

    As in the harness, white space at the end of the context counts as part of the continuation.
    """
    bare = context.rstrip()
    ids = with_bos(encode((context + continuation).encode()))
    first = 1 + len(bare.encode())
    with torch.inference_mode():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return float(sum(rows[at - 1][ids[at]] for at in range(first, len(ids))))


def largest_difference(model: Blt, samples: list[dict[str, object]]) -> float:
    """The largest difference (nats) between the harness's log-likelihoods in `samples` and the model's own."""
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
    """Set environment variables for a while: the harness reads its key from there."""
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
