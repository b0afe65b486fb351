"""A fused model computes what it did before."""

from __future__ import annotations

import pytest
import torch

from fastblt.kernels.cpu.native import library
from fastblt.kernels.latent_attention import StoredLatents
from fastblt.kernels.paged_attention import PagedAttention, has_native
from fastblt.kernels.types import RaggedRows
from fastblt.models.blt import Blt, CausalAttention, init_weights
from fastblt.models.config import StackConfig
from fastblt.models.fused import fuse, is_fused
from fastblt.models.layers import Rope
from tests.models.training.toys import toy_config

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")


def make(decoder_input: str) -> Blt:
    model = Blt(toy_config(decoder_input=decoder_input))
    init_weights(model, 3)
    return model


class Caches:
    """Empty caches of one request whose rows are 0, 1, ... of everything."""

    def __init__(self, stack: StackConfig, rows: int) -> None:
        column = torch.arange(rows, dtype=torch.int32)
        at = RaggedRows(
            table=torch.tensor([[0], [1]], dtype=torch.int32),
            rows=torch.ones(rows, dtype=torch.int32),
            positions=column,
            firsts=torch.zeros(rows, dtype=torch.int32),
            highs=column + 1,
            spans=[(0, rows)],
            length=16,
            page_size=16,
        )
        stores = [torch.zeros(32, 2, stack.num_kv_heads, stack.head_dim) for _ in range(stack.num_layers)]
        turns = Rope(stack.head_dim, stack.rope_theta).table(16)
        self.attend = PagedAttention(stores, turns, at, native=has_native(stores[0]))


def rows_of(model: Blt) -> dict[str, torch.Tensor]:
    """What every module makes of random rows [N, d], as the engine calls them."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    ids = torch.randint(4, 260, (11,), generator=generator)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    states = model.local_encoder(draw(11, config.encoder.hidden_size), Caches(config.encoder, 11).attend)
    inside = torch.arange(5) < torch.tensor([1, 5, 3])[:, None]
    vectors = model.local_encoder.pool(draw(3, 5, config.encoder.hidden_size), inside)
    latents = model.global_transformer(vectors, Caches(config.global_, 3).attend)
    keys_values = model.local_decoder.latent_keys_values(latents)
    read = StoredLatents(keys_values, torch.arange(11) % 3)
    hidden = model.local_decoder(draw(11, config.decoder.hidden_size), Caches(config.decoder, 11).attend, read)
    return {
        "entropy model": model.patcher(ids, Caches(config.patcher, 11).attend),
        "encoder": states,
        "vectors": vectors,
        "latents": latents,
        "keys and values": keys_values,
        "decoder": hidden,
        "logits": model.lm_head(hidden),
    }


@pytest.mark.parametrize("decoder_input", ["encoder", "embedding"])
def test_every_module_agrees_with_itself_before(decoder_input: str) -> None:
    model = make(decoder_input)
    with torch.inference_mode():
        plain = rows_of(model)
        assert fuse(model)
        fused = rows_of(model)
    for name, value in plain.items():
        torch.testing.assert_close(
            fused[name], value, atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert not torch.equal(fused[name], value), f"{name} did not run fused"


def test_sequences_and_gradients_take_the_plain_way() -> None:
    model = make("encoder")
    ids = torch.randint(4, 260, (2, 24))
    with torch.no_grad():
        plain = model(ids).logits
    fuse(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
    encoder, x = model.local_encoder, torch.randn(5, 16, requires_grad=True)
    attend = CausalAttention(model.config.encoder, 5, x.device)
    encoder(x, lambda i, q, k, v: attend(i, q[None], k[None], v[None])[0]).sum().backward()
    assert x.grad is not None


def test_other_dtypes_stay_as_they_are() -> None:
    model = make("encoder").to(torch.bfloat16)
    model.patcher.float()
    fuse(model)
    assert not is_fused(model), "most of it is still torch's"
    assert "forward" not in vars(model.local_decoder.layers)
    assert "forward" in vars(model.patcher.layers)


def test_it_is_done_once_until_weights_change() -> None:
    """Every engine on a model asks for it: neither copies nor wrappers may pile up."""
    model = make("encoder")
    assert not is_fused(model)
    fuse(model)
    assert is_fused(model)
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    fuse(model)
    assert before == {name: vars(module).get("forward") for name, module in model.named_modules()}
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    x = torch.randn(3, model.config.decoder.hidden_size)
    with torch.inference_mode():
        fuse(model)
        torch.testing.assert_close(model.lm_head(x), x @ model.lm_head.weight.T)
