"""From a hidden state to the next deep token: its loss in training, a draw from its distribution in use.

A head owns guidance, because how a conditional and an unconditional prediction combine depends on what is predicted:
distributions by their means here, a flow by its velocities.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PlacedHidden = Float[Tensor, "*place width"]
PlacedTokens = Float[Tensor, "*place d"]
PlacedLoss = Float[Tensor, "*place"]
StepHidden = Float[Tensor, "b width"]
StepTokens = Float[Tensor, "b d"]

SMALLEST_VARIANCE = 1e-5  # published; keeps the likelihood finite where a component collapses onto a token


@runtime_checkable
class Head(Protocol):
    """What the language model asks of a head; any module with these three fits."""

    def loss(self, hidden: PlacedHidden, target: PlacedTokens) -> PlacedLoss:
        """The float32 loss of each place, comparable between token widths."""

    def mean(self, hidden: PlacedHidden) -> PlacedTokens:
        """The expected token of each place, float32."""

    def sample(
        self,
        hidden: StepHidden,
        generators: Sequence[torch.Generator],
        *,
        variance_scale: float = 1.0,
        temperature: float = 1.0,
        null_hidden: StepHidden | None = None,
        guidance: float = 1.0,
    ) -> StepTokens:
        """One token a sample, float32, drawn from that sample's own CPU generator."""


class MixtureHead(nn.Module):
    """A Gaussian mixture with diagonal covariance over the next deep token; one component makes it a plain Gaussian.

    The last layer gives 2·m·d + m numbers: means, variances before softplus, and component logits, in this order and
    component by component. It runs in float32, whatever the rest of the model runs in.

    `token_variance` is added to every variance: what is below it counts as noise of the tokens. Without it (0, as
    published) variances collapse, their gradients drown those of the component logits, and draws take wrong
    components: in a memorising test, squared error 0.14–1.3 at 0, 0.02–0.7 at 0.01, 0.0004–0.07 at 0.03.
    """

    def __init__(self, width: int, token_width: int, components: int = 16, token_variance: float = 0.0) -> None:
        super().__init__()
        self.token_width, self.components, self.token_variance = token_width, components, token_variance
        self.mlp = _mlp(width, 2 * components * token_width + components)

    def distribution(
        self, hidden: PlacedHidden
    ) -> tuple[Float[Tensor, "*place m d"], Float[Tensor, "*place m d"], Float[Tensor, "*place m"]]:
        """Means, variances and log-weights of the components."""
        means, variances, log_weights = split_mixture(_in_float32(self.mlp, hidden), self.components)
        return means, variances + self.token_variance, log_weights

    def loss(self, hidden: PlacedHidden, target: PlacedTokens) -> PlacedLoss:
        """Negative log-likelihood in nats, divided by the token width."""
        return mixture_nll(*self.distribution(hidden), target.float()) / self.token_width

    def mean(self, hidden: PlacedHidden) -> PlacedTokens:
        """The mixture's mean, not that of its likeliest component."""
        means, _, log_weights = self.distribution(hidden)
        return mixture_mean(means, log_weights)

    def sample(
        self,
        hidden: StepHidden,
        generators: Sequence[torch.Generator],
        *,
        variance_scale: float = 1.0,
        temperature: float = 1.0,
        null_hidden: StepHidden | None = None,
        guidance: float = 1.0,
    ) -> StepTokens:
        """Draw a component, then a token of it with its variance scaled; a scale of 0 gives the mixture's mean instead.

        `temperature` is of the choice between components: below 1 likely ones are chosen yet more often, 0 takes the
        likeliest. Unlike a mean it blends none of them.

        Guidance moves the draw by (guidance − 1) × (mean − null mean), so that at scale 0 it is the published
        null mean + guidance × (mean − null mean).
        """
        means, variances, log_weights = self.distribution(hidden)
        mean = mixture_mean(means, log_weights)
        drawn = mean
        if variance_scale > 0:
            weights = tempered(log_weights, temperature)
            drawn = _draw(means, variances * variance_scale, weights, generators)
        return drawn if null_hidden is None else drawn + (guidance - 1) * (mean - self.mean(null_hidden))


class RegressionHead(nn.Module):
    """The next deep token itself, trained by mean squared error: no distribution, hence nothing to draw."""

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.mlp = _mlp(width, token_width)

    def loss(self, hidden: PlacedHidden, target: PlacedTokens) -> PlacedLoss:
        """Mean squared error over the token's width."""
        return (self.mean(hidden) - target.float()).square().mean(-1)

    def mean(self, hidden: PlacedHidden) -> PlacedTokens:
        """The predicted token."""
        return _in_float32(self.mlp, hidden)

    def sample(
        self,
        hidden: StepHidden,
        generators: Sequence[torch.Generator],
        *,
        variance_scale: float = 1.0,
        temperature: float = 1.0,
        null_hidden: StepHidden | None = None,
        guidance: float = 1.0,
    ) -> StepTokens:
        """The predicted token, guided like the mixture's mean; all that concerns chance has nothing to act on."""
        mean = self.mean(hidden)
        return mean if null_hidden is None else mean + (guidance - 1) * (mean - self.mean(null_hidden))


def split_mixture(
    parameters: Float[Tensor, "*place p"], components: int
) -> tuple[Float[Tensor, "*place m d"], Float[Tensor, "*place m d"], Float[Tensor, "*place m"]]:
    """Read means, variances and log-weights of a mixture from the numbers that a network gives."""
    width = (parameters.shape[-1] - components) // 2
    means, raw_variances, logits = parameters.split((width, width, components), dim=-1)
    variances = F.softplus(raw_variances).clamp(min=SMALLEST_VARIANCE)
    return means.unflatten(-1, (components, -1)), variances.unflatten(-1, (components, -1)), logits.log_softmax(-1)


def mixture_nll(
    means: Float[Tensor, "*place m d"],
    variances: Float[Tensor, "*place m d"],
    log_weights: Float[Tensor, "*place m"],
    target: PlacedTokens,
) -> PlacedLoss:
    """−log p(target) in nats, summed over the token's width."""
    squared = (target.unsqueeze(-2) - means).square() / variances
    log_density = -0.5 * (squared + variances.log() + math.log(2 * math.pi)).sum(-1)
    return -torch.logsumexp(log_weights + log_density, dim=-1)


def mixture_mean(means: Float[Tensor, "*place m d"], log_weights: Float[Tensor, "*place m"]) -> PlacedTokens:
    """The components' means, weighted."""
    return (log_weights.exp().unsqueeze(-1) * means).sum(-2)


def tempered(log_weights: Float[Tensor, "b m"], temperature: float) -> Float[Tensor, "b m"]:
    """Weights raised to 1/temperature and normalised; at 0 all weight is on the likeliest component."""
    if temperature == 0:
        return torch.zeros_like(log_weights).scatter(-1, log_weights.argmax(-1, keepdim=True), 1.0)
    return (log_weights / temperature).softmax(-1)


def _draw(
    means: Float[Tensor, "b m d"],
    variances: Float[Tensor, "b m d"],
    weights: Float[Tensor, "b m"],
    generators: Sequence[torch.Generator],
) -> StepTokens:
    # All chance is drawn on the CPU, one row a sample, so that neither device nor batch changes it.
    uniform = torch.cat([torch.rand(1, generator=g) for g in generators]).to(means.device)
    normal = torch.stack([torch.randn(means.shape[-1], generator=g) for g in generators]).to(means.device)
    below = weights.cumsum(-1) <= uniform.unsqueeze(-1)  # a draw of 0 takes no component of weight 0
    component = below.sum(-1).clamp(max=means.shape[1] - 1)  # the sum of weights may round to just below 1
    row = torch.arange(len(means), device=means.device)
    return means[row, component] + variances[row, component].sqrt() * normal


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))


def _in_float32(mlp: nn.Sequential, hidden: PlacedHidden) -> Float[Tensor, "*place p"]:
    """Run a head's layers with the last one in float32: bfloat16's three digits would blur means and variances."""
    between, last = mlp[:-1](hidden), cast(nn.Linear, mlp[-1])
    meta = hidden.device.type == "meta"  # sizing counts there; torch has no autocast for it, not even to switch off
    with nullcontext() if meta else torch.autocast(hidden.device.type, enabled=False):
        return F.linear(between.float(), last.weight.float(), last.bias.float())
