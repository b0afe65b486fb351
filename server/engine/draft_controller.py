"""What `auto` drafts: the draft that promises the most bytes a second for this machine, checkpoint and load.

A round of a draft costs its passes, on the cost curves measured at the start, and the engine's own time for each; it
gives the bytes that drafts like it have been giving. Both are known to some accuracy only, so another draft is taken
only where it promises clearly more, and now and then a round tries another one, so that its acceptance is known too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fastblt.models.config import BltConfig
from fastblt.server.decoding.auto import Draft
from fastblt.server.engine.acceptance import MEMORY, PRIOR_ROUNDS, Acceptance, prior, sampled
from fastblt.server.engine.device.cost import DRAFT, STEP, Costs, filter_of
from fastblt.server.engine.round_time import RoundTime, shares
from fastblt.server.engine.scheduler import Text
from fastblt.server.request import DecodingMethod

#: Draft lengths of BLT-S that are considered; those of BLT-DV are the checkpoint's block sizes.
LENGTHS = (1, 2, 4, 8, 16, 32)
#: Draft lengths of BLT-DSV, each with the block sizes of which it has several.
FILTERED_LENGTHS = (16, 32)

#: Now and then it is asked whether another draft may be the best: the first time after `_FEW` rounds of each request,
#: and `_EARLY` in all, and then each time `_LATER` times as late, up to `_SELDOM` rounds of each request.
_FEW, _EARLY, _LATER, _SELDOM = 3, 12, 1.5, 64
#: More questions than make `_LATER` to this power more than any number of requests.
_MOST_LATER = 40
#: One that may be is tried for so many rounds in a row. Where none may be, some draft is tried one time in `_OLD`,
#: since what is known grows old.
_TRY, _OLD = 2, 4
#: How far off the rate of a draft may be whose rounds were never timed, and one of whose kind nobody knows how much is
#: accepted; the more rounds there were, the less.
_UNTIMED, _GUESSED = 0.1, 0.3
#: What another draft must promise more before it is taken.
_CLEARLY = 1.02
#: Rounds, or steps of the engine, after which the choice is looked at again.
_REVIEW = 16
#: Times as many requests, or as few, at which it is looked at again at once, and no round is timed.
_CHANGED = 1.5
#: Weight of what the checkpoint says about filters, in blocks.
_PRIOR_BLOCKS = 24.0
#: The variance of a block's bytes that pass a filter, over passing * (most - passing), where most blocks pass whole.
_CUT_OFF = 0.7
#: Kinds of decoder passes in `work`.
_DECODING = ("decoder", DRAFT, STEP)
#: Share of a pass in running means, and of a round in what is known of its draft's time.
_NEWEST, _NEWEST_ROUND = 0.05, 0.1
#: What a request that is one of many takes beside its own rounds, in rounds: half of one that goes on when it comes,
#: and half of its last draft, which is behind its end.
_ENDS = 1.0
#: Rounds that the time which is expected of a draft is worth: the first ones are often those of a server that starts.
_ASSUMED = 8.0
#: A round that takes so much less or more than expected is a machine that stood still, and counts as that.
_SCALES = (0.5, 2.0)
#: What the acceptance that is assumed where a checkpoint says nothing is worth, in rounds.
_NOTHING = 0.25


@dataclass(frozen=True)
class Told:
    """Of a draft's rounds: how many were timed, and running means of the seconds of their passes by the curves, of
    their shares of the engine's time, and of the seconds that they took."""

    rounds: int
    passes: float
    shares: float
    seconds: float


class DraftController:
    """Chooses the drafts of all requests that run `auto`. `costs` are the modules' curves (seconds by rows)."""

    def __init__(self, config: BltConfig, costs: Costs) -> None:
        self._costs = costs
        self._longest = config.max_patch_length
        self._encoder_input = config.decoder_input == "encoder"
        self.drafts = [Draft(), *(Draft(DecodingMethod.BLT_S, length) for length in LENGTHS)]
        self.drafts += [Draft(DecodingMethod.BLT_DV, size) for size in config.block_sizes]
        self.drafts += [
            Draft(DecodingMethod.BLT_DSV, length, size)
            for length in FILTERED_LENGTHS
            for size in config.block_sizes
            if 1 < size <= length // 2
        ]
        #: What the checkpoint says of greedy text, and of sampled text.
        self._tables = config.acceptance, sampled(config.acceptance)
        # Drafts of a kind are much alike in their first bytes, whatever their length.
        self._lengths = {DecodingMethod.BLT_S: LENGTHS, DecodingMethod.BLT_DV: config.block_sizes}
        self._acceptance = {
            method: Acceptance(max(lengths), 0.0) for method, lengths in self._lengths.items() if lengths
        }
        # BLT-DSV's drafts are those of BLT-S.
        self._acceptance[DecodingMethod.BLT_DSV] = self._acceptance[DecodingMethod.BLT_S]
        #: Of every block size, the bytes that met the filter, and those that passed it; and of how many in a block
        #: that is assumed.
        self._filtered = {size: (0.0, 0.0) for size in config.block_sizes if size > 1}
        self._passing: dict[int, float] = {}
        #: Decoding requests, a running mean.
        self._requests = 1.0
        self._text = Text(0.25, 256.0)
        #: Rounds that told how much of a kind of draft is accepted.
        self._known = {_kind(draft): PRIOR_ROUNDS if config.acceptance else _NOTHING for draft in self.drafts}
        self._round_time = RoundTime()
        #: The number of requests for which the choice was made.
        self._chosen_for = 1.0
        self._steps = 0
        #: What is known of the rounds of each draft that was made.
        self._told: dict[Draft, Told] = {}
        #: What `_reckon` gave since the last look.
        self._reckoned: dict[tuple[Draft, int], tuple[float, float]] = {}
        #: Rounds since another draft was asked for, and since the choice was looked at; how often one was asked for.
        self._rounds = self._unseen = self._asked = 0
        self._others = self._rivals()
        #: The draft that is tried, for so many rounds more.
        self._trying, self._left = Draft(), 0
        #: What rounds draft that are planned in this step, and how many ended in it; None: none was planned.
        self._drafted: Draft | None = None
        self._ended = 0
        #: The draft whose rounds are timed, among how many requests, how many ended before, seconds since then, and how
        #: many ended in them.
        self._timed: Draft | None = None
        self._among, self._before, self._elapsed, self._taken = 0, 0, 0.0, 0
        self._assume()
        self.best = max(self.drafts, key=self.rate)

    def _assume(self) -> None:
        """Take what the checkpoint says of such requests as there are: greedy text is easier to draft."""
        shares = self._text.greedy, 1 - self._text.greedy
        kinds = [(share, table) for share, table in zip(shares, self._tables, strict=True) if share]
        for method, lengths in self._lengths.items():
            if lengths:
                chances = [share * prior(table, method, lengths) for share, table in kinds]
                self._acceptance[method].prior = math.fsum(chances)
        for size in self._filtered:
            self._passing[size] = math.fsum(share * self._right_of_block(table, size) for share, table in kinds)

    def _right_of_block(self, table: Mapping[str, float], size: int) -> float:
        """How many of the bytes that a block proposes pass the decoder's filter, by the checkpoint's table; or else how
        many of BLT-DV's are right. The block's first byte is the pending row's own, and is not proposed."""
        if (kept := table.get(f"blt-dsv-{size} k{FILTERED_LENGTHS[-1]}")) is not None:
            return kept * (size - 1)
        share = table.get(f"blt-dv-{size} 1step")
        if share is None:
            return self._acceptance[DecodingMethod.BLT_DV].bytes(size - 1)
        return max(share * size - 1, 0.0)

    def next(self) -> Draft:
        """What a round that begins now drafts.

        Each kind of draft takes a call of its own, for which all others wait. So all rounds that begin in a step draft
        the same, and try another draft together. That tells as much as many tries of single ones.
        """
        if self._drafted is None:
            self._drafted = self._decide()
        return self._drafted

    def ended(self, draft: Draft) -> None:
        """Count a round."""
        self._ended += 1
        if draft == self._trying:
            self._left = max(self._left - 1, 0)

    def _decide(self) -> Draft:
        requests = max(self._requests, 1.0)
        often = min(_SELDOM * requests, max(_FEW * requests, _EARLY) * _LATER ** min(self._asked, _MOST_LATER))
        if not self._left and self._rounds >= often:
            self._rounds = 0
            self._asked += 1
            rival = max((draft for draft in self.drafts if draft != self.best), key=self._hope)
            if self._hope(rival) > self.rate(self.best):
                self._trying, self._left = rival, round(_TRY * requests)
            elif self._asked % _OLD == 0:
                self._trying, self._left = next(self._others), round(_TRY * requests)
        return self._trying if self._left else self.best

    def round_ended(self, draft: Draft, drafted: int, accepted: int) -> None:
        """Count a round's acceptance, unless its draft was cut short by the request's end."""
        if drafted == draft.length:
            self._acceptance[draft.method].count(drafted, accepted)
            self._known[_kind(draft)] += 1

    def filtered(self, draft: Draft, proposed: int, passed: int) -> None:
        """Count bytes of blocks that met the decoder's filter, and how many passed it."""
        fade = 1 - proposed / (MEMORY * (draft.block - 1))
        tried, kept = self._filtered[draft.block]
        self._filtered[draft.block] = (fade * tried + proposed, fade * kept + passed)

    def step_ended(
        self, requests: int, text: Callable[[], Text], seconds: float | None, work: list[tuple[str, int]]
    ) -> None:
        """Count a step of the engine: it took `seconds` for the `work`, passes as (module, rows), while `requests` were
        decoding. None: it computed prompts most of its time, and tells nothing about drafts. `text` is called now and
        then."""
        # A step may make many passes of the decoder.
        made = max(sum(module in _DECODING for module, _ in work), 1)
        newest = 1 - (1 - _NEWEST) ** made
        self._requests += newest * (requests - self._requests)
        self._time_rounds(requests, seconds)
        self._steps += 1
        # A choice for one request is none for eight: short requests would be over before the next look.
        changed = not 1 / _CHANGED < self._requests / self._chosen_for < _CHANGED
        first = self._steps == 1
        if first or changed or self._steps % _REVIEW == 0 or self._unseen >= _REVIEW:
            self._unseen = 0
            self._reckoned.clear()
            self._chosen_for = max(self._requests, 1e-3)
            before, self._text = self._text.greedy, text()
            if self._text.greedy != before:
                self._assume()
            rival = max(self.drafts, key=self.rate)
            if first or self.rate(rival) > _CLEARLY * self.rate(self.best):
                self.best = rival

    def _time_rounds(self, requests: int, seconds: float | None) -> None:
        """Count a step towards the time of a round: from where all rounds under way draft alike until as many have
        ended as there are requests. Rounds count where they end, since a plan may be made steps before it runs."""
        drafted, ended = self._drafted, self._ended
        self._drafted, self._ended = None, 0
        self._rounds = 0 if drafted not in (None, self.best) else self._rounds + ended
        self._unseen += ended
        alike = self._among / _CHANGED <= requests <= _CHANGED * self._among
        if drafted not in (None, self._timed) or seconds is None or not alike:
            # The first step of another draft verifies what was drafted before. Where many requests come or go, nobody
            # can tell how many shared a round.
            self._timed = drafted or self._timed
            self._among, self._before, self._elapsed, self._taken = requests, ended, 0.0, 0
            return
        if self._before < requests:
            # Some rounds that end next began before, so that what they take from now on is not all of it.
            self._before += ended
            return
        self._elapsed += seconds
        self._taken += ended
        if self._timed is None or not requests or self._taken < requests:
            return
        passes, own = self._reckon(self._timed, requests)
        expected = self._round_time.seconds(passes, own)
        low, high = (bound * expected for bound in _SCALES)
        taken = min(max(self._elapsed * requests / self._taken, low), high)
        told = self._told.get(self._timed, Told(0, passes, own, taken))
        newest = max(_NEWEST_ROUND, 1 / (1 + told.rounds))
        self._told[self._timed] = Told(
            told.rounds + 1,
            told.passes + newest * (passes - told.passes),
            told.shares + newest * (own - told.shares),
            told.seconds + newest * (taken - told.seconds),
        )
        self._round_time.count(passes, own, taken)
        self._elapsed, self._taken = 0.0, 0

    def _reckon(self, draft: Draft, requests: int) -> tuple[float, float]:
        """Of a round, as at the last look: seconds of its passes by the curves, and shares of the engine's time."""
        if (found := self._reckoned.get((draft, requests))) is None:
            passes, steps, _ = self._round(draft, requests)
            found = self._reckoned[draft, requests] = passes, shares(steps, requests)
        return found

    def rate(self, draft: Draft) -> float:
        """Bytes a second that all requests together would get if they all drafted so, from their first to their last
        step."""
        count = max(self._requests, 1.0)
        passes, steps, made = self._round(draft, count)
        # Short requests that are many prefer short rounds.
        made /= 1 + _ENDS * (1 - 1 / count) * made / self._text.output
        return count * made / (self._scale(draft) * self._round_time.seconds(passes, shares(steps, count)))

    def _scale(self, draft: Draft) -> float:
        """What the draft's rounds take over what is expected of them now, as far as its rounds and those of others of
        its kind have shown."""
        alike = self._shown(lambda other: _kind(other) == _kind(draft) and other != draft, 1.0)
        return self._shown(lambda other: other == draft, alike)

    def _shown(self, counts: Callable[[Draft], bool], expected: float) -> float:
        """The scale that the rounds of the drafts that count have shown, beside one that took what is expected."""
        taken, rounds = _ASSUMED * expected, _ASSUMED
        for draft, told in self._told.items():
            if counts(draft) and (seconds := self._round_time.seconds(told.passes, told.shares)):
                own = min(told.rounds, 1 / _NEWEST_ROUND)
                taken += own * told.seconds / seconds
                rounds += own
        return taken / rounds

    def _round(self, draft: Draft, count: float) -> tuple[float, float, float]:
        """Of a round of `count` requests: seconds of its passes by the curves, steps of the engine, and the bytes of
        each request."""
        costs, patches = self._costs, self._text.patches_per_byte
        rows = count * (draft.length + 1)
        # Where drafts are calls that make several passes, a verification's makes the next one.
        steps = 1.0
        # A round's bytes and the passes it takes: verification, or BLT's one byte.
        if draft.length:
            made = 1 + self._acceptance[draft.method].bytes(draft.length)
            closing = 1 - (1 - patches) ** (draft.length + 1)
            upstream = costs["global"](rows * patches) * (1 - (1 - closing) ** count)
            seconds = costs["patcher"](rows) + costs["encoder"](rows) + upstream + costs["decoder"](rows)
            if draft.method == DecodingMethod.BLT_DSV:
                rounds, filtering = self._filtering(draft, count)
                seconds += filtering
                steps += 0.0 if DRAFT in costs else 2 * rounds
            elif draft.method == DecodingMethod.BLT_DV:
                seconds += costs["decoder"](rows)
                steps += 0.0 if DRAFT in costs else 1.0
            elif DRAFT in costs:
                seconds += draft.length * costs[DRAFT](count)
            else:
                drafting = costs["decoder"](count) + (costs["encoder"](count) if self._encoder_input else 0.0)
                seconds += draft.length * drafting
                steps += draft.length
        else:
            # Who closes a patch early waits for the others before all go upstream together.
            made = 1 / max(patches, 1e-3)
            longest = max(made, self._longest or 2 * made)
            passes = made + (longest - made) * (1 - 1 / max(count, 1.0))
            each = count * made / passes
            if STEP in costs:
                seconds = passes * costs[STEP](each)
            else:
                seconds = passes * (costs["patcher"](each) + costs["encoder"](each) + costs["decoder"](each))
                steps = passes
            seconds += costs["global"](count)
        return seconds, steps, made

    def _filtering(self, draft: Draft, count: float) -> tuple[float, float]:
        """Of filtered drafts of `count` requests: inner rounds of each, of a block's pass and its filter's, and the
        seconds of all of them."""
        tried, kept = self._filtered[draft.block]
        most = draft.block - 1
        passing = (kept + _PRIOR_BLOCKS * self._passing[draft.block]) / (tried / most + _PRIOR_BLOCKS)
        # A round gives the pending row's own byte, those that pass, and the filter's own.
        made = passing + 2
        rounds = draft.length / made
        # A call goes on until the last draft is whole, for fewer and fewer requests. Bytes pass until one does not, so
        # their number varies as in a geometric distribution that is cut off.
        variance = min(passing * (1 + passing), _CUT_OFF * passing * (most - passing))
        more = math.sqrt(max(2 * math.log(max(count, 1.0)) * draft.length * variance / made**3, 0.0))
        return rounds, rounds * self._inner(draft.block, count) + more * self._inner(draft.block, max(count / 4, 1.0))

    def _inner(self, block: int, count: float) -> float:
        """Seconds of an inner round of a filtered draft."""
        costs = self._costs
        if (fused := costs.get(filter_of(block))) is not None:
            return fused(count)
        inner = costs["decoder"](count * (1 + block)) + costs["decoder"](count * block)
        if self._encoder_input:
            inner += costs["encoder"](count) + costs["encoder"](count * block)
        return inner

    def _hope(self, draft: Draft) -> float:
        """The highest rate that it may have, as far as is known."""
        told = self._told.get(draft)
        off = _UNTIMED / math.sqrt(1 + (told.rounds if told else 0))
        if draft.length:
            off += _GUESSED / math.sqrt(self._known[_kind(draft)])
        return self.rate(draft) * (1 + off)

    def _rivals(self) -> Iterator[Draft]:
        """In turn: the next longer and the next shorter draft of the best's kind, and the most promising draft of each
        other kind."""
        while True:
            best = self.best
            same = [draft for draft in self.drafts if _kind(draft) == _kind(best)]
            found = [draft for draft in same if draft.length > best.length][:1]
            found += [draft for draft in same if draft.length < best.length][-1:]
            for method in (DecodingMethod.BLT_S, DecodingMethod.BLT_DV, DecodingMethod.BLT_DSV):
                others = [draft for draft in self.drafts if draft.method == method != best.method]
                found += [max(others, key=self.rate)] if others else []
            yield from found or [best]


def _kind(draft: Draft) -> tuple[DecodingMethod, int]:
    """Drafts of a kind are alike but for their length."""
    return draft.method, draft.block
