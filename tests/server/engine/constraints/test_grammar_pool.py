"""Grammars in processes: what they cost is theirs alone, whoever dies is replaced, and masks are those of one state."""

from __future__ import annotations

import os
import random
import signal
import socket
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastblt.models.vocabulary import EOS_ID, encode
from fastblt.server.engine.constraints import cursor as cursors
from fastblt.server.engine.constraints import grammar_pool, grammar_worker, nursery
from fastblt.server.engine.constraints.cursor import GrammarCursor
from fastblt.server.engine.constraints.grammar import Grammars
from fastblt.server.engine.constraints.grammar_pool import GrammarPool
from fastblt.server.request import StructuredOutput
from tests.server.engine.schemas import random_schema

ARITHMETIC = StructuredOutput.grammar(
    'start: e\ne: t | e "+" t | e "-" t\nt: f | t "*" f | t "/" f\nf: NUM | "(" e ")"\nNUM: /[0-9]+/\n'
)
AMBIGUOUS = StructuredOutput.grammar('start: e\ne: e "+" e | e "*" e | "(" e ")" | /[0-9]+/\n')
PAIRS = StructuredOutput.grammar('start: a\na: a a | "x"\n')
DIGITS = StructuredOutput.regex("[0-9]{2,3}")


def settle(pool: GrammarPool, *waiting: GrammarCursor, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while any(cursor.waiting for cursor in waiting):
        pool.poll(0.1)
        assert time.monotonic() < until


def feed(pool: GrammarPool, cursor: GrammarCursor, text: bytes) -> int:
    """Commit a text as far as the grammar can be followed; how far that was."""
    settle(pool, cursor)
    for at, token in enumerate(encode(text)):
        if cursor.allowed is None:
            assert cursor.failure
            return at
        assert cursor.allowed[token], text[:at]
        cursor.commit(token)
        settle(pool, cursor)
    return len(text)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_masks_are_those_of_the_grammar_wherever_they_are_made(seed: int) -> None:
    """On the spot, by a process, by one that was killed in between: along drafts and committed bytes."""
    rng = random.Random(seed)
    structured = rng.choice([ARITHMETIC, StructuredOutput.json(random_schema(rng))])
    pool, plain = GrammarPool(), Grammars().start(structured)
    cursor = pool.start(structured)
    cursor.dear = rng.random() < 0.5
    settle(pool, cursor)
    for _ in range(40):
        assert cursor.allowed is not None and (cursor.allowed == plain.allowed).all()
        draft: list[int] = []
        for _ in range(rng.randint(0, 6)):
            choices = np.flatnonzero(plain.along(draft)[-1]).tolist()
            draft.append(rng.choice(choices) if choices and rng.random() < 0.9 else rng.randrange(260))
        while not cursor.ready(draft):
            if rng.random() < 0.1:
                kill_workers(pool)
            pool.poll(0.1)
        for ours, theirs in zip(cursor.along(draft), plain.along(draft), strict=True):
            assert (ours == theirs).all()
        choices = [c for c in np.flatnonzero(plain.allowed).tolist() if c != EOS_ID]
        if not choices:
            break
        token = draft[0] if draft and draft[0] in choices else rng.choice(choices)
        plain.commit(token)
        cursor.commit(token)
        settle(pool, cursor)
    cursor.close()


def kill_workers(pool: GrammarPool) -> None:
    for worker in list(pool._workers.values()):
        if worker.idle:
            nursery.nursery.tell(grammar_worker.KILL, worker.number)


def test_arithmetic_of_1500_bytes_is_followed_to_its_end() -> None:
    pool = GrammarPool()
    cursor = pool.start(ARITHMETIC)
    assert feed(pool, cursor, (b"12+(3*4)-5/6+" * 200)[:1495] + b"1") == 1496
    assert cursor.allowed is not None and cursor.seconds < 1


def test_any_of_5000_texts_is_followed_to_its_end() -> None:
    texts = [f"{i * 7919 % 99991:05d}" for i in range(5000)]
    pool = GrammarPool()
    for text in random.Random(0).sample(texts, 20):
        cursor = pool.start(StructuredOutput.choice(texts))
        assert feed(pool, cursor, text.encode()) == 5
        assert cursor.allowed is not None and np.flatnonzero(cursor.allowed).tolist() == [EOS_ID]
        cursor.close()


@pytest.mark.parametrize("structured", [AMBIGUOUS, PAIRS], ids=["ambiguous", "pairs"])
def test_who_takes_more_than_his_time_ends_alone(structured: StructuredOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursors, "SECONDS", 0.2)
    pool = GrammarPool()
    neighbor = pool.start(structured)
    assert feed(pool, neighbor, b"1" if structured is AMBIGUOUS else b"x") == 1
    cursor = pool.start(structured)
    text = b"1+2*(3+4)+" * 300 if structured is AMBIGUOUS else b"x" * 3000
    before = os.times()
    assert 20 < feed(pool, cursor, text) < len(text)
    assert cursor.failure is not None and "processor time" in cursor.failure and not cursor.refused
    assert cursor.seconds < 2.5 and os.times().user - before.user < 5
    # Whoever follows the same grammar goes on, in the same process or another.
    assert feed(pool, neighbor, b"+1" if structured is AMBIGUOUS else b"xx") == 2


def test_who_ends_a_process_is_found_among_those_asked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are sent together, so those of others may be lost with it; they are asked again and nobody else ends."""
    monkeypatch.setattr(cursors, "SECONDS", 0.2)
    pool = GrammarPool()
    asked = [pool.start(AMBIGUOUS) for _ in range(5)]
    settle(pool, *asked)
    for at, cursor in enumerate(asked):
        cursor.ready(encode(b"1+" * 5000 if at == 3 else b"1+1"))
    settle(pool, *asked)
    assert [cursor.failure is not None for cursor in asked] == [False, False, False, True, False]
    assert all(cursor.ready(encode(b"1+1")) for at, cursor in enumerate(asked) if at != 3)


def test_a_single_step_beyond_all_bounds_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code that does not come back: the process ends, and whoever else it worked for has another."""
    monkeypatch.setattr(cursors, "SECONDS", 0.2)
    monkeypatch.setattr(cursors, "SECONDS_PER_BYTE", 0.0)
    letters = "".join(chr(97 + i % 26) for i in range(60))
    rule = " | ".join(f"a{i} a{j}" for i in range(12) for j in range(12))
    text = 'start: "y" a0 | "z"+\n' + "".join(f'a{i}: {rule} | "x"\n' for i in range(12)) + f"// {letters}\n"
    structured = StructuredOutput.grammar(text)
    pool = GrammarPool()
    cursor, neighbor = pool.start(structured), pool.start(structured)
    assert feed(pool, neighbor, b"zz") == 2
    settle(pool, cursor)
    feed(pool, cursor, b"y" + b"x" * 200)
    assert cursor.failure is not None
    assert feed(pool, neighbor, b"zz") == 2


def test_a_process_that_was_killed_is_replaced_and_told_everything() -> None:
    pool = GrammarPool()
    cursor = pool.start(ARITHMETIC)
    assert feed(pool, cursor, b"12+(3") == 5
    [worker] = pool._workers.values()
    nursery.nursery.tell(grammar_worker.KILL, worker.number)
    # Another process passes the order on. The end of the socket says that it was carried out.
    assert worker.sock.recv(1, socket.MSG_PEEK) == b""
    assert feed(pool, cursor, b"+4)") == 3
    assert cursor.failure is None and pool._workers[ARITHMETIC] is not worker


def test_the_process_that_forks_is_replaced_too() -> None:
    pool = GrammarPool()
    assert feed(pool, pool.start(ARITHMETIC), b"1") == 1
    process = nursery.nursery._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert feed(pool, pool.start(PAIRS), b"x") == 1


def test_more_grammars_than_processes_take_turns() -> None:
    pool = GrammarPool(bound=1)
    structured = [StructuredOutput.grammar(f'start: a\na: a "{i}" | "x"\n') for i in range(2 * grammar_pool._SPARE)]
    waiting = [pool.start(one) for one in structured]
    settle(pool, *waiting)
    assert len(pool._workers) <= 1 + grammar_pool._SPARE
    for i, cursor in enumerate(waiting):
        assert feed(pool, cursor, f"x{i}{i}".encode()) == len(f"x{i}{i}")
    for cursor in waiting:
        cursor.close()
    assert all(not worker.members for worker in pool._workers.values())


def test_nobody_works_on_for_who_has_left() -> None:
    pool = GrammarPool()
    cursor = pool.start(AMBIGUOUS)
    settle(pool, cursor)
    cursor.ready(encode(b"1+" * 5000))
    pool.send()
    [worker] = pool._workers.values()
    assert worker.unanswered
    cursor.close()
    assert not pool._workers


def test_nothing_is_asked_for_who_has_left_before_it_was_sent() -> None:
    pool = GrammarPool()
    cursor, neighbor = pool.start(ARITHMETIC), pool.start(ARITHMETIC)
    settle(pool, cursor, neighbor)
    assert not neighbor.ready(encode(b"1+1")) and not cursor.ready(encode(b"1+1"))
    cursor.close()
    pool.send()
    [worker] = pool._workers.values()
    assert list(worker.unanswered) == [neighbor]
    settle(pool, neighbor)
    assert feed(pool, neighbor, b"1+1") == 3


def test_a_process_whose_grammar_is_followed_on_the_spot_takes_the_next_one() -> None:
    pool = GrammarPool()
    numbers = set()
    for count in range(3, 9):
        cursor = pool.start(StructuredOutput.regex(f"[0-9]{{{count}}}"))
        numbers |= {worker.number for worker in pool._workers.values()}
        assert feed(pool, cursor, b"123") == 3 and cursor.on_the_spot
        cursor.close()
    assert len(numbers) == 1
    # One that has ended in the meantime is not taken.
    [number] = numbers
    nursery.nursery.tell(grammar_worker.KILL, number)
    assert dict(nursery.nursery._blank)[number].recv(1, socket.MSG_PEEK) == b""
    cursor = pool.start(ARITHMETIC)
    assert feed(pool, cursor, b"1+2") == 3


def test_a_wait_is_bounded_for_the_step_and_for_each() -> None:
    pool = GrammarPool()
    slow = [pool.start(AMBIGUOUS) for _ in range(3)]
    settle(pool, *slow)
    for cursor in slow:
        assert not cursor.ready(encode(b"1+" * 5000))
    waited = []
    for _ in range(5):
        pool.begin_step()
        for cursor in slow:
            began = time.monotonic()
            pool.wait([cursor], alone=False)
            waited.append(time.monotonic() - began)
    assert all(cursor.waiting for cursor in slow)
    # What they had saved is spent: the later steps do not wait at all.
    assert sum(waited) < 3 * (cursors.PATIENCE + 0.05) and sum(waited[6:]) < 0.05
    for cursor in slow:
        cursor.close()


def test_what_is_surely_small_is_followed_on_the_spot() -> None:
    pool = GrammarPool()
    cursor = pool.start(DIGITS)
    settle(pool, cursor)
    assert DIGITS in pool._grammars and not pool._workers
    cursor.commit(encode(b"1")[0])
    assert not cursor.waiting and cursor.allowed is not None
    dear = pool.start(ARITHMETIC)
    settle(pool, dear)
    assert ARITHMETIC not in pool._grammars


def test_what_turns_out_dear_is_moved_to_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = GrammarPool()
    cursor = pool.start(DIGITS)
    settle(pool, cursor)
    monkeypatch.setattr(grammar_pool, "_STEP_SECONDS", 0.0)
    cursor.commit(encode(b"1")[0])
    assert cursor.dear
    cursor.commit(encode(b"2")[0])
    assert cursor.waiting or cursor.allowed is not None
    settle(pool, cursor)
    assert cursor.allowed is not None and cursor.allowed[EOS_ID]
