"""Which method a request gets, with what settings; what cannot be meant is refused here."""

from __future__ import annotations

from typing import Any

from fastblt.kernels.unmasking import CONFIDENCE, ENTROPY, EXCLUSIVE_MAX, ONE_STEP
from fastblt.models.config import BltConfig
from fastblt.server.decoding.auto import Auto, Drafts
from fastblt.server.decoding.blt import Blt
from fastblt.server.decoding.blt_d import BltD
from fastblt.server.decoding.blt_dsv import BltDSV
from fastblt.server.decoding.blt_dv import BltDV
from fastblt.server.decoding.blt_s import BltS
from fastblt.server.decoding.method import Method, Unmask
from fastblt.server.request import DecodingMethod, DecodingParams, EntropyRule, InvalidRequestError, Unmasking

DEFAULT_DRAFT_LENGTH = 8
#: Of BLT-DSV, whose drafts are long enough for several blocks.
DEFAULT_FILTERED_LENGTH = 16
DEFAULT_BLOCK_SIZE = 8
DEFAULT_CONFIDENCE = 0.7
DEFAULT_ENTROPY = 0.8

_DIFFUSION = (DecodingMethod.BLT_D, DecodingMethod.BLT_DV, DecodingMethod.BLT_DSV)
_OF_METHOD = {
    DecodingMethod.BLT: (),
    DecodingMethod.AUTO: (),
    DecodingMethod.BLT_S: ("draft_length", "paper_accounting"),
    DecodingMethod.BLT_D: ("block_size", "unmasking", "align_blocks"),
    DecodingMethod.BLT_DV: ("block_size", "unmasking", "paper_accounting"),
    DecodingMethod.BLT_DSV: ("draft_length", "block_size", "unmasking"),
}
_OF_UNMASKING = {
    None: (),
    Unmasking.CONFIDENCE: ("confidence_threshold", "max_steps"),
    Unmasking.ENTROPY: ("entropy_bound", "entropy_rule", "max_steps"),
    Unmasking.ONE_STEP: (),
}


def resolve(
    asked: DecodingParams,
    defaults: DecodingParams,
    config: BltConfig,
    *,
    untrained_sizes: bool = False,
    structured: bool = False,
) -> DecodingParams:
    """The decoding that really runs: every setting that its method has, and None for those that it has not.

    A field comes from the request, else from the server's `defaults` where it applies, else from the method; with
    `structured` output the method must be able to follow a grammar. Raises InvalidRequestError where the request sets
    what its method has not, or asks for what method or checkpoint cannot do.
    """
    method = asked.method or defaults.method or DecodingMethod.AUTO
    if structured and method == DecodingMethod.BLT_D:
        if asked.method is not None:
            raise InvalidRequestError(
                "blt-d cannot follow a grammar: it fills a block's bytes out of order, and what a grammar allows "
                "at a place depends on all before it; for structured output use blt, blt-s, blt-dv, blt-dsv or auto",
                "decoding.method",
            )
        method = DecodingMethod.AUTO
    unmasking = None
    if method in _DIFFUSION:
        built_in = Unmasking.CONFIDENCE if method == DecodingMethod.BLT_D else Unmasking.ONE_STEP
        unmasking = _asked_unmasking(asked) or defaults.unmasking or built_in
    names = (*_OF_METHOD[method], *_OF_UNMASKING[unmasking])
    _refuse_others(asked, method, unmasking, names)
    # A setting of another rule than the one that runs is no default for it, and the rule itself is decided.
    sources = [vars(asked), vars(defaults), _built_in(method, config)]
    values = {name: next((s[name] for s in sources if s.get(name) is not None), None) for name in names}
    values |= {"unmasking": unmasking} if unmasking else {}
    if method in _DIFFUSION:
        check_block_size(values["block_size"], method, config, untrained_sizes=untrained_sizes)
    return DecodingParams(method, **values)


def make_method(decoding: DecodingParams, drafts: Drafts | None = None) -> Method:
    """The method object of one request, from its resolved decoding; `auto` asks `drafts` how to draft."""
    method = decoding.method
    if method == DecodingMethod.AUTO:
        assert drafts is not None
        return Auto(drafts)
    if method == DecodingMethod.BLT:
        return Blt()
    if method == DecodingMethod.BLT_S:
        assert decoding.draft_length is not None
        return BltS(decoding.draft_length, bool(decoding.paper_accounting))
    assert decoding.block_size is not None
    if method == DecodingMethod.BLT_D:
        return BltD(decoding.block_size, _unmask(decoding), decoding.max_steps, bool(decoding.align_blocks))
    if method == DecodingMethod.BLT_DSV:
        assert decoding.draft_length is not None
        return BltDSV(decoding.draft_length, decoding.block_size, _unmask(decoding), decoding.max_steps)
    return BltDV(decoding.block_size, _unmask(decoding), decoding.max_steps, bool(decoding.paper_accounting))


def check_block_size(
    size: int | None, method: DecodingMethod, config: BltConfig, *, untrained_sizes: bool = False
) -> None:
    """Raises InvalidRequestError where the checkpoint has no diffusion head, or was not trained for this size."""
    trained = config.block_sizes
    if not trained:
        raise InvalidRequestError(
            f"this checkpoint has no diffusion head, so {method} cannot run; use blt or blt-s", "decoding.method"
        )
    if size not in trained and not untrained_sizes:
        raise InvalidRequestError(
            f"block_size {size} was not trained; this checkpoint has {', '.join(map(str, trained))}",
            "decoding.block_size",
        )


def _built_in(method: DecodingMethod, config: BltConfig) -> dict[str, Any]:
    trained = config.block_sizes
    return {
        "draft_length": DEFAULT_FILTERED_LENGTH if method == DecodingMethod.BLT_DSV else DEFAULT_DRAFT_LENGTH,
        "block_size": DEFAULT_BLOCK_SIZE if DEFAULT_BLOCK_SIZE in trained or not trained else trained[0],
        "confidence_threshold": DEFAULT_CONFIDENCE,
        "entropy_bound": DEFAULT_ENTROPY,
        "entropy_rule": EntropyRule.INCLUSIVE,
        "align_blocks": False,
        "paper_accounting": False,
    }


def _asked_unmasking(asked: DecodingParams) -> Unmasking | None:
    """The rule that a request names, or means by setting only that rule's bound."""
    if asked.unmasking is not None:
        return asked.unmasking
    if asked.confidence_threshold is not None:
        return Unmasking.CONFIDENCE
    if asked.entropy_bound is not None or asked.entropy_rule is not None:
        return Unmasking.ENTROPY
    return None


def _refuse_others(
    asked: DecodingParams, method: DecodingMethod, unmasking: Unmasking | None, names: tuple[str, ...]
) -> None:
    for name, value in vars(asked).items():
        # False is what every method does anyway.
        if name == "method" or value is None or value is False or name in names:
            continue
        rules = [str(rule) for rule, settings in _OF_UNMASKING.items() if name in settings]
        if unmasking is not None and rules:
            reason = f"{name} belongs to unmasking {' or '.join(rules)}, and this request's is {unmasking}"
        else:
            owners = [str(m) for m, settings in _OF_METHOD.items() if name in settings or (rules and m in _DIFFUSION)]
            chosen = "" if asked.method == method else ", which this server chose; name a method"
            reason = f"{name} belongs to {' and '.join(owners)}, and this request runs {method}{chosen}"
        raise InvalidRequestError(reason, f"decoding.{name}")


def _unmask(decoding: DecodingParams) -> Unmask:
    if decoding.unmasking == Unmasking.CONFIDENCE:
        assert decoding.confidence_threshold is not None
        return Unmask(CONFIDENCE, decoding.confidence_threshold)
    if decoding.unmasking == Unmasking.ENTROPY:
        assert decoding.entropy_bound is not None
        return Unmask(
            ENTROPY if decoding.entropy_rule == EntropyRule.INCLUSIVE else EXCLUSIVE_MAX, decoding.entropy_bound
        )
    return Unmask(ONE_STEP, 0.0)
