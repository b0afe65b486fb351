"""A fused model computes what it did before."""

from __future__ import annotations

import pytest
import torch

from kernels.dense import available
from models.blt import Blt, CausalAttention, init_weights
from models.fused import fuse
from tests.models.training.toys import toy_config

pytestmark = pytest.mark.skipif(not available(), reason="no C compiler")


def make(decoder_input: str) -> Blt:
    model = Blt(toy_config(decoder_input=decoder_input))
    init_weights(model, 3)
    return model


def rows_of(model: Blt) -> dict[str, torch.Tensor]:
    """What every module makes of random rows [N, d], as the engine calls them."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    ids = torch.randint(4, 260, (11,), generator=generator)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        return q + (k * v).repeat_interleave(groups, 1)

    states = model.local_encoder(draw(11, config.encoder.hidden_size), attend)
    inside = torch.arange(5) < torch.tensor([1, 5, 3])[:, None]
    vectors = model.local_encoder.pool(draw(3, 5, config.encoder.hidden_size), inside)
    latents = model.global_transformer(vectors, attend)
    hidden = model.local_decoder(draw(11, config.decoder.hidden_size), attend, lambda layer, q: q * (layer + 1))
    return {
        "entropy model": model.patcher(ids, attend),
        "encoder": states,
        "vectors": vectors,
        "latents": latents,
        "keys and values": model.local_decoder.latent_keys_values(latents),
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
    layer, x = model.local_encoder.layers[0], torch.randn(5, 16, requires_grad=True)
    attend = CausalAttention(model.config.encoder, 5, x.device)
    layer(x, lambda i, q, k, v: attend(i, q[None], k[None], v[None])[0], 0).sum().backward()
    assert x.grad is not None


def test_other_dtypes_stay_as_they_are() -> None:
    model = make("encoder").to(torch.bfloat16)
    model.patcher.float()
    fuse(model)
    assert "forward" not in vars(model.local_decoder.layers[0])
    assert "forward" in vars(model.patcher.layers[0])


def test_it_is_done_once_until_weights_change() -> None:
    """Every engine on a model asks for it: neither copies nor wrappers may pile up."""
    model = make("encoder")
    fuse(model)
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    fuse(model)
    assert before == {name: vars(module).get("forward") for name, module in model.named_modules()}
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    x = torch.randn(3, model.config.decoder.hidden_size)
    with torch.inference_mode():
        fuse(model)
        torch.testing.assert_close(model.lm_head(x), x @ model.lm_head.weight.T)
