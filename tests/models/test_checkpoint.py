"""Checkpoints: what is written is read back, and every broken one is refused with a message that helps."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastblt.models import checkpoint
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import INDEX_FILE, WEIGHTS_FILE, CheckpointError, load_checkpoint, save_checkpoint
from fastblt.models.config import ConfigError
from tests.tiny import random_ids, tiny_model

Tensors = dict[str, torch.Tensor]
NAME = "model.local_encoder.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model() -> Blt:
    return tiny_model(11, block_sizes=(4, 8), decoder_input="encoder", hash_functions=2)


@pytest.fixture
def folder(model: Blt, tmp_path: Path) -> Path:
    save_checkpoint(model, tmp_path / "saved")
    return tmp_path / "saved"


def logits(model: Blt) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([random_ids(1, 30)])).logits


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def same(a: Blt, b: Blt) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "overrides",
    [
        {"block_sizes": ()},
        {"block_sizes": (4,), "decoder_input": "embedding", "max_patch_length": 6},
        {"block_sizes": (), "decoder_input": "embedding", "acceptance": {"blt-s/8": 0.5}, "window": None},
    ],
)
def test_round_trip(overrides: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(12, **overrides)
    save_checkpoint(model, tmp_path)
    loaded = load_checkpoint(str(tmp_path))
    assert loaded.config == model.config
    assert same(loaded, model)
    # Functions of the configuration that no file holds.
    assert torch.equal(loaded._hash_powers, model._hash_powers)
    assert torch.equal(loaded._hash_offsets, model._hash_offsets)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_others_may_read_what_the_folder_lets_them(model: Blt, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    save_checkpoint(model, tmp_path)
    assert (tmp_path / WEIGHTS_FILE).stat().st_mode & 0o777 == 0o644


def test_shards(model: Blt, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path, max_shard_bytes=50_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 3 and files == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(4 * weight.numel() for weight in model.parameters())
    assert same(load_checkpoint(tmp_path), model)
    save_checkpoint(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS_FILE]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(model: Blt, dtype: torch.dtype, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path, dtype)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name.startswith("model.patcher.") else dtype)
    loaded = load_checkpoint(tmp_path, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    assert torch.equal(loaded.patcher.lm_head.weight, model.patcher.lm_head.weight)
    assert load_checkpoint(tmp_path).lm_head.weight.dtype == torch.float32


def test_only_real_dtypes(folder: Path) -> None:
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        load_checkpoint(folder, dtype=torch.int8)


def test_interrupted_save_keeps_the_old_file(model: Blt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Tensors, path: Path, **more: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, folder)
    assert same(load_checkpoint(folder), model)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS_FILE]


def _number(dtype: torch.dtype) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({NAME: torch.zeros(tensors[NAME].shape).to(dtype)})


def _value(value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[NAME].view(-1)[5:6].fill_(value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(NAME), f"{NAME} is missing .* incomplete"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "tensor 'extra' is not part .* remove"),
        (lambda tensors: tensors.update({NAME: torch.zeros(3, 4)}), rf"{NAME} has shape \[3, 4\], but config.json"),
        (_number(torch.int32), f"{NAME} is torch.int32; save it as"),
        (_number(torch.bool), f"{NAME} is torch.bool; save it as"),
        (_number(torch.float8_e4m3fn), f"{NAME} is torch.float8_e4m3fn; save it as"),
        (_value(float("nan")), f"{NAME} holds NaN or infinite .* use another"),
        (_value(float("-inf")), f"{NAME} holds NaN or infinite .* use another"),
    ],
)
def test_broken_tensors(folder: Path, edit: Callable[[Tensors], Any], message: str) -> None:
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_values_beyond_float16(folder: Path) -> None:
    change(folder, _value(1e5))
    assert load_checkpoint(folder, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=f"{NAME} has values beyond the range of torch.float16; load as"):
        load_checkpoint(folder, dtype=torch.float16)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE} is truncated or no safetensors file .* again"):
        load_checkpoint(folder)


def test_garbage_file(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_checkpoint(folder)


def test_broken_shards(model: Blt, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path, max_shard_bytes=50_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    places = index["weight_map"]
    first, last = places[NAME], places["lm_head.weight"]

    def write(**changed: str) -> None:
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {**places, **changed}}))

    write(**{NAME: last})
    with pytest.raises(CheckpointError, match=f"{last} lacks tensor '{NAME}', which {INDEX_FILE} places there"):
        load_checkpoint(tmp_path)
    for bad in ("../other.safetensors", "/etc/passwd", "weights.bin"):
        write(**{NAME: bad})
        with pytest.raises(CheckpointError, match=f"{INDEX_FILE} places '{NAME}' in '{re.escape(bad)}'"):
            load_checkpoint(tmp_path)
    write()
    (tmp_path / first).unlink()
    with pytest.raises(CheckpointError, match=f"{first} is missing, though {INDEX_FILE} lists it"):
        load_checkpoint(tmp_path)
    for text, message in (
        ("{}", "has no weight_map"),
        ("[1", f"{INDEX_FILE} cannot be read as JSON"),
        ("[" * 100_000, f"{INDEX_FILE} cannot be read as JSON"),
    ):
        (tmp_path / INDEX_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "model.pickle"])
def test_pickles_are_refused(folder: Path, name: str) -> None:
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"has neither {WEIGHTS_FILE} nor"):
        load_checkpoint(folder)
    (folder / name).write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match=rf"pickled weights \({name}\), which can run code"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json cannot be read as JSON"),
        ("[]", "config.json does not hold a JSON object"),
        ('{"args": {}}', "official repository's layout; .*`fastblt convert"),
    ],
)
def test_broken_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_config_of_another_shape(folder: Path) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "block_sizes": []}))
    with pytest.raises(CheckpointError, match=r"model\.local_decoder\.embed_tokens\.weight' is not part of the model"):
        load_checkpoint(folder)
    path.write_text(json.dumps({**raw, "encoder_hash_byte_group_nb_functions": 1}))
    with pytest.raises(CheckpointError, match=r"model\.encoder_hash_tok_embedding\.weight has shape"):
        load_checkpoint(folder)
    path.write_text(json.dumps({**raw, "vocab_size": 300}))
    with pytest.raises(ConfigError, match="vocab_size"):
        load_checkpoint(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_checkpoint(folder)


def test_sources(folder: Path, model: Blt, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        load_checkpoint(folder / WEIGHTS_FILE)
    for nowhere in ("nowhere", "./no/where", "a/b/c", Path("owner/name")):
        with pytest.raises(CheckpointError, match="no such folder; give a checkpoint folder or a Hub id"):
            load_checkpoint(nowhere)

    asked: dict[str, Any] = {}

    def snapshot(name: str, **more: Any) -> str:
        asked.update(more, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert same(load_checkpoint("owner/name", revision="main", token="secret"), model)
    assert asked == {
        "name": "owner/name",
        "revision": "main",
        "token": "secret",
        "allow_patterns": ["*.json", "*.safetensors"],
    }

    def unreachable(name: str, **more: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"owner/name: cannot be downloaded from the Hub \(offline") as caught:
        load_checkpoint("owner/name", token="secret")
    assert "secret" not in str(caught.value)


def test_files_may_change_under_a_loaded_model(model: Blt, folder: Path) -> None:
    """A file that is written over or cut short in place changes nothing of what was loaded."""
    loaded = load_checkpoint(folder)
    before = logits(loaded)
    path = folder / WEIGHTS_FILE
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert torch.equal(logits(loaded), before)
    with path.open("r+b") as file:
        file.truncate(100)
    assert torch.equal(logits(loaded), before) and same(loaded, model)


@pytest.mark.parametrize("kept", checkpoint._TIED)
def test_tied_embeddings(kept: str, tmp_path: Path) -> None:
    model = tiny_model(13, block_sizes=(), decoder_input="encoder")
    with torch.no_grad():
        model.local_encoder.embed_tokens.weight.copy_(model.lm_head.weight)
    save_checkpoint(model, tmp_path)
    [dropped] = set(checkpoint._TIED) - {kept}
    change(tmp_path, lambda tensors: tensors.pop(dropped))
    with pytest.raises(CheckpointError, match=f"{dropped} is missing"):
        load_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert same(load_checkpoint(tmp_path), model)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [WEIGHTS_FILE, "config.json"])
def test_pipes_are_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} is not a file"):
        load_checkpoint(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize(
    ("device", "words"), [("cuda", "leave --device out"), ("cuda:1", "--device"), ("gpu", "give cpu")]
)
def test_a_device_that_is_not_there_says_what_to_do(device: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_checkpoint("anything", device=device)
