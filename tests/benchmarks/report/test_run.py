"""Parts of the full run: what is run, what is not run again, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastblt.benchmarks.machine import machine_limits
from fastblt.benchmarks.report.parts import NEAR_SATURATION, Part, Plan, load_results
from fastblt.benchmarks.report.run import fresh, run_parts


def test_plan_has_every_part_once(tmp_path: Path) -> None:
    names = [part.name for part in Plan("model", tmp_path).parts]
    assert len(names) == len(set(names))
    wanted = {"methods-greedy-b1", "methods-sampled-b32", "methods-1b-b8", "methods-3b-b1", "sweep-auto-c64"}
    assert wanted | {
        "trace-code",
        "trace-conv",
        "peer-transformers",
        "peer-llama-cpp-c1",
        "peer-transformers-serve-c8",
    } < set(names)
    assert not [part for part in Plan("model", None).parts if part.name.startswith("trace")]


def test_traces_are_replayed_near_what_the_server_can_take(tmp_path: Path) -> None:
    plan = Plan("model", tmp_path)
    [part] = [part for part in plan.parts if part.name == "trace-code"]
    arguments = part.command({"trace-code-saturation": {"request_throughput": 2.0}}, "URL")
    assert float(arguments[arguments.index("--trace-rate") + 1]) == pytest.approx(2 * NEAR_SATURATION)
    with pytest.raises(LookupError, match="trace-code-saturation"):
        part.command({}, "URL")


def test_a_part_is_run_once_for_a_checkpoint(checkpoint: str, tmp_path: Path) -> None:
    said: list[str] = []
    plan = Plan(checkpoint, None, quick=True)
    name = "sweep-blt-c1"
    assert run_parts(plan, tmp_path, only=name, say=said.append) == {}
    result = load_results(tmp_path)[name]
    assert result["completed"] == 8 and result["server_command"].startswith("fastblt serve") and "ttfts" not in result
    assert run_parts(plan, tmp_path, only=name, say=said.append) == {}
    assert said[-1] == f"{name}: done before"
    # What another checkpoint gave is no result of this one.
    part = plan.parts[[one.name for one in plan.parts].index(name)]
    assert fresh(part, tmp_path, result["part"]["checkpoint"], plan)
    assert not fresh(part, tmp_path, "another", plan)
    (tmp_path / f"{name}.json").write_text("{")
    assert not fresh(part, tmp_path, result["part"]["checkpoint"], plan)


def test_rounds_are_made_in_turns_and_the_middle_one_is_kept(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([(1.0, 30.0), (2.0, 5.0), (3.0, 10.0), (4.0, 7.0), (5.0, 20.0), (6.0, 6.0)])
    asked: list[str] = []

    def result(arguments: list[str]) -> dict[str, float]:
        asked.append(arguments[0])
        turn, rate = next(rates)
        return {"turn": turn, "output_byte_throughput": rate}

    def part(name: str, rounds: int) -> Part:
        return Part(name, lambda _earlier, _url: [name], rounds=rounds)

    monkeypatch.setattr("fastblt.benchmarks.report.run._result", result)
    plan = Plan(checkpoint, None)
    plan.parts = [part("one", 3), part("two", 2), part("three", 1)]
    assert run_parts(plan, tmp_path, say=lambda _text: None) == {}
    assert asked == ["one", "two", "three", "one", "two", "one"]
    found = load_results(tmp_path)
    assert found["one"]["turn"] == 4.0 and found["one"]["output_byte_throughputs"] == [30.0, 7.0, 6.0]
    assert found["two"]["output_byte_throughput"] == 20.0 and "output_byte_throughputs" not in found["three"]
    # Fewer rounds than asked for are no result of this run.
    assert not fresh(part("one", 5), tmp_path, found["one"]["part"]["checkpoint"], plan)


def test_what_cannot_run_is_said(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastblt.benchmarks.report.parts.find_spec", lambda _name: None)
    left = run_parts(Plan(checkpoint, None), tmp_path, only="peer-llama", say=lambda _text: None)
    assert all("llama_cpp" in reason for reason in left.values()) and len(left) == 2


def test_a_check_that_fails_says_which_criteria(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = '{"criteria": {"memory": true, "throughput": false, "no 5xx": false}}'
    program = f"import pathlib, sys\npathlib.Path(sys.argv[-1]).write_text('{report}')\nsys.exit(1)\n"
    (tmp_path / "failing_check.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plan = Plan(checkpoint, None)
    plan.parts = [Part("failing", lambda _earlier, _url: ["failing_check"])]
    left = run_parts(plan, tmp_path / "results", say=lambda _text: None)
    assert left == {"failing": "these criteria did not hold: throughput, no 5xx"}


def test_results_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("sweep-blt-c16", "methods-greedy-b32", "sweep-blt-c2", "methods-greedy-b8", "methods-1b-b1"):
        (tmp_path / f"{name}.json").write_text("{}")
    wanted = ["methods-1b-b1", "methods-greedy-b8", "methods-greedy-b32", "sweep-blt-c2", "sweep-blt-c16"]
    assert list(load_results(tmp_path)) == wanted


def test_limits_of_the_machine_are_sane() -> None:
    limits = machine_limits(1)
    assert 0.1 < limits["read_gb_s"] < 2000 and 0.1 < limits["gflop_s"] < 1e6


def test_random_token_model_has_the_size_asked_for(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from fastblt.benchmarks.report.peers import write_gguf

    about = write_gguf(tmp_path / "m.gguf", 5_000_000)
    read = gguf.GGUFReader(tmp_path / "m.gguf")
    assert sum(int(tensor.n_elements) for tensor in read.tensors) == about["weights"]
    assert about["weights"] == pytest.approx(5_000_000, rel=0.1) and 2 < about["bytes_per_token"] < 6
