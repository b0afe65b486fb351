"""lm-evaluation-harness as it comes, with its remote tokenizer, on tasks from local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.vocabulary import encode
from tests.compat.conftest import KEY, MODEL

pytest.importorskip("lm_eval", reason="in the extra `compat`")

CHOICES = [
    {"question": "2 + 2 =", "choices": ["4", "five", "naïve 👋"], "answer": 0},
    {"question": "The color of the sky is ", "choices": ["blue", "a"], "answer": 0},
    {"question": "", "choices": ["nothing before it", "x"], "answer": 1},
    {"question": "é" * 40, "choices": ["\x7f", "e"], "answer": 1},
]
TEXTS = [{"text": "def f(x):\n    return x\n"}, {"text": "naïve 👋 " * 5}]

TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "local_choices": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
    "local_texts": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ),
    "local_generation": (
        CHOICES,
        {
            "output_type": "generate_until",
            "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n", "Q:"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
}


@pytest.fixture(scope="module")
def results(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        for name, (documents, task) in TASKS.items():
            data = folder / f"{name}.jsonl"
            data.write_text("".join(json.dumps(document) + "\n" for document in documents))
            # JSON is YAML.
            described = {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                **task,
            }
            (folder / f"{name}.yaml").write_text(json.dumps(described))
        evaluated = simple_evaluate(
            model="local-completions",
            model_args={
                "model": MODEL,
                "base_url": f"{url}/v1/completions",
                "tokenizer_backend": "remote",
                "auth_token": KEY,
                "max_length": 2048,
                "num_concurrent": 2,
            },
            batch_size=3,
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    assert evaluated is not None
    return evaluated


@pytest.fixture(scope="module")
def score(checkpoint: str) -> Any:
    """The model's own log-likelihood of a continuation, and whether it is the greedy one."""
    model = load_checkpoint(Path(checkpoint))

    def of(context: bytes, continuation: bytes) -> tuple[float, bool]:
        ids = [1, *encode(context + continuation)]
        with torch.inference_mode():
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        places = range(len(ids) - len(continuation), len(ids))
        greedy = all(float(rows[at - 1][ids[at]]) == float(rows[at - 1].max()) for at in places)
        return sum(float(rows[at - 1][ids[at]]) for at in places), greedy

    return of


def test_loglikelihoods_are_the_model_s(results: dict[str, Any], score: Any) -> None:
    samples = results["samples"]["local_choices"]
    assert len(samples) == len(CHOICES)
    for sample in samples:
        assert len(sample["arguments"]) == len(sample["doc"]["choices"])
        for request, [(value, greedy)] in zip(sample["arguments"], sample["resps"], strict=True):
            context, continuation = request
            # The harness lets spaces at a context's end begin the continuation.
            bare = context.rstrip()
            context, continuation = bare, context[len(bare) :] + continuation
            want, want_greedy = score(context.encode(), continuation.encode())
            assert float(value) == pytest.approx(want, abs=1e-4), request
            assert greedy in (want_greedy, str(want_greedy))
    assert results["results"]["local_choices"]["acc,none"] in [0, 0.25, 0.5, 0.75, 1]


def test_rolling_loglikelihoods_are_the_model_s(results: dict[str, Any], score: Any) -> None:
    samples = results["samples"]["local_texts"]
    assert len(samples) == len(TEXTS)
    for sample in samples:
        [[value]] = sample["resps"]
        value = value[0] if isinstance(value, list | tuple) else value
        want, _ = score(b"", sample["doc"]["text"].encode())
        assert float(value) == pytest.approx(want, abs=1e-4)


def test_generations_end_at_a_stop_or_their_length(results: dict[str, Any]) -> None:
    samples = results["samples"]["local_generation"]
    assert len(samples) == len(CHOICES)
    for sample in samples:
        [[text]] = sample["resps"]
        assert isinstance(text, str) and len(text.encode("utf-8", "ignore")) <= 24 * 3
        assert "\n" not in text and "Q:" not in text
    assert 0 <= results["results"]["local_generation"]["exact_match,none"] <= 1
