"""Every formula of docs/methods.md, computed from what the engine counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Ledger, Request, SamplingParams, Unmasking
from fastblt.server.settings import PRETRAINED
from tests.docs.pages import ROOT
from tests.server.harness import run, settings

PAGE = (Path(ROOT) / "docs" / "methods.md").read_text()
LENGTH = 96
PROMPT = [1, *(byte + 4 for byte in b"def mean(values):\n    total = 0\n    for value in values:\n")]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load_checkpoint(str(PRETRAINED)), settings(max_model_len=1024, max_pass_rows=512, prefix_cache=False))


def counted(engine: Engine, temperature: float = 0.8, **decoding: object) -> Ledger:
    """What the engine counted for one request, without the prompt's passes."""
    params = SamplingParams(
        max_tokens=LENGTH,
        temperature=temperature,
        seed=7,
        ignore_eos=True,
        decoding=DecodingParams(**decoding),  # type: ignore[arg-type]
    )
    [done] = run(engine, [Request("r", PROMPT, params, 0.0)]).values()
    ledger = done.ledger
    assert ledger.bytes == LENGTH
    ledger.decoder -= 1
    return ledger


def last(ledger: Ledger) -> int:
    """Bytes that belong to no round: the prompt's pass gives the first, and the last may need no draft."""
    left = LENGTH - 1 - ledger.accepted - ledger.rounds
    assert left in (0, 1)
    return left


def test_blt_has_a_decoder_pass_a_byte_and_an_upstream_pass_a_patch(engine: Engine) -> None:
    assert "| BLT | 1 | 1 where a patch closes | 1 |" in PAGE
    ledger = counted(engine, method=DecodingMethod.BLT)
    assert ledger.decoder == LENGTH - 1
    # One more for the prompt; of the last byte's patch nobody knows whether it closes.
    assert 0 <= ledger.global_ - ledger.patches <= 1


@pytest.mark.parametrize("k", [1, 4, 16])
def test_blt_s(engine: Engine, k: int) -> None:
    """k + 1 decoder passes a round, of which a + 1 bytes come; a shorter draft at the end."""
    assert "| BLT-S | k + 1 | 1 | a + 1 |" in PAGE and "BLT-S     decoder passes = drafted + rounds\n" in PAGE
    ledger = counted(engine, method=DecodingMethod.BLT_S, draft_length=k)
    assert ledger.decoder == ledger.drafted + ledger.rounds + last(ledger)
    assert k * (ledger.rounds - 1) < ledger.drafted <= k * ledger.rounds
    upstream = ledger.global_ - 1
    assert upstream <= ledger.rounds + last(ledger)
    if k == 16:
        assert "nearly always the case with long drafts" in PAGE and upstream >= 0.8 * ledger.rounds


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("steps", [1, 3])
def test_blt_dv(engine: Engine, block: int, steps: int) -> None:
    """s steps and a verification a round."""
    assert "| BLT-DV | s + 1 | 1 | a + 1 |" in PAGE
    rule: dict[str, object] = {"unmasking": Unmasking.ONE_STEP}
    if steps > 1:
        rule = {"unmasking": Unmasking.CONFIDENCE, "confidence_threshold": 0.9, "max_steps": steps}
    ledger = counted(engine, method=DecodingMethod.BLT_DV, block_size=block, **rule)
    assert ledger.rounds <= ledger.steps <= steps * ledger.rounds and (steps == 1 or ledger.steps > ledger.rounds)
    assert ledger.decoder == ledger.steps + ledger.rounds + last(ledger)
    assert ledger.global_ - 1 <= ledger.rounds + last(ledger)


@pytest.mark.parametrize("block", [4, 8, 16])
def test_blt_d(engine: Engine, block: int) -> None:
    """s decoder passes and an upstream pass for B bytes."""
    assert "| BLT-D | s | 1 | B |" in PAGE
    rule = {"unmasking": Unmasking.CONFIDENCE, "confidence_threshold": 0.7}
    ledger = counted(engine, method=DecodingMethod.BLT_D, block_size=block, **rule)
    # The prompt's last byte is a row of the first block's pass.
    assert ledger.decoder in (ledger.steps, ledger.steps - 1)
    assert ledger.rounds * block == LENGTH
    assert ledger.global_ <= ledger.rounds + 1


@pytest.mark.parametrize(("k", "block"), [(8, 4), (16, 4), (32, 8), (32, 16)])
def test_blt_dsv_saves_a_decoder_pass_for_every_byte_that_passes(engine: Engine, k: int, block: int) -> None:
    assert "BLT-DSV   decoder passes = drafted - passed + rounds\n" in PAGE
    ledger = counted(engine, method=DecodingMethod.BLT_DSV, draft_length=k, block_size=block)
    assert ledger.passed > 0
    assert ledger.decoder == ledger.drafted - ledger.passed + ledger.rounds + last(ledger)
    # The table's row: a block and its filter for p + 2 bytes each, single rows for the rest, and the verifications.
    assert "Σ (sᵢ + 1) over its blocks, + 1 for each of up to 2 last bytes, + 1" in PAGE
    singles = ledger.drafted - (ledger.passed + 2 * ledger.steps)
    assert ledger.decoder == 2 * ledger.steps + singles + ledger.rounds + last(ledger)
    assert 0 <= singles <= 2 * ledger.rounds


def test_weights_read_a_byte(engine: Engine) -> None:
    """With the sizes of the paper's 1B the formula gives what the engine's own ledger gives with these sizes."""
    assert "(D · decoder passes + U · upstream passes) / bytes" in PAGE
    from fastblt.benchmarks.engine.holding import PAPER_1B

    decoder, upstream = PAPER_1B.decoder / 1e6, (PAPER_1B.encoder + PAPER_1B.global_) / 1e6
    assert f"the paper's 1B: {decoder:.0f} and {upstream:,.0f} million" in PAGE
    plain = counted(engine, 0.0, method=DecodingMethod.BLT)
    saving = counted(engine, 0.0, method=DecodingMethod.BLT_DSV, draft_length=32, block_size=8)
    read = [(decoder * own.decoder + upstream * own.global_) / own.bytes for own in (plain, saving)]
    # BLT-DSV reads the fewest: less than half of BLT's here.
    assert read[1] < 0.5 * read[0]
