"""What rounds of a draft tell the controller of `auto` about others of its kind."""

from __future__ import annotations

from fastblt.server.engine.draft_controller import DraftController, Told
from fastblt.server.request import DecodingMethod
from tests.server.engine.test_draft_controller import config, curves


def test_one_round_counts_little_beside_what_others_of_its_kind_showed() -> None:
    controller = DraftController(config(), curves(1e-3, 1e-6))
    one, *others = (draft for draft in controller.drafts if draft.method == DecodingMethod.BLT_S)
    controller._told = {one: Told(1, 1e-2, 0.0, 3e-2)}
    # It took three times what was expected, and one round of a start may.
    assert 1.1 < controller._scale(one) < 1.4
    controller._told |= {draft: Told(10, 1e-2, 0.0, 5e-3) for draft in others}
    assert 0.5 < controller._scale(one) < 1
    assert controller._scale(others[0]) < 0.6
