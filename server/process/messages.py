"""What the server and its engine process say to each other (`server/framing.py` has the bytes).

The server sends commands; the engine answers with reports, one frame a step.
"""

from __future__ import annotations

import msgspec

from fastblt.models.config import BltConfig
from fastblt.server.engine.stats import EngineAbout, EngineStats
from fastblt.server.framing import Message
from fastblt.server.logs import LogSettings
from fastblt.server.request import Delta, Request
from fastblt.server.settings import EngineSettings

# From the server.


class Start(Message):
    """The first message: what to load, and how to log."""

    settings: EngineSettings
    log: LogSettings


class Add(Message):
    """Take these requests, all or none; answered by an AddReply with the same number."""

    number: int
    requests: list[Request]


class Abort(Message):
    """End these requests; unknown ids are ignored."""

    request_ids: list[str]


class Ping(Message):
    """Answered by a Pong between passes."""


class Stop(Message):
    """End what was aborted, and exit."""


Command = Start | Add | Abort | Ping | Stop


# From the engine.


class Loaded(Message):
    """The engine is ready. `max_model_len` counts bytes, BOS included."""

    model_name: str
    config: BltConfig
    max_model_len: int
    stats: EngineStats
    about: EngineAbout | None = None


class Failed(Message):
    """The engine could not be loaded, or failed; the process exits. `reason` is fit for a client's eyes."""

    reason: str


class Problem(msgspec.Struct):
    """Why a request was refused. `kind` is `invalid` (it can never be served), `full` (the queue is) or `fault`."""

    kind: str
    message: str
    param: str | None = None


class AddReply(Message):
    """Whether the requests of an Add were taken: all of them where there is no problem."""

    number: int
    problem: Problem | None = None


class StepOutput(Message):
    """What a step of the engine gave. `started` are the requests that left the queue for the first time. `stats` comes
    from time to time, and when nothing is left to do.
    """

    deltas: list[Delta]
    started: list[str]
    stats: EngineStats | None = None


class Pong(Message):
    stats: EngineStats


Report = Loaded | Failed | AddReply | StepOutput | Pong
