"""The Llama here says what that of `transformers` says, with its weights and its names."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dicode.lm.config import BodyConfig, DeepLMConfig
from dicode.lm.library import llama_config
from dicode.lm.llama import KeyValueCache, Llama, rope_frequencies
from dicode.lm.presets import SIZES

BODIES = {
    "plain": BodyConfig("llama", width=48, depth=3, heads=4),
    "shared": BodyConfig("llama", width=48, depth=2, heads=4, key_value_heads=2, feed_forward=80, rope_base=500_000.0),
    "scaled": BodyConfig("llama", width=64, depth=2, heads=2, rope_base=500_000.0, rope_factor=32.0),
}


def both(name: str) -> tuple[Llama, LlamaModel]:
    """A network and the library's, from one seed."""
    config = DeepLMConfig(BODIES[name], positions=512, vocab_size=40, token_width=8, max_keyframes=4)
    networks = []
    for make in (lambda: Llama(config), lambda: LlamaModel(llama_config(config))):
        torch.manual_seed(0)
        networks.append(make().eval())
    return networks[0], networks[1]


@pytest.mark.parametrize("name", BODIES)
def test_it_starts_with_the_same_weights_under_the_same_names(name: str) -> None:
    ours, theirs = (network.state_dict() for network in both(name))
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_hidden_states_and_gradients_are_the_same(name: str, masked: bool, learning: bool) -> None:
    ours, theirs = both(name)
    theirs.set_attn_implementation("eager" if learning else "sdpa")
    x = torch.randn(3, 20, BODIES[name].width)
    mask = positions = added = None
    if masked:
        mask = torch.rand(3, 20, 20) < 0.5
        mask |= torch.eye(20, dtype=torch.bool)
        positions = torch.arange(20) * 3
        added = torch.zeros(3, 1, 20, 20).masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
    with torch.set_grad_enabled(learning):
        found = ours(x, mask=mask, positions=positions, fused=not learning)
        given = None if positions is None else positions[None]
        expected = theirs(inputs_embeds=x, attention_mask=added, position_ids=given).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    if learning:
        for network, hidden in ((ours, found), (theirs, expected)):
            hidden.square().sum().backward()
            assert network.layers[0].self_attn.k_proj.weight.grad is not None
        for p, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(p.grad, other.grad, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", BODIES)
def test_a_sequence_in_parts_is_the_whole(name: str) -> None:
    network, cache, x = both(name)[0], KeyValueCache(), torch.randn(2, 12, BODIES[name].width)
    parts = [network(x[:, start:end], cache) for start, end in ((0, 5), (5, 6), (6, 9), (9, 12))]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), network(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_attends_to_nothing_stays_finite(name: str, dtype: torch.dtype) -> None:
    """Padding that is masked everywhere, in the columns of others too."""
    network, x = both(name)[0].to(dtype), torch.randn(1, 6, BODIES[name].width).to(dtype)
    mask = torch.ones(6, 6).tril().bool()
    mask[:, :2] = False
    for fused in (False, True):
        assert network(x, mask=mask, fused=fused).isfinite().all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_drops_out_in_training_alone(dropout: float) -> None:
    config = DeepLMConfig(
        replace(BODIES["plain"], dropout=dropout), positions=64, vocab_size=40, token_width=8, max_keyframes=4
    )
    network, x = Llama(config), torch.randn(1, 8, 48)
    assert torch.equal(network(x), network(x)) == (dropout == 0)
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("name", ["llama-1b", "llama-3b"])
def test_frequencies_of_published_sizes_are_the_librarys(name: str) -> None:
    body = SIZES[name].body
    found = rope_frequencies(body.width // body.heads, body.rope_base, body.rope_factor)
    torch.testing.assert_close(found, LlamaRotaryEmbedding(llama_config(SIZES[name])).inv_freq)
