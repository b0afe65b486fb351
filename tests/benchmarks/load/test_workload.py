from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastblt.benchmarks.load.arrivals import Trace
from fastblt.benchmarks.load.names import Dataset
from fastblt.benchmarks.load.workload import jobs, label_of, parse_decoding, prompts, trace_jobs


@pytest.mark.parametrize("dataset", [Dataset.HELD_OUT, Dataset.SYNTHETIC])
def test_prompts_have_the_length_asked_for_and_a_seed(dataset: Dataset) -> None:
    made = prompts(dataset, 6, 200, seed=1)
    assert [len(text.encode()) for text, _ in made] == [200] * 6
    assert made == prompts(dataset, 6, 200, seed=1) != prompts(dataset, 6, 200, seed=2)


def test_synthetic_prompts_share_beginnings() -> None:
    texts = [text for text, _ in prompts(Dataset.SYNTHETIC, 12, 100, 0, prefix_len=60, prefixes=3)]
    assert Counter(text[:60] for text in texts).most_common() == [(text[:60], 4) for text in texts[:3]]
    assert len(set(texts)) == 12
    with pytest.raises(ValueError, match="leaves nothing"):
        prompts(Dataset.SYNTHETIC, 1, 50, 0, prefix_len=50)


def test_humaneval_and_files(tmp_path: Path) -> None:
    asked = prompts(Dataset.HUMANEVAL, 170, 40, 0)
    assert len(asked) == 170 and asked[0] == asked[164] and all(len(text) <= 40 for text, _ in asked)
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"prompt": "def f", "max_tokens": 3}) + "\n\n" + json.dumps({"prompt": "é"}))
    assert prompts(Dataset.FILE, 3, None, 0, path=lines) == [("def f", 3), ("é", None), ("def f", 3)]
    text = tmp_path / "text.txt"
    text.write_text("line of text\n" * 30)
    assert len(prompts(Dataset.FILE, 1, 100, 0, path=text)[0][0]) == 100
    lines.write_text("no json")
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1"):
        prompts(Dataset.FILE, 1, None, 0, path=lines)
    with pytest.raises(ValueError, match="--dataset-path"):
        prompts(Dataset.FILE, 1, None, 0)


def test_a_mix_of_methods_is_even() -> None:
    bodies = [parse_decoding("blt"), parse_decoding('{"method": "blt-s", "draft_length": 4}')]
    made = jobs([("a", None), ("b", 9)] * 5, 7, bodies, {"temperature": 0.0}, seed=0)
    assert Counter(job.label for job in made) == {"blt": 5, "blt-s draft_length=4": 5}
    assert {job.max_tokens for job in made} == {7, 9} and all(job.extra["temperature"] == 0.0 for job in made)
    assert label_of({}) == ""
    with pytest.raises(ValueError, match="neither a method nor"):
        parse_decoding("{blt")


def test_requests_of_a_trace_have_its_sizes() -> None:
    trace = Trace(np.zeros(3), np.array([10, 500, 70]), np.array([1, 20, 3]), {})
    made = trace_jobs(trace, [{}], {}, seed=0)
    assert [(job.prompt_bytes, job.max_tokens) for job in made] == [(10, 1), (500, 20), (70, 3)]
