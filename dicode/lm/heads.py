"""From hidden states to deep tokens: their loss in training, a draw from their distribution in use.

A head predicts `p` tokens together, one hidden state each: the next token (p = 1) or all tokens of a key frame. It owns
guidance, because how a conditional and an unconditional prediction combine depends on what is predicted: distributions
by their means here, a flow by its velocities (flow_head.py).
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

GroupHidden = Float[Tensor, "*group p width"]  # p tokens predicted together …
GroupTokens = Float[Tensor, "*group p d"]
GroupLoss = Float[Tensor, "*group"]
StepHidden = Float[Tensor, "b p width"]  # … and the same at a step of generation, a group a sample
StepTokens = Float[Tensor, "b p d"]
Components = Float[Tensor, "*group p m d"]
LogWeights = Float[Tensor, "*group m"]

SMALLEST_VARIANCE = 1e-5  # published; keeps the likelihood finite where a component collapses onto a token


@dataclass(frozen=True)
class TokenSampling:
    """How tokens are drawn from what a head predicts. A head passes over what its kind of prediction does not have."""

    guidance: float = 1.0  # against the null prompt: 1 is the plain conditional
    variance_scale: float = 1.0  # of a distribution's variance, or of a flow's first noise; 0 leaves no chance
    temperature: float = 1.0  # of the choice between a mixture's components, down to 0, the likeliest
    flow_steps: int = 8  # Euler steps of a flow

    def __post_init__(self) -> None:
        for name in ("variance_scale", "temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.flow_steps < 1:
            raise ValueError(f"flow_steps: expected at least 1, got {self.flow_steps}")


@runtime_checkable
class Head(Protocol):
    """What the language model asks of a head; any module with these three fits."""

    def loss(self, hidden: GroupHidden, target: GroupTokens, generator: torch.Generator | None = None) -> GroupLoss:
        """The float32 loss of each group, comparable between token widths and group sizes.

        `generator` is of a loss that draws (a flow's times and noise; default: torch's own).
        """

    def mean(self, hidden: GroupHidden) -> GroupTokens:
        """The expected tokens, float32."""

    def sample(
        self,
        hidden: StepHidden,
        generators: Sequence[torch.Generator],
        sampling: TokenSampling,
        null_hidden: StepHidden | None = None,
    ) -> StepTokens:
        """The tokens of one group a sample, float32, drawn from that sample's own CPU generator.

        `null_hidden` is of the null prompt, from which guidance leads away.
        """


class MixtureHead(nn.Module):
    """A Gaussian mixture with diagonal covariance over the tokens of a group; one component makes it a Gaussian.

    A component is one of the whole group: its logit is the mean of those that each token's hidden state gives.
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

    def distribution(self, hidden: GroupHidden) -> tuple[Components, Components, LogWeights]:
        """Means, variances and log-weights of the components."""
        means, variances, logits = split_mixture(_in_float32(self.mlp, hidden), self.components)
        return means, variances + self.token_variance, logits.mean(-2).log_softmax(-1)

    def loss(self, hidden: GroupHidden, target: GroupTokens, generator: torch.Generator | None = None) -> GroupLoss:
        """Negative log-likelihood in nats, divided by the count of numbers it is of."""
        p, d = target.shape[-2:]
        return mixture_nll(*self.distribution(hidden), target.float()) / (p * d)

    def mean(self, hidden: GroupHidden) -> GroupTokens:
        """The mixture's mean, not that of its likeliest component."""
        means, _, log_weights = self.distribution(hidden)
        return mixture_mean(means, log_weights)

    def sample(
        self,
        hidden: StepHidden,
        generators: Sequence[torch.Generator],
        sampling: TokenSampling,
        null_hidden: StepHidden | None = None,
    ) -> StepTokens:
        """Draw a component, then tokens of it with its variance scaled; a scale of 0 gives the mixture's mean instead.

        A temperature below 1 chooses likely components yet more often, 0 the likeliest. Unlike a mean it blends none.

        Guidance moves the draw by (guidance − 1) × (mean − null mean), so that at scale 0 it is the published
        null mean + guidance × (mean − null mean).
        """
        means, variances, log_weights = self.distribution(hidden)
        mean = mixture_mean(means, log_weights)
        drawn = mean
        if sampling.variance_scale > 0:
            weights = tempered(log_weights, sampling.temperature)
            drawn = _draw(means, variances * sampling.variance_scale, weights, generators)
        return drawn if null_hidden is None else drawn + (sampling.guidance - 1) * (mean - self.mean(null_hidden))


class RegressionHead(nn.Module):
    """The deep tokens themselves, trained by mean squared error: no distribution, hence nothing to draw."""

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.mlp = _mlp(width, token_width)

    def loss(self, hidden: GroupHidden, target: GroupTokens, generator: torch.Generator | None = None) -> GroupLoss:
        """Mean squared error over the group's numbers."""
        return (self.mean(hidden) - target.float()).square().mean((-2, -1))

    def mean(self, hidden: GroupHidden) -> GroupTokens:
        """The predicted tokens."""
        return _in_float32(self.mlp, hidden)

    def sample(
        self,
        hidden: StepHidden,
        generators: Sequence[torch.Generator],
        sampling: TokenSampling,
        null_hidden: StepHidden | None = None,
    ) -> StepTokens:
        """The predicted tokens, guided like the mixture's mean; all that concerns chance has nothing to act on."""
        mean = self.mean(hidden)
        return mean if null_hidden is None else mean + (sampling.guidance - 1) * (mean - self.mean(null_hidden))


def split_mixture(
    parameters: Float[Tensor, "*group p numbers"], components: int
) -> tuple[Components, Components, Float[Tensor, "*group p m"]]:
    """Read means, variances and component logits of a mixture from the numbers that a network gives."""
    width = (parameters.shape[-1] - components) // 2
    means, raw_variances, logits = parameters.split((width, width, components), dim=-1)
    variances = F.softplus(raw_variances).clamp(min=SMALLEST_VARIANCE)
    return means.unflatten(-1, (components, -1)), variances.unflatten(-1, (components, -1)), logits


def mixture_nll(means: Components, variances: Components, log_weights: LogWeights, target: GroupTokens) -> GroupLoss:
    """−log p(target) in nats, summed over the group's tokens and their width."""
    squared = (target.unsqueeze(-2) - means).square() / variances
    log_density = -0.5 * (squared + variances.log() + math.log(2 * math.pi)).sum((-3, -1))
    return -torch.logsumexp(log_weights + log_density, dim=-1)


def mixture_mean(means: Components, log_weights: LogWeights) -> GroupTokens:
    """The components' means, weighted."""
    return (log_weights.exp()[..., None, :, None] * means).sum(-2)


def tempered(log_weights: Float[Tensor, "b m"], temperature: float) -> Float[Tensor, "b m"]:
    """Weights raised to 1/temperature and normalised; at 0 all weight is on the likeliest component."""
    if temperature == 0:
        return torch.zeros_like(log_weights).scatter(-1, log_weights.argmax(-1, keepdim=True), 1.0)
    return (log_weights / temperature).softmax(-1)


def _draw(
    means: Float[Tensor, "b p m d"],
    variances: Float[Tensor, "b p m d"],
    weights: Float[Tensor, "b m"],
    generators: Sequence[torch.Generator],
) -> StepTokens:
    # All chance is drawn on the CPU, one row a sample, so that neither device nor batch changes it.
    p, m, d = means.shape[1:]
    uniform = torch.cat([torch.rand(1, generator=g) for g in generators]).to(means.device)
    normal = torch.stack([torch.randn(p, d, generator=g) for g in generators]).to(means.device)
    below = weights.cumsum(-1) <= uniform.unsqueeze(-1)  # a draw of 0 takes no component of weight 0
    component = below.sum(-1).clamp(max=m - 1)  # the sum of weights may round to just below 1
    row = torch.arange(len(means), device=means.device)
    return means[row, :, component] + variances[row, :, component].sqrt() * normal


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))


def _in_float32(mlp: nn.Sequential, hidden: GroupHidden) -> Float[Tensor, "*group p numbers"]:
    """Run a head's layers with the last one in float32: bfloat16's three digits would blur means and variances."""
    between, last = mlp[:-1](hidden), cast(nn.Linear, mlp[-1])
    meta = hidden.device.type == "meta"  # sizing counts there; torch has no autocast for it, not even to switch off
    with nullcontext() if meta else torch.autocast(hidden.device.type, enabled=False):
        return F.linear(between.float(), last.weight.float(), last.bias.float())
