"""Heads: the distribution over the next deep token, against torch.distributions and by counting draws."""

from typing import Any, cast, get_args

import pytest
import torch
from torch import distributions as D
from torch import nn

from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig, HeadName
from dicode.lm.heads import (
    HEADS,
    FlowHead,
    Head,
    MixtureHead,
    RegressionHead,
    mixture_mean,
    mixture_nll,
    split_mixture,
)
from dicode.seeds import generator_for
from dicode.tokenizer.config import SamplingConfig

MEANS = torch.tensor([[[[-4.0, 1.0], [2.0, 0.0], [6.0, -3.0]]]])  # 1 place, 3 components, 2 numbers
VARIANCES = torch.tensor([[[[0.04, 0.09], [0.25, 0.01], [0.16, 0.36]]]])
LOG_WEIGHTS = torch.tensor([[0.2, 0.5, 0.3]]).log()


def config_of(hidden_width: int, token_width: int, places: int = 1, **head: Any) -> DeepLMConfig:
    """Of a head for hidden states of `hidden_width`, which predicts `places` tokens together."""
    return DeepLMConfig(
        BodyConfig("llama", hidden_width, depth=1, heads=1),
        positions=99,
        vocab_size=9,
        token_width=token_width,
        max_keyframes=2,
        tokens_per_keyframe=places,
        order="keyframe",
        head=HeadConfig(**head),
    )


EVERY: list[Head] = [
    MixtureHead(config_of(6, 5, components=3)),
    RegressionHead(config_of(6, 5)),
    FlowHead(config_of(6, 5)),
    FlowHead(config_of(6, 5, places=4)),
]


def reference_mixture(means: torch.Tensor, variances: torch.Tensor, log_weights: torch.Tensor) -> D.MixtureSameFamily:
    """Over a group: its places and their numbers are one event."""
    normals = D.Normal(means.transpose(-3, -2), variances.sqrt().transpose(-3, -2), validate_args=False)
    return D.MixtureSameFamily(D.Categorical(logits=log_weights), D.Independent(normals, 2))


@pytest.mark.parametrize("places", [1, 4])
@pytest.mark.parametrize("components", [1, 5])
def test_mixture_likelihood_is_that_of_torch_distributions(components: int, places: int) -> None:
    torch.manual_seed(0)
    hidden, target = torch.randn(2, 3, places, 12), torch.randn(2, 3, places, 7)
    head = MixtureHead(config_of(12, 7, components=components, token_variance=0.2))
    assert head.distribution(hidden)[1].min() > 0.2
    expected = -reference_mixture(*head.distribution(hidden)).log_prob(target) / (7 * places)
    torch.testing.assert_close(head.loss(hidden, target), expected, rtol=1e-5, atol=1e-5)


def test_mixture_likelihood_is_finite_where_variances_collapse() -> None:
    parameters = torch.cat([torch.zeros(1, 1, 8), torch.full((1, 1, 8), -200.0), torch.zeros(1, 1, 2)], dim=-1)
    means, variances, logits = split_mixture(parameters, 2)
    assert variances.min() == pytest.approx(1e-5)
    target, log_weights = torch.full((1, 1, 4), 0.01), logits.squeeze(-2).log_softmax(-1)
    expected = -reference_mixture(means, variances, log_weights).log_prob(target)
    torch.testing.assert_close(mixture_nll(means, variances, log_weights, target), expected, rtol=1e-5, atol=1e-5)


def head_with(means: torch.Tensor, variances: torch.Tensor, log_weights: torch.Tensor) -> MixtureHead:
    """A head that ignores its input: the last layer's bias is the distribution."""
    head = MixtureHead(config_of(4, means.shape[-1], components=means.shape[-2]))
    raw = variances.expm1().log()  # the inverse of softplus
    last = cast(nn.Linear, head.mlp[-1])
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.cat([means.flatten(), raw.flatten(), log_weights.flatten()]))
    return head


def drawn(head: Head, seed: int, samples: int, places: int = 1, **sampling: float) -> torch.Tensor:
    generators = [generator_for(seed, i) for i in range(samples)]
    return head.sample(torch.zeros(samples, places, 4), generators, SamplingConfig(**sampling))  # type: ignore[arg-type]


def component_of(draws: torch.Tensor) -> torch.Tensor:
    return (draws[:, :, None] - MEANS).square().sum(-1).argmin(-1)


def test_draws_have_the_mixtures_weights_means_and_variances() -> None:
    draws = drawn(head_with(MEANS, VARIANCES, LOG_WEIGHTS), 0, 4000)
    component = component_of(draws)[:, 0]
    for m in range(3):
        chosen = draws[component == m, 0]
        assert len(chosen) / 4000 == pytest.approx(LOG_WEIGHTS[0, m].exp().item(), abs=0.03)
        torch.testing.assert_close(chosen.mean(0), MEANS[0, 0, m], rtol=0, atol=0.06)
        torch.testing.assert_close(chosen.var(0), VARIANCES[0, 0, m], rtol=0.15, atol=0)


def test_a_component_is_chosen_for_all_places_of_a_group() -> None:
    component = component_of(drawn(head_with(MEANS, VARIANCES, LOG_WEIGHTS), 0, 200, places=3))
    assert len(set(component[:, 0].tolist())) == 3 and (component == component[:, :1]).all()


def test_variance_scale_narrows_draws_and_zero_gives_the_mean() -> None:
    head = head_with(MEANS, VARIANCES, LOG_WEIGHTS)
    draws = drawn(head, 1, 300, variance_scale=0.01)
    to_component = (draws[:, :, None] - MEANS).abs() / VARIANCES.sqrt()
    assert to_component.amax(-1).amin(-1).max() < 0.5  # 0.01 × variance is 0.1 × deviation
    without_chance = drawn(head, 2, 300, variance_scale=0.0)
    expected = (LOG_WEIGHTS.exp().unsqueeze(-1) * MEANS[0]).sum(-2).expand(300, 1, -1)
    torch.testing.assert_close(without_chance, expected)
    torch.testing.assert_close(mixture_mean(MEANS, LOG_WEIGHTS).expand(300, -1, -1), expected)


def test_temperature_sharpens_the_choice_of_component_down_to_the_likeliest() -> None:
    head, likeliest = head_with(MEANS, VARIANCES, LOG_WEIGHTS), LOG_WEIGHTS[0].argmax()
    for temperature in (0.0, 0.5, 1.0):
        component = component_of(drawn(head, 1, 2000, variance_scale=0.01, temperature=temperature))
        expected = 1.0 if temperature == 0 else (LOG_WEIGHTS[0] / temperature).softmax(-1)[likeliest].item()
        assert (component == likeliest).float().mean().item() == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("head", [head for head in EVERY if not isinstance(head, FlowHead)])  # guided by its velocity
def test_guidance_extrapolates_from_the_null_mean(head: Head) -> None:
    hidden, null_hidden = torch.randn(4, 1, 6), torch.randn(4, 1, 6)
    generators = [generator_for(0, i) for i in range(4)]
    guided = head.sample(hidden, generators, SamplingConfig(guidance=2.5, variance_scale=0.0), null_hidden)
    conditional, null = head.mean(hidden), head.mean(null_hidden)
    torch.testing.assert_close(guided, null + 2.5 * (conditional - null))


def test_regression_loss_is_the_mean_squared_error() -> None:
    head = RegressionHead(config_of(6, 5))
    hidden, target = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 5)
    squared = torch.nn.functional.mse_loss(head.mlp(hidden), target, reduction="none")
    torch.testing.assert_close(head.loss(hidden, target), squared.mean((-2, -1)))


@pytest.mark.parametrize("places", [1, 2])
def test_a_flow_learns_two_points_and_draws_them_with_their_shares(places: int) -> None:
    # Hidden state 0 stands for tokens at +1 (a quarter) or −1, all places alike; hidden state 1 for +1 alone.
    torch.manual_seed(0)
    head = FlowHead(config_of(1, 2, places, width=64, depth=2))
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 3e-3 if step < 450 else 2e-4
        given = torch.randint(0, 2, (256, 1, 1), generator=generator).float()
        sign = torch.where((torch.rand(256, 1, 1, generator=generator) < 0.25) | (given == 1), 1.0, -1.0)
        loss = head.loss(given.expand(-1, places, 1), sign.expand(-1, places, 2), generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        given = torch.arange(2.0).repeat_interleave(600)[:, None, None].expand(-1, places, 1)
        draws = head.sample(given, [generator_for(0, i) for i in range(1200)], SamplingConfig(flow_steps=20))
        at_one = draws[:, 0, 0] > 0
        assert at_one[:600].float().mean().item() == pytest.approx(0.25, abs=0.06)
        assert at_one[600:].float().mean().item() > 0.99
        assert ((draws.sign() - draws).abs() < 0.4).float().mean() > 0.9  # near one of the two points …
        assert (draws.sign() == draws[:, :1, :1].sign()).float().mean() > 0.95  # … and all of a group at the same
        torch.testing.assert_close(head.mean(given)[0], torch.full((places, 2), -0.5), rtol=0, atol=0.3)


def test_flow_guidance_leads_away_from_the_null_velocity() -> None:
    head = FlowHead(config_of(6, 5))
    nn.init.normal_(head.write.weight)
    hidden, null_hidden = torch.randn(3, 1, 6), torch.randn(3, 1, 6)

    def sampled(guidance: float, null: torch.Tensor | None) -> torch.Tensor:
        generators = [generator_for(0, i) for i in range(3)]
        return head.sample(hidden, generators, SamplingConfig(guidance=guidance, flow_steps=1), null)

    plain, none = sampled(1.0, None), sampled(0.0, null_hidden)
    torch.testing.assert_close(sampled(2.5, null_hidden), none + 2.5 * (plain - none))


def test_a_flows_loss_is_the_same_every_time_in_eval_mode_and_drawn_in_training() -> None:
    head = FlowHead(config_of(6, 5)).eval()
    hidden, target = torch.randn(7, 1, 6), torch.randn(7, 1, 5)
    assert torch.equal(head.loss(hidden, target), head.loss(hidden, target))
    head.train()
    seeded = [head.loss(hidden, target, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


@pytest.mark.parametrize("head", EVERY)
def test_a_draw_depends_on_its_own_generator_only(head: Head) -> None:
    places = 4 if isinstance(head, FlowHead) and head.blocks[0].mix is not None else 1
    hidden = torch.randn(3, places, 6)
    together = head.sample(hidden, [generator_for(i) for i in range(3)], SamplingConfig())
    alone = head.sample(hidden[2:], [generator_for(2)], SamplingConfig())
    torch.testing.assert_close(together[2:], alone)


def test_every_name_of_a_head_has_its_class() -> None:
    assert set(HEADS) == set(get_args(HeadName))
    assert all(issubclass(head, Head) for head in HEADS.values())
