"""Heads: the distribution over the next deep token, against torch.distributions and by counting draws."""

from typing import cast

import pytest
import torch
from torch import distributions as D
from torch import nn

from dicode.lm.heads import MixtureHead, RegressionHead, mixture_mean, mixture_nll, split_mixture
from dicode.seeds import generator_for

MEANS = torch.tensor([[[-4.0, 1.0], [2.0, 0.0], [6.0, -3.0]]])
VARIANCES = torch.tensor([[[0.04, 0.09], [0.25, 0.01], [0.16, 0.36]]])
LOG_WEIGHTS = torch.tensor([[0.2, 0.5, 0.3]]).log()


def reference_mixture(means: torch.Tensor, variances: torch.Tensor, log_weights: torch.Tensor) -> D.MixtureSameFamily:
    return D.MixtureSameFamily(
        D.Categorical(logits=log_weights), D.Independent(D.Normal(means, variances.sqrt(), validate_args=False), 1)
    )


@pytest.mark.parametrize("components", [1, 5])
def test_mixture_likelihood_is_that_of_torch_distributions(components: int) -> None:
    torch.manual_seed(0)
    hidden, target = torch.randn(2, 3, 12), torch.randn(2, 3, 7)
    head = MixtureHead(12, 7, components, token_variance=0.2)
    assert head.distribution(hidden)[1].min() > 0.2
    expected = -reference_mixture(*head.distribution(hidden)).log_prob(target) / 7
    torch.testing.assert_close(head.loss(hidden, target), expected, rtol=1e-5, atol=1e-5)


def test_mixture_likelihood_is_finite_where_variances_collapse() -> None:
    parameters = torch.cat([torch.zeros(1, 8), torch.full((1, 8), -200.0), torch.zeros(1, 2)], dim=-1)
    means, variances, log_weights = split_mixture(parameters, 2)
    assert variances.min() == pytest.approx(1e-5)
    target = torch.full((1, 4), 0.01)
    expected = -reference_mixture(means, variances, log_weights).log_prob(target)
    torch.testing.assert_close(mixture_nll(means, variances, log_weights, target), expected, rtol=1e-5, atol=1e-5)


def head_with(means: torch.Tensor, variances: torch.Tensor, log_weights: torch.Tensor) -> MixtureHead:
    """A head that ignores its input: the last layer's bias is the distribution."""
    head = MixtureHead(4, means.shape[-1], means.shape[-2])
    raw = variances.expm1().log()  # the inverse of softplus
    last = cast(nn.Linear, head.mlp[-1])
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.cat([means.flatten(), raw.flatten(), log_weights.flatten()]))
    return head


def test_draws_have_the_mixtures_weights_means_and_variances() -> None:
    head = head_with(MEANS, VARIANCES, LOG_WEIGHTS)
    generators = [generator_for(0, i) for i in range(4000)]
    draws = head.sample(torch.zeros(4000, 4), generators)
    component = (draws[:, None] - MEANS).square().sum(-1).argmin(-1)
    for m in range(3):
        chosen = draws[component == m]
        assert len(chosen) / 4000 == pytest.approx(LOG_WEIGHTS[0, m].exp().item(), abs=0.03)
        torch.testing.assert_close(chosen.mean(0), MEANS[0, m], rtol=0, atol=0.06)
        torch.testing.assert_close(chosen.var(0), VARIANCES[0, m], rtol=0.15, atol=0)


def test_variance_scale_narrows_draws_and_zero_gives_the_mean() -> None:
    head = head_with(MEANS, VARIANCES, LOG_WEIGHTS)
    hidden = torch.zeros(300, 4)
    draws = head.sample(hidden, [generator_for(1, i) for i in range(300)], variance_scale=0.01)
    to_component = (draws[:, None] - MEANS).abs() / VARIANCES.sqrt()
    assert to_component.amax(-1).amin(-1).max() < 0.5  # 0.01 × variance is 0.1 × deviation
    without_chance = head.sample(hidden, [generator_for(2, i) for i in range(300)], variance_scale=0.0)
    expected = (LOG_WEIGHTS.exp().unsqueeze(-1) * MEANS).sum(-2).expand(300, -1)
    torch.testing.assert_close(without_chance, expected)
    torch.testing.assert_close(mixture_mean(MEANS, LOG_WEIGHTS).expand(300, -1), expected)


def test_temperature_sharpens_the_choice_of_component_down_to_the_likeliest() -> None:
    head = head_with(MEANS, VARIANCES, LOG_WEIGHTS)
    hidden, likeliest = torch.zeros(2000, 4), LOG_WEIGHTS[0].argmax()
    for temperature in (0.0, 0.5, 1.0):
        generators = [generator_for(1, i) for i in range(2000)]
        draws = head.sample(hidden, generators, variance_scale=0.01, temperature=temperature)
        component = (draws[:, None] - MEANS).square().sum(-1).argmin(-1)
        expected = 1.0 if temperature == 0 else (LOG_WEIGHTS[0] / temperature).softmax(-1)[likeliest].item()
        assert (component == likeliest).float().mean().item() == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("head", [MixtureHead(6, 5, 3), RegressionHead(6, 5)])
def test_guidance_extrapolates_from_the_null_mean(head: MixtureHead | RegressionHead) -> None:
    hidden, null_hidden = torch.randn(4, 6), torch.randn(4, 6)
    generators = [generator_for(0, i) for i in range(4)]
    guided = head.sample(hidden, generators, variance_scale=0.0, null_hidden=null_hidden, guidance=2.5)
    conditional, null = head.mean(hidden), head.mean(null_hidden)
    torch.testing.assert_close(guided, null + 2.5 * (conditional - null))


def test_regression_loss_is_the_mean_squared_error() -> None:
    head = RegressionHead(6, 5)
    hidden, target = torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    loss = head.loss(hidden, target)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(head.mlp(hidden), target, reduction="none").mean(-1))
