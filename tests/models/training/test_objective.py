"""The objective's rules, against a scalar reading of them and against the model's own whole-sequence pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastblt.models.training.attention import TILE
from fastblt.models.training.evaluate import leak_check
from fastblt.models.training.layout import BLOCK_ROWS, Start
from fastblt.models.training.objective import Objective, make_batch
from fastblt.models.vocabulary import MASK_ID
from tests.models.training.toys import LAYOUT, LENGTH, WINDOW, toy_batch, toy_model, toy_sequences, with_ids


def test_visibility_is_that_of_the_definition() -> None:
    """Every pair of rows: clean sees a causal window; a block row sees the window before its start and its block."""
    ids, starts = toy_sequences(3)
    batch = toy_batch(ids, starts, [4, 8, 16])
    mask = Objective(toy_model(), LENGTH).mask(batch).view(3, LENGTH // TILE, TILE + BLOCK_ROWS, -1).numpy()
    for sequence, size in enumerate((4, 8, 16)):
        for tile in range(LENGTH // TILE):
            for row in range(TILE + BLOCK_ROWS):
                seen = mask[sequence, tile, row]
                # Columns are the window before the tile, the tile, and the tile's block rows.
                clean = {int(c) + tile * TILE - WINDOW for c in np.flatnonzero(seen[: WINDOW + TILE])}
                block = set(np.flatnonzero(seen[WINDOW + TILE :]).tolist())
                if row < TILE:
                    place = tile * TILE + row
                    assert clean == {p for p in range(place + 1) if place - p < WINDOW}
                    assert block == set()
                else:
                    start = int(batch["block_start"][sequence, tile, row - TILE])
                    assert clean == {p for p in range(start) if start - p < WINDOW}
                    first = (row - TILE) // size * size
                    assert block == set(range(first, first + size))


def test_clean_rows_are_those_of_the_plain_model() -> None:
    model = toy_model()
    ids, starts = toy_sequences()
    clean, _ = Objective(model, LENGTH).logits(toy_batch(ids, starts, [4, 16]))
    plain = model(torch.from_numpy(ids), torch.from_numpy(starts)).logits
    torch.testing.assert_close(clean, plain, atol=1e-4, rtol=1e-4)


def test_blocks_never_change_clean_rows() -> None:
    model = toy_model()
    objective = Objective(model, LENGTH)
    ids, starts = toy_sequences()
    one, _ = objective.logits(toy_batch(ids, starts, [4, 8], seed=1))
    other, _ = objective.logits(toy_batch(ids, starts, [16, 4], seed=2))
    assert torch.equal(one, other)


def test_no_byte_at_or_after_its_start_reaches_a_block() -> None:
    model = toy_model()
    objective = Objective(model, LENGTH)
    ids, starts = toy_sequences()
    batch = toy_batch(ids, starts, [4, 16])
    _, before = objective.logits(batch)
    changed = ids.copy()
    cut = 150
    changed[:, cut:] = 4 + (changed[:, cut:] - 4 + 1) % 256
    _, after = objective.logits(with_ids(batch, changed))
    unaffected = batch["block_start"] <= cut
    assert torch.equal(before[unaffected], after[unaffected])
    assert not torch.equal(before[~unaffected], after[~unaffected])


def test_a_block_knows_nothing_of_other_blocks() -> None:
    model = toy_model()
    objective = Objective(model, LENGTH)
    ids, starts = toy_sequences(1)
    batch = toy_batch(ids, starts, [8])
    _, before = objective.logits(batch)
    changed = batch["block_input"].clone()
    changed[0, 0, 8:16] = 77
    _, after = objective.logits({**batch, "block_input": changed})
    same = (before == after).all(-1)[0]
    assert not same[0, 8:16].any()
    same[0, 8:16] = True
    assert same.all()


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("kind", Start)
@pytest.mark.parametrize("decoder_input", ["encoder", "embedding"])
def test_training_layout_agrees_with_decoding(size: int, kind: Start, decoder_input: str) -> None:
    ids, starts = toy_sequences()
    leak = leak_check(toy_model(decoder_input=decoder_input), ids, starts, kind, size)
    assert leak.largest < 1e-4
    assert leak.asked > 0


def test_the_leak_check_finds_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that sees one clean byte too many."""
    honest = Objective.mask

    def leaking(self: Objective, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return honest(self, {**batch, "block_start": batch["block_start"] + 1})

    ids, starts = toy_sequences()
    model = toy_model()
    monkeypatch.setattr(Objective, "mask", leaking)
    assert leak_check(model, ids, starts, Start.CLOSED, 8).largest > 1e-2


def test_the_loss_is_the_definition() -> None:
    """Mean next-byte loss, and masked loss over t per block byte that exists."""
    model = toy_model()
    objective = Objective(model, LENGTH, masked_weight=0.5)
    ids, starts = toy_sequences()
    batch = toy_batch(ids, starts, [4, 16], t=0.4)
    with torch.no_grad():
        loss, figures = objective.loss(batch)
        clean, block = objective.logits(batch)
    expected = -torch.log_softmax(clean, -1)[:, :-1].gather(2, batch["ids"][:, 1:, None]).mean()
    nats = -torch.log_softmax(block, -1).gather(3, batch["block_target"][..., None])[..., 0]
    masked = sum(float(nats[at]) / 0.4 for at in map(tuple, batch["block_masked"].nonzero().tolist())) / int(
        batch["block_valid"].sum()
    )
    assert float(loss) == pytest.approx(float(expected) + 0.5 * masked, rel=1e-4)
    assert float(figures["masked"]) == pytest.approx(masked, rel=1e-4)


def test_refined_blocks_show_what_the_model_is_surest_of() -> None:
    """And their loss is that of the bytes still masked."""
    model = toy_model()
    objective = Objective(model, LENGTH)
    ids, starts = toy_sequences()
    layout = replace(LAYOUT, refined_blocks=1.0)
    noise, sizes = np.full(2, 0.5), np.array([4, 8])
    batch = make_batch(ids, starts, noise, sizes, layout, np.random.default_rng(0))
    hidden = {k: v for k, v in batch.items() if k != "block_shown"}
    hidden["block_input"] = torch.full_like(batch["block_input"], MASK_ID)
    with torch.no_grad():
        sure = torch.softmax(objective.logits(hidden)[1], -1).amax(-1)
        objective.logits(batch)
    for sequence, size in enumerate((4, 8)):
        parts = {name: batch[name][sequence].reshape(-1, size) for name in batch if name.startswith("block_")}
        for block, confidence in enumerate(sure[sequence].reshape(-1, size)):
            if not parts["block_valid"][block].all():
                continue
            shown = int(parts["block_shown"][block, 0])
            at = confidence.topk(shown).indices
            inputs, target = parts["block_input"][block], parts["block_target"][block]
            assert torch.equal(inputs[at], target[at])
            masked = inputs == MASK_ID
            assert int(masked.sum()) == size - shown
            assert torch.equal(masked, parts["block_masked"][block])


def test_distilled_blocks_aim_at_the_causal_prediction() -> None:
    """Only blocks masked on purpose do, and nothing of it moves the causal head."""
    model = toy_model()
    ids, starts = toy_sequences()
    batch = toy_batch(ids, starts, [4, 8], t=0.6, full_blocks=0.5)
    share = 0.75
    objective = Objective(model, LENGTH, masked_weight=0.5, distill=share)
    loss, figures = objective.loss(batch)
    clean, block = (logits.detach() for logits in objective.logits(batch))
    total = 0.0
    for at in map(tuple, batch["block_masked"].nonzero().tolist()):
        target, place = int(batch["block_target"][at]), int(batch["block_position"][at])
        own = torch.log_softmax(block[at], -1)
        value = -float(own[target])
        if batch["block_full"][at]:
            taught = torch.softmax(clean[at[0], place - 1], -1)
            value = share * -float((taught * own).sum()) + (1 - share) * value
        total += value * float(batch["block_weight"][at])
    assert float(figures["masked"]) == pytest.approx(total / int(batch["block_valid"].sum()), rel=1e-4)

    def causal_gradient(weight: float) -> torch.Tensor:
        """Of the loss without its masked part, as far as it reaches the logits of clean rows."""
        logits = clean.clone().requires_grad_()
        aimed = Objective(model, LENGTH, weight, share)
        aimed.logits = lambda batch: (logits, block)  # type: ignore[method-assign]
        aimed.loss(batch)[0].backward()
        assert logits.grad is not None
        return logits.grad

    assert torch.equal(causal_gradient(0.0), causal_gradient(1.0))
    assert loss.requires_grad
