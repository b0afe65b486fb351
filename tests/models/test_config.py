"""`config.json`: whatever stands in it, it is read as what it says, or refused with a ConfigError."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint, save_checkpoint
from fastblt.models.checkpoint_folder import CheckpointError
from fastblt.models.config import BltConfig, ConfigError
from tests.tiny import tiny_config

VALID: dict[str, Any] = tiny_config(1, block_sizes=(4, 8), acceptance={"blt-s/8": 0.5}).to_dict()
PARTS = ("patcher_config", "encoder_config", "decoder_config", "global_config")
#: What files of others have, and ours have not.
MORE = ("head_dim", "hidden_act", "rope_theta", "rope_scaling", "cross_attn_k")
ROPE = [(group, name) for group in ("rope_parameters", "rope_scaling") for name in ("rope_theta", "rope_type", "type")]
PATHS: list[tuple[str, ...]] = [
    *((name,) for name in VALID),
    *((part, name) for part in PARTS for name in (*VALID[part], *MORE)),
    *((part, *names) for part in PARTS for names in ROPE),
]
#: Sizes that no machine can make, and numbers that float32 cannot hold.
HUGE = st.sampled_from([10**3, 10**5, 2**20, 2**31 - 2, 2**31, 10**400, -(10**400), 1e39, 1e299, 1e-300])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
WRONG = JSON | HUGE | HUGE.map(lambda one: [one] * 3)


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    raw = json.loads(json.dumps(VALID))
    *outer, last = path
    inner = raw
    for name in outer:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return raw


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PATHS), WRONG)
def test_any_value_is_read_or_refused(path: tuple[str, ...], value: Any) -> None:
    try:
        config = BltConfig.from_dict(changed(path, value))
    except ConfigError as error:
        assert_one_line(error)
        return
    assert BltConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PATHS), st.integers(-4, 40) | HUGE)
def test_what_is_read_can_be_built(path: tuple[str, ...], value: int) -> None:
    try:
        config = BltConfig.from_dict(changed(path, value))
    except ConfigError:
        return
    with torch.device("meta"):
        Blt(config)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), value=WRONG)
def test_a_checkpoint_with_any_value_is_loaded_or_refused(path: tuple[str, ...], value: Any, folder: Path) -> None:
    """One line, and at once: nothing is made as large as a file says before its weights are known to be."""
    (folder / "config.json").write_text(json.dumps(changed(path, value)))
    began = time.monotonic()
    try:
        load_checkpoint(folder)
    except (ConfigError, CheckpointError) as error:
        assert_one_line(error)
    assert time.monotonic() - began < 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(tmp_path_factory.mktemp("checkpoint"))
    save_checkpoint(Blt(BltConfig.from_dict(VALID)), path)
    return path


def assert_one_line(error: Exception) -> None:
    assert 0 < len(str(error)) < 400 and "\n" not in str(error)


@pytest.mark.parametrize("kind", [0, "", [], {}, False, 1.5, "yarn", ["default"]], ids=repr)
@pytest.mark.parametrize(
    "path", [("global_config", *names) for names in ROPE if names[1] != "rope_theta"], ids=lambda path: ".".join(path)
)
def test_another_rope_is_refused(path: tuple[str, ...], kind: Any) -> None:
    with pytest.raises(ConfigError, match="global_config: rope_type must be 'default'"):
        BltConfig.from_dict(changed(path, kind))


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
