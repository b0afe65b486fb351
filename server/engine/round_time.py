"""What rounds take, learned from rounds: their passes, by the cost curves, and the engine's own time for steps."""

from __future__ import annotations

#: What a step takes of the engine's own time whoever is in it, in requests.
_STEP = 1.0
#: How much of what was known a new round leaves.
_KEPT = 0.95
#: What is assumed at first, as if one round had shown it: passes take what the curves say; and, of a round with so many
#: requests for a second of passes, each request takes so many seconds of the engine's.
_PER_SECOND, _OWN = 300.0, 2e-4
#: Rounds that are assumed beside it until others came, each with so many requests for a second of passes: the first
#: ones are those of a server that starts, and are not like the rest.
_FIRST, _FIRST_PER_SECOND = 4.0, 600.0
#: Bounds of what passes take over what the curves say.
_PACES = (0.5, 3.0)


def shares(steps: float, requests: float) -> float:
    """The shares of the engine's own time in so many steps: each request of a step has one, and the step one."""
    return steps * (requests + _STEP)


class RoundTime:
    """`pace`, what passes take over what the curves say, and `each`, the engine's own seconds for each request in a
    step and for one more: those with the least squares of relative errors over the last rounds. Rounds of one kind tell
    only what they take in all.
    """

    def __init__(self) -> None:
        self.pace, self.each = 1.0, _OWN
        # Sums over rounds of products of shares / passes, 1, and seconds / passes.
        self._own_own = _FIRST * _FIRST_PER_SECOND**2
        self._own_taken = self._own_own * _OWN
        self._own = 0.0
        self._taken = self._rounds = _FIRST

    def count(self, passes: float, shares: float, seconds: float) -> None:
        """A round of so many shares of the engine's time took `seconds`; the curves give its passes `passes`."""
        if passes <= 0:
            return
        own, taken = shares / passes, seconds / passes
        self._own_own = _KEPT * self._own_own + own * own
        self._own = _KEPT * self._own + own
        self._own_taken = _KEPT * self._own_taken + own * taken
        self._taken = _KEPT * self._taken + taken
        self._rounds = _KEPT * self._rounds + 1
        # The normal equations, with what is assumed.
        a, b, c = self._own_own + _PER_SECOND**2, self._own, self._rounds + 1
        right, other = self._own_taken + _PER_SECOND**2 * _OWN, self._taken + 1
        each = (c * right - b * other) / (a * c - b * b)
        self.each = max(each, 0.0)
        self.pace = min(max((other - b * self.each) / c, _PACES[0]), _PACES[1])

    def seconds(self, passes: float, shares: float) -> float:
        """What a round takes: passes that take `passes` seconds by the curves, and shares of the engine's time."""
        return self.pace * passes + self.each * shares
