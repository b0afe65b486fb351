"""Errors of requests, and the checks of their fields."""

from __future__ import annotations

import math
from enum import StrEnum


class InvalidRequestError(ValueError):
    """A request that can never be served as it stands. `param` names the field; the message says what to do."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(RuntimeError):
    """The waiting queue is at its bound; try again later."""


def within(value: float | None, low: float, high: float, name: str, *, open_low: bool = False) -> None:
    """Raise InvalidRequestError unless value is None or a finite number in [low, high] (or (low, high])."""
    if value is None:
        return
    # An int may be too large for isfinite, never for the comparison below.
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        raise InvalidRequestError(f"{name} must be a finite number", name)
    if value > high or value < low or (open_low and value == low):
        raise InvalidRequestError(
            f"{name} must be {'above' if open_low else 'at least'} {low} and at most {high}", name
        )


def whole(value: int | None, low: int, high: int, name: str) -> None:
    """Raise InvalidRequestError unless value is None or a whole number in [low, high]."""
    if value is not None and not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be a whole number", name)
    within(value, low, high, name)


def needed(value: object, kind: type | tuple[type, ...], name: str, what: str) -> None:
    """Raise InvalidRequestError unless value is a `kind`; `what` says that in words."""
    if not isinstance(value, kind):
        raise InvalidRequestError(f"{name} must be {what}", name)


def member(value: str | None, kind: type[StrEnum], name: str) -> StrEnum | None:
    """A member of `kind` from its name, or None. Raises InvalidRequestError with the names there are."""
    if value is None:
        return None
    try:
        return kind(value)
    except ValueError:
        raise InvalidRequestError(f"{name} must be one of {', '.join(kind)}, not {value!r}", name) from None
