"""MBPP, 3-shot: small functions to write from a sentence and their tests, judged by the tests (pass@1).

The data come from a file: `mbpp.jsonl` as published, or the sanitized `.json`. As in MBPP's paper (arXiv 2108.07732),
the examples are tasks 2, 3 and 4, the test set is tasks 11 to 510, and the prompt is the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastblt.benchmarks.evaluation.completions import Job

EXAMPLES = (2, 3, 4)
TEST = range(11, 511)
MAX_TOKENS = 256
_DONE = "\n[DONE]"


@dataclass(frozen=True)
class Problem:
    """A task, the asserts that it must pass, the setup code before them, and a solution."""

    number: int
    text: str
    tests: tuple[str, ...]
    setup: str
    solution: str

    @property
    def name(self) -> str:
        return str(self.number)

    def question(self) -> str:
        tests = "\n".join(self.tests)
        return (
            f"You are an expert Python programmer, and here is your task: {self.text} "
            f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
        )

    def program(self, completion: str) -> str:
        """The program that judges a completion: it passes if it runs to its end without an error."""
        return "\n".join((self.setup, completion, *self.tests)) + "\n"

    def solved(self) -> str:
        """A program that passes."""
        return self.program(self.solution)

    def broken(self) -> str:
        """A program that must fail: the solution returns nothing."""
        return self.program(self.solution.replace("return ", "None  # "))


def read(path: Path) -> list[Problem]:
    """The problems of a file. Raises ValueError if it is in neither of MBPP's formats."""
    text = path.read_text()
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        return [_problem(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not in MBPP's form (JSON lines of task_id, text, code, test_list, test_setup_code, or a JSON "
            f"list of task_id, prompt, code, test_list, test_imports): {type(error).__name__} {error}"
        ) from None


def split(problems: Sequence[Problem], limit: int | None = None) -> tuple[list[Problem], list[Problem]]:
    """The examples, and the test set (at most `limit` problems of it). Raises ValueError if the file lacks either."""
    by_number = {problem.number: problem for problem in problems}
    missing = [number for number in EXAMPLES if number not in by_number]
    test = [problem for problem in problems if problem.number in TEST][:limit]
    if missing or not test:
        lacks = f"tasks {missing}, which are the examples" if missing else "tasks 11 to 510, which are the test set"
        raise ValueError(f"the file lacks {lacks}; give the whole of MBPP")
    return [by_number[number] for number in EXAMPLES], test


def jobs(examples: Sequence[Problem], test: Sequence[Problem], max_tokens: int = MAX_TOKENS) -> list[Job]:
    """Jobs for greedy completions of `test`, after the examples."""
    shots = "".join(f"{example.question()}{example.solution.strip()}{_DONE}\n\n" for example in examples)
    body = {"max_tokens": max_tokens, "temperature": 0, "stop": [_DONE]}
    return [Job(problem.name, shots + problem.question(), body) for problem in test]


def _problem(row: dict[str, Any]) -> Problem:
    setup = row["test_setup_code"] if "test_setup_code" in row else "\n".join(row["test_imports"])
    text = row["text"] if "text" in row else row["prompt"]
    return Problem(int(row["task_id"]), text.strip(), tuple(row["test_list"]), setup, row["code"].replace("\r\n", "\n"))
