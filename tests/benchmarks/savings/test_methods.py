from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastblt.benchmarks.cli import app
from fastblt.benchmarks.savings.batches import engine_of
from fastblt.benchmarks.savings.cost_curve import CostCurve
from fastblt.benchmarks.savings.methods import measure
from fastblt.benchmarks.savings.passes import Pass
from fastblt.models.blt import Blt


def test_figures_of_every_method(model: Blt, prompts: list[list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ("blt", "blt-s k4", "blt-s k4 paper", "blt-d-4 a0.7", "blt-dv-4 1step", "blt-dv-4 1step paper")
    result = measure(model, prompts, 40, settings=wanted, budget=0.0)
    rows = result["settings"]
    assert tuple(rows) == wanted
    assert all(name in capsys.readouterr().out for name in ("blt-d-4 a0.7",))
    plain = rows["blt"]
    assert plain["gb_saved"] == plain["gb_paper_saved"] == 0 and plain["decoder_per_byte"] == 1
    assert plain["acceptance"] is None and plain["bytes_a_round"] is None
    assert plain["leading_equal"] == plain["equal_positions"] == 1
    for name in ("blt-s k4", "blt-dv-4 1step"):
        # Near ties aside, which the default mode may break differently.
        assert rows[name]["leading_equal"] > 0.7 and 0 <= rows[name]["acceptance"] <= 1
        assert 1 <= rows[name]["bytes_a_round"] <= 5
        assert rows[f"{name} paper"]["upstream_per_byte"] > rows[name]["upstream_per_byte"]
        assert rows[f"{name} paper"]["gb_paper_saved"] < rows[name]["gb_paper_saved"]
    assert rows["blt-d-4 a0.7"]["upstream_per_byte"] == pytest.approx(0.25)
    assert rows["blt-d-4 a0.7"]["bytes_a_round"] == 4
    latents = result["draft_latent"]
    assert list(latents) == ["blt-s k4", "blt-dv-4 1step"]
    for row in latents.values():
        assert row["difference"] == pytest.approx(row["closed"] - row["forced"])


def test_figures_of_time_add_up(model: Blt, prompts: list[list[int]]) -> None:
    settings = ("blt", "blt-s k4", "blt-s k8", "blt-d-4 a0.7", "blt-dv-4 1step")
    result = measure(model, prompts, 32, settings=settings, batch=2, rounds=2, budget=0.0)
    rows = result["settings"]
    plain = rows["blt"]
    assert plain["time_saved"] == plain["predicted_saved"] == plain["weights_saved"] == 0
    assert plain["bytes"] == 4 * 31 and plain["module_seconds"]["decode"] > 0
    for row in rows.values():
        assert row["weights_saved"] - sum(row["gap"].values()) == pytest.approx(row["time_saved"])
        parts = row["predicted_seconds"] + row["attention_and_cache_seconds"] + row["engine_seconds"]
        assert parts == pytest.approx(row["seconds"])
        # A pass is part of a step.
        assert row["engine_seconds"] > 0 and row["predicted_over_measured"] > 0
    # Every module runs once a byte in BLT but for upstream, so BLT-D reads less.
    assert rows["blt-d-4 a0.7"]["weights_saved"] > 0
    assert len(rows["blt-s k4"]["acceptance_by_position"]) == 4 and "acceptance_by_position" not in plain
    for curve in result["curve"]["seconds"].values():
        assert len(curve) == len(result["curve"]["rows"]) and min(curve) > 0


def test_a_curve_is_a_line_between_its_rows_and_beyond() -> None:
    curve = CostCurve((1, 4, 8), {"decode": (1.0, 4.0, 6.0)})
    predicted = [curve.predict(Pass("decode", rows, 0.0)) for rows in (1, 2, 6, 8, 16)]
    assert predicted == pytest.approx([1.0, 2.0, 5.0, 6.0, 12.0])


def test_passes_inside_a_call_have_a_curve_of_their_own() -> None:
    inside = {"step": {"decode": ((1, 4), (0.5, 2.0))}}
    curve = CostCurve((1, 4, 8), {"decode": (1.0, 4.0, 6.0)}, inside=inside)
    predicted = [curve.predict(Pass("decode", rows, 0.0, "step")) for rows in (1, 2, 4, 8)]
    assert predicted == pytest.approx([0.5, 1.0, 2.0, 6.0])
    assert curve.predict(Pass("decode", 1, 0.0)) == curve.predict(Pass("decode", 1, 0.0, "draft")) == 1.0


def test_a_measured_curve_has_all_kinds_of_passes(model: Blt, prompts: list[list[int]]) -> None:
    engine = engine_of(model, prompts[:2], 12)
    for context in (0, 8):
        curve = CostCurve.measure(engine, 2, budget=0.01, context=context, requests=2)
        assert {"entropies", "encode", "decode", "logits"} == set(curve.inside["step"]) == set(curve.inside["call"])
        assert {"decode", "logits"} <= set(curve.inside["draft"]) and {"decode", "logits"} <= set(
            curve.inside["filter"]
        )
        for kind in curve.inside.values():
            for rows, seconds in kind.values():
                assert rows == tuple(sorted(set(rows))) and len(rows) == len(seconds) and min(seconds) > 0


def test_sampled_methods_share_seeds(model: Blt, prompts: list[list[int]]) -> None:
    rows = measure(model, prompts, 24, temperature=0.8, settings=("blt", "blt-s k8"), budget=0.0)["settings"]
    assert rows["blt-s k8"]["leading_equal"] > 0.7


def test_bench_methods(checkpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "methods.json"
    sizes = ["--num-prompts", "2", "--input-len", "24", "--output-len", "8", "--settings", "blt-s k4", "--batch", "2"]
    answer = CliRunner().invoke(app, ["bench", "methods", "--model", checkpoint, *sizes, "--json", str(file)])
    assert answer.exit_code == 0, answer.output
    result = json.loads(file.read_text())
    assert "time saved" in answer.output and "blt-s k4 paper" in result["batches"]["2"]["settings"]
    assert len(result["checkpoint"]["sha256"]) == 16


def test_outputs_that_the_prompts_pass_gives_cannot_be_timed(model: Blt, prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="longer outputs"):
        measure(model, prompts[:1], 4, settings=("blt", "blt-d-4 1step"), budget=0.0)
