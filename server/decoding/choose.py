"""Which method a request gets, with what settings; what cannot be meant is refused here."""

from __future__ import annotations

from models.config import BltConfig
from server.decoding.blt import Blt
from server.decoding.blt_d import BltD
from server.decoding.blt_dv import BltDV
from server.decoding.blt_s import BltS
from server.decoding.method import Method, Unmask
from server.request import DecodingMethod, DecodingParams, EntropyRule, InvalidRequestError, Unmasking

DEFAULT_DRAFT_LENGTH = 8
DEFAULT_CONFIDENCE = 0.7
DEFAULT_ENTROPY = 0.8


def choose_method(decoding: DecodingParams, config: BltConfig) -> Method:
    """The method object of one request. Raises InvalidRequestError where the checkpoint cannot do it."""
    method = decoding.method
    if method in (DecodingMethod.BLT, DecodingMethod.AUTO):
        return Blt()
    if method == DecodingMethod.BLT_S:
        return BltS(decoding.draft_length or DEFAULT_DRAFT_LENGTH, decoding.paper_accounting)
    size = _block_size(decoding, config)
    default = Unmasking.ONE_STEP if method == DecodingMethod.BLT_DV else Unmasking.CONFIDENCE
    unmask = _unmask(decoding, decoding.unmasking or default)
    if method == DecodingMethod.BLT_D:
        return BltD(size, unmask, decoding.max_steps, bool(decoding.align_blocks))
    return BltDV(size, unmask, decoding.max_steps, decoding.paper_accounting)


def _block_size(decoding: DecodingParams, config: BltConfig) -> int:
    trained = config.block_sizes
    if not trained:
        raise InvalidRequestError(
            f"this checkpoint has no diffusion head, so {decoding.method} cannot run; use blt or blt-s",
            "decoding.method",
        )
    size = decoding.block_size if decoding.block_size is not None else (8 if 8 in trained else trained[0])
    if size not in trained:
        raise InvalidRequestError(
            f"block_size {size} was not trained; this checkpoint has {', '.join(map(str, trained))}",
            "decoding.block_size",
        )
    return size


def _unmask(decoding: DecodingParams, unmasking: Unmasking) -> Unmask:
    if unmasking == Unmasking.ONE_STEP:
        return Unmask(rule=3, bound=0.0)
    if unmasking == Unmasking.CONFIDENCE:
        alpha = decoding.confidence_threshold
        return Unmask(rule=0, bound=DEFAULT_CONFIDENCE if alpha is None else alpha)
    gamma = decoding.entropy_bound
    rule = 1 if decoding.entropy_rule == EntropyRule.INCLUSIVE else 2
    return Unmask(rule=rule, bound=DEFAULT_ENTROPY if gamma is None else gamma)
