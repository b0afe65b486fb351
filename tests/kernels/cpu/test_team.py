"""Threads that share maps: several callers at once, a rest between two calls, and a process that was forked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastblt.kernels.cpu.linear import Storage, linear, pack_weights
from fastblt.kernels.cpu.native import library, require
from fastblt.kernels.cpu.threads import set_threads

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    yield
    set_threads(None)


def test_callers_at_once_get_their_own_results() -> None:
    set_threads(3)
    cases = [(torch.randn(1 + n, 300), pack_weights(torch.randn(100, 300), Storage.BFLOAT16)) for n in range(8)]
    expected = [linear(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for result, wanted in zip(pool.map(lambda case: linear(*case), cases), expected, strict=True):
                assert torch.equal(result, wanted)


def test_threads_wake_after_a_rest_and_come_when_more_are_wanted() -> None:
    x, packed = torch.randn(5, 300), pack_weights(torch.randn(200, 300), Storage.INT8)
    expected = linear(x, packed)
    for count in (2, 5, 3, 64, 100):
        set_threads(count)
        # Longer than they look for work.
        time.sleep(0.002)
        assert torch.equal(linear(x, packed), expected)


def test_a_forked_process_has_threads_of_its_own() -> None:
    set_threads(3)
    x, packed, out = torch.randn(1, 64), pack_weights(torch.randn(96, 64), Storage.FLOAT32), torch.empty(1, 96)
    expected = linear(x, packed)
    arguments = (x.data_ptr(), 1, 64, packed.data.data_ptr(), 0, 96, 3, out.data_ptr())
    call, wanted = require().fastblt_linear, expected.tolist()
    child = os.fork()
    if child == 0:  # torch's own threads are not there: nothing but the call
        call(*arguments)
        os._exit(0 if out.tolist() == wanted else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    assert done == child and os.waitstatus_to_exitcode(status) == 0
