"""`config.json`: whatever stands in it, it is read as what it says, or refused with a ConfigError."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastblt.models.blt import Blt
from fastblt.models.config import BltConfig, ConfigError
from tests.tiny import tiny_config

VALID: dict[str, Any] = tiny_config(1, block_sizes=(4, 8), acceptance={"blt-s/8": 0.5}).to_dict()
PARTS = ("patcher_config", "encoder_config", "decoder_config", "global_config")
PATHS = [(name,) for name in VALID] + [(part, name) for part in PARTS for name in VALID[part]]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    raw = json.loads(json.dumps(VALID))
    *outer, last = path
    inner = raw
    for name in outer:
        inner = inner[name]
    inner[last] = value
    return raw


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PATHS), JSON)
def test_any_value_is_read_or_refused(path: tuple[str, ...], value: Any) -> None:
    try:
        config = BltConfig.from_dict(changed(path, value))
    except ConfigError:
        return
    assert BltConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PATHS), st.integers(-4, 40))
def test_what_is_read_can_be_built(path: tuple[str, ...], value: int) -> None:
    try:
        config = BltConfig.from_dict(changed(path, value))
    except ConfigError:
        return
    with torch.device("meta"):
        Blt(config)


@pytest.mark.parametrize("path", PATHS)
def test_null(path: tuple[str, ...]) -> None:
    """A default where `transformers` has one for null, and a ConfigError elsewhere."""
    try:
        BltConfig.from_dict(changed(path, None))
    except ConfigError as error:
        assert path[-1].removesuffix("_config") in str(error)


def test_no_hash_sizes() -> None:
    with pytest.raises(ConfigError, match="at least one size"):
        tiny_config(1, hash_group_sizes=())
