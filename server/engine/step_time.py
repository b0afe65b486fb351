"""What rounds take, learned from rounds: their passes, by the cost curves, and the engine's own time for steps."""

from __future__ import annotations

#: What a step takes of the engine's own time whoever is in it, in requests.
_STEP = 2.0
#: How much of what was known a new round leaves.
_KEPT = 0.95
#: What is assumed at first: passes take what the curves say, and each request so many seconds of the engine's. Weights
#: in rounds; the latter's for one whose passes take a second for so many requests.
_AS_CURVES, _AS_OWN, _OWN, _PER_SECOND = 1.0, 1.0, 1e-4, 300.0
#: Bounds of what passes take over what the curves say.
_PACES = (0.5, 3.0)


class StepTime:
    """`pace`, what passes take over what the curves say, and `each`, the engine's own seconds for each request in a
    step and for two more: those with the least squares of relative errors over the last rounds. Rounds of one kind tell
    only what they take in all.
    """

    def __init__(self) -> None:
        self.pace, self.each = 1.0, _OWN
        # Sums over rounds of products of steps * (requests + 2) / passes, 1, and seconds / passes.
        self._own_own = self._own = self._own_taken = self._taken = self._rounds = 0.0

    def count(self, requests: float, passes: float, steps: float, seconds: float) -> None:
        """A round of `requests`, of so many steps, took `seconds`; the curves give its passes `passes`."""
        if passes <= 0:
            return
        own, taken = steps * (requests + _STEP) / passes, seconds / passes
        self._own_own = _KEPT * self._own_own + own * own
        self._own = _KEPT * self._own + own
        self._own_taken = _KEPT * self._own_taken + own * taken
        self._taken = _KEPT * self._taken + taken
        self._rounds = _KEPT * self._rounds + 1
        # The normal equations, with what is assumed.
        weight = _AS_OWN * _PER_SECOND**2
        a, b, c = self._own_own + weight, self._own, self._rounds + _AS_CURVES
        right, other = self._own_taken + weight * _OWN, self._taken + _AS_CURVES
        each = (c * right - b * other) / (a * c - b * b)
        self.each = max(each, 0.0)
        self.pace = min(max((other - b * self.each) / c, _PACES[0]), _PACES[1])

    def own(self, requests: float) -> float:
        """The engine's own seconds for a step of `requests`."""
        return self.each * (requests + _STEP)
