"""Structured output: grammars over ids, compiled by llguidance, and the state of a completion in one.

llguidance ("the library" below) gets our vocabulary: the 256 bytes and the specials. Nothing here needs torch. A call
may take any amount of time and memory: only the limits of the process that makes it bound it (`grammar_worker`).
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from fastblt.models.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID, NEVER_PRODUCED, encode
from fastblt.server.engine.constraints.choice import one_of
from fastblt.server.engine.constraints.schema import checked, checked_within
from fastblt.server.request import GrammarKind, InvalidRequestError, StructuredOutput

#: Compiled grammars that are kept.
CACHED_GRAMMARS = 64

#: Occurs in the library's error message when the lexer fails that copies of a matcher share.
_LEXER = "lexer error"

#: What the library says where too many rules are open, as those of 500 and more optional properties are.
_CROWDED = re.compile(r"Current row has (\d+) items; max is (\d+)")
#: Advice of the library's that we cannot follow.
_IN_OUR_WORDS = {
    "Enable 'coerce_one_of' option to approximate oneOf with anyOf": "Write anyOf, or what excludes each other"
}

#: Letters of the library's error message that a client gets.
_REASON = 500

#: Whitespace between two JSON tokens. It is bounded because an uncertain model may produce whitespace up to max_tokens.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"

#: The library's limits: its defaults, or a quarter of them where the defaults allow milliseconds. They end bad grammars
#: early, but do not bound the time of a step or a request: the library counts items after it has made them.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=100_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class GrammarError(RuntimeError):
    """A grammar became too complex during a completion. The message says why."""


class _Bytes:
    """Our vocabulary in the form that the library's TokenizerWrapper expects."""

    bos_token_id = BOS_ID
    eos_token_id = EOS_ID
    special_token_ids = (*NEVER_PRODUCED, EOS_ID)
    tokens = tuple([b"<boe>", b"<bos>", b"<eos>", b"<bpe>"] + [bytes((byte,)) for byte in range(256)])

    def __call__(self, text: str | bytes) -> list[int]:
        return encode(text.encode() if isinstance(text, str) else text)


@cache
def _vocabulary() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()))


def load_library() -> None:
    """Load what all grammars share, so that forked processes need not."""
    _vocabulary()


def compile_grammar(structured: StructuredOutput) -> LLMatcher:
    """A matcher at the grammar's start. Raises InvalidRequestError with the library's reason.

    A grammar of a few bytes can take hours and all memory, so call it only where both are limited.
    """
    try:
        match structured.kind:
            case GrammarKind.JSON_SCHEMA:
                schema = checked(json.loads(structured.text), _accepts)
                grammar = LLMatcher.grammar_from_json_schema(
                    json.dumps(schema, ensure_ascii=False), defaults={"whitespace_pattern": _WHITESPACE}
                )
            case GrammarKind.REGEX:
                grammar = LLMatcher.grammar_from_regex(structured.text)
            case GrammarKind.CHOICE:
                grammar = LLMatcher.grammar_from_regex(one_of(json.loads(structured.text)))
            case GrammarKind.GRAMMAR:
                grammar = grammar_from("grammar", checked_within(structured.text, _accepts))
    except (ValueError, RecursionError) as error:
        raise refusal(structured, str(error)) from None
    matcher = LLMatcher(_vocabulary(), grammar, limits=_LIMITS, log_level=0)
    # Some grammars fail only when the first mask is computed, such as those that no text satisfies.
    allowed = b"" if matcher.is_error() else matcher.compute_logit_bias()
    if matcher.is_error():
        raise refusal(structured, _reason(matcher))
    if not any(allowed[BYTE_OFFSET:]):
        raise refusal(structured, "no byte can begin a text that satisfies it")
    return matcher


def _accepts(schema: dict[str, Any], text: str) -> bool:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    matcher = LLMatcher(_vocabulary(), grammar, limits=_LIMITS, log_level=0)
    return matcher.consume_tokens(encode(text.encode())) and matcher.is_accepting()


def refusal(structured: StructuredOutput, reason: str) -> InvalidRequestError:
    """The error that a client gets for a grammar that cannot be used."""
    for theirs, ours in _IN_OUR_WORDS.items():
        reason = reason.replace(theirs, ours)
    return InvalidRequestError(f"the {structured.kind} cannot be used: {reason[:_REASON]}", "structured_outputs")


class Grammars:
    """A cache of compiled grammars, least recently used evicted first. Not thread-safe."""

    def __init__(self, bound: int = CACHED_GRAMMARS) -> None:
        self._bound = bound
        self._compiled: OrderedDict[StructuredOutput, LLMatcher] = OrderedDict()

    def start(self, structured: StructuredOutput) -> GrammarState:
        """A state at the start of the grammar. Raises InvalidRequestError."""
        return GrammarState(partial(self._matcher, structured))

    def __contains__(self, structured: StructuredOutput) -> bool:
        """Whether it is compiled."""
        return structured in self._compiled

    def _matcher(self, structured: StructuredOutput, worn: LLMatcher | None) -> LLMatcher:
        """The cached matcher at the grammar's start, to be copied and not advanced. A new one if it would be `worn`."""
        matcher = self._compiled.get(structured)
        if matcher is None or matcher is worn:
            matcher = compile_grammar(structured)
        self._compiled[structured] = matcher
        self._compiled.move_to_end(structured)
        if len(self._compiled) > self._bound:
            self._compiled.popitem(last=False)
        return matcher


class GrammarState:
    """The state of one completion in its grammar, and that of its draft.

    The matcher may be ahead of the fixed ids. The drafted ids that it has consumed are the tape. They are rolled back
    when other ids follow. So the masks of a draft are computed once, although it is first drafted byte by byte and then
    verified. The matcher is never given EOS.

    Copies of a matcher share a lexer that grows with everything they consume, up to the library's limits. Then all
    copies fail for good. A state that fails this way starts again on a new matcher: `supply(m)` returns one other than
    `m`. It has really failed only if the new one fails too, on the ids of this completion alone.
    """

    def __init__(self, supply: Callable[[LLMatcher | None], LLMatcher]) -> None:
        self._supply = supply
        self._fixed: list[int] = []
        self._tape: list[int] = []
        #: The error that ended the last `along` early; None if it ended for another reason.
        self.problem: str | None = None
        self._origin = supply(None)
        self._matcher = self._origin.deep_copy()
        #: bool [260] after each prefix of the tape: what may follow.
        self._masks = [self._next_mask()]

    @property
    def allowed(self) -> np.ndarray:
        """bool [260]: what may follow the fixed ids."""
        return self._masks[0]

    def commit(self, token: int) -> None:
        """Fix one more id. It must be allowed and not EOS. Raises GrammarError, after which the state is unusable."""
        if not self._tape or self._tape[0] != token:
            self._roll_back(0)
            self._take(token)
        self._fixed.append(token)
        del self._tape[0], self._masks[0]

    def along(self, draft: Sequence[int]) -> list[np.ndarray]:
        """Masks, bool [260] each: mask i says what may follow the fixed ids and the first i ids of the draft.

        The list ends after the last allowed id of the draft, before EOS, or where the grammar gets too complex.
        """
        same, self.problem = 0, None
        for ours, theirs in zip(self._tape, draft, strict=False):
            if ours != theirs:
                break
            same += 1
        if same == len(draft):
            return self._masks[: same + 1]
        self._roll_back(same)
        for token in draft[same:]:
            if token == EOS_ID or not self._masks[-1][token]:
                break
            try:
                self._take(token)
            except GrammarError as error:
                # Not raised: verification may refuse the draft before this id.
                self.problem = str(error)
                masks, self._masks, self._tape = self._masks, self._masks[:1], []
                self._start_again()
                return masks
        return self._masks.copy()

    def _roll_back(self, keep: int) -> None:
        """Remove all but the first `keep` ids from the tape."""
        back = len(self._tape) - keep
        if back:
            self._matcher.rollback(back)
            del self._tape[keep:], self._masks[keep + 1 :]

    def _take(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._tape.append(token)
        self._masks.append(self._next_mask())

    def _next_mask(self) -> np.ndarray:
        """What may follow the tape."""
        mask = self._mask()
        if mask is None and _LEXER in self._matcher.get_error():
            self._start_again()
            mask = self._mask()
        if mask is None:
            raise GrammarError(_reason(self._matcher))
        return mask

    def _start_again(self) -> None:
        self._origin = self._supply(self._origin)
        self._matcher = self._origin.deep_copy()
        self._matcher.consume_tokens(self._fixed + self._tape)

    def _mask(self) -> np.ndarray | None:
        """bool [260]: what may follow the tape; None if the matcher has failed."""
        allowed = None if self._matcher.is_error() else self._matcher.compute_logit_bias()
        if allowed is None or self._matcher.is_error():
            return None
        return np.frombuffer(allowed, dtype=np.uint8) != 0


def _reason(matcher: LLMatcher) -> str:
    reason = matcher.get_error().replace("\n<non-verbose/>", "").strip()[:_REASON]
    if found := _CROWDED.search(reason):
        return (
            f"at one byte it may go on in too many ways ({found[1]}; {found[2]} at most): have fewer optional "
            "properties in one object, or require them; in a grammar of your own, recur on the left"
        )
    return "no text satisfies it" if reason.startswith("NoExtension") else reason
