"""From hidden states to deep tokens: their loss in training, a draw from their distribution in generation.

A head predicts `p` tokens together, one hidden state each: the next token (p = 1) or all tokens of a key frame. It owns
guidance, because how a conditional and an unconditional prediction combine depends on what is predicted: distributions
combine by their means, flows by their velocities. `HEADS` at the end of this file names every head.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dicode.lm.config import DeepLMConfig
from dicode.tokenizer.config import SamplingConfig

GroupHidden = Float[Tensor, "*group p width"]  # p tokens predicted together …
GroupTokens = Float[Tensor, "*group p d"]
GroupLoss = Float[Tensor, "*group"]
StepHidden = Float[Tensor, "b p width"]  # … and the same at a step of generation, a group a sample
StepTokens = Float[Tensor, "b p d"]
Components = Float[Tensor, "*group p m d"]
LogWeights = Float[Tensor, "*group m"]

SMALLEST_VARIANCE = 1e-5  # published; keeps the likelihood finite where a component collapses onto a token
DRAWS = 4  # times and noises of a flow for every group at a training step, as in MAR: they share the transformer's pass


@runtime_checkable
class Head(Protocol):
    """Any module with these three methods that is built from a `DeepLMConfig`.

    `DeepTokenLM` gives its linear layers N(0, 0.02²) weights and zero biases, unless it has an attribute
    `initialises_itself`.
    """

    def loss(self, hidden: GroupHidden, target: GroupTokens, generator: torch.Generator | None = None) -> GroupLoss:
        """The float32 loss of each group, comparable between token widths and group sizes.

        `generator` is for a loss that draws (a flow's times and noise; default: torch's own).
        """

    def mean(self, hidden: GroupHidden) -> GroupTokens:
        """The expected tokens, float32."""

    def sample(
        self,
        hidden: StepHidden,
        generators: Sequence[torch.Generator],
        sampling: SamplingConfig,
        null_hidden: StepHidden | None = None,
    ) -> StepTokens:
        """The tokens of one group a sample, float32, drawn from that sample's own CPU generator.

        `null_hidden` belongs to the null prompt, from which guidance leads away.
        """


class MixtureHead(nn.Module):
    """A Gaussian mixture with diagonal covariance over the tokens of a group.

    A component covers the whole group: its logit is the mean over the hidden states of the group's tokens.
    The last layer predicts 2·m·d + m numbers: means, variances before softplus, and component logits, in this order and
    component by component. It runs in float32, whatever the rest of the model runs in.

    `token_variance` is added to every variance. Without it (0, as published) variances collapse, their gradients drown
    those of the component logits, and draws take wrong components: in a memorising test, squared error 0.14–1.3 at 0,
    0.02–0.7 at 0.01, 0.0004–0.07 at 0.03.
    """

    def __init__(self, config: DeepLMConfig) -> None:
        super().__init__()
        self.components = 1 if config.head.kind == "gaussian" else config.head.components
        self.token_variance = config.head.token_variance
        self.mlp = _mlp(config.body.width, 2 * self.components * config.token_width + self.components)

    def distribution(self, hidden: GroupHidden) -> tuple[Components, Components, LogWeights]:
        means, variances, logits = split_mixture(_in_float32(self.mlp, hidden), self.components)
        return means, variances + self.token_variance, logits.mean(-2).log_softmax(-1)

    def loss(self, hidden: GroupHidden, target: GroupTokens, generator: torch.Generator | None = None) -> GroupLoss:
        """Negative log-likelihood in nats, divided by p·d."""
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
        sampling: SamplingConfig,
        null_hidden: StepHidden | None = None,
    ) -> StepTokens:
        """Draw a component, then its tokens with scaled variance; a scale of 0 gives the mixture's mean instead.

        A temperature below 1 favours likely components, 0 takes the likeliest. Guidance moves the draw by
        (guidance − 1) × (mean − null mean), so that at scale 0 it is the published
        null mean + guidance × (mean − null mean).
        """
        means, variances, log_weights = self.distribution(hidden)
        mean = mixture_mean(means, log_weights)
        drawn = mean
        if sampling.variance_scale > 0:
            if sampling.temperature == 0:
                weights = torch.zeros_like(log_weights).scatter(-1, log_weights.argmax(-1, keepdim=True), 1.0)
            else:
                weights = (log_weights / sampling.temperature).softmax(-1)
            drawn = _draw(means, variances * sampling.variance_scale, weights, generators)
        return drawn if null_hidden is None else drawn + (sampling.guidance - 1) * (mean - self.mean(null_hidden))


class RegressionHead(nn.Module):
    """The deep tokens themselves, trained by mean squared error and guided like the mixture's mean: nothing to draw."""

    def __init__(self, config: DeepLMConfig) -> None:
        super().__init__()
        self.mlp = _mlp(config.body.width, config.token_width)

    def loss(self, hidden: GroupHidden, target: GroupTokens, generator: torch.Generator | None = None) -> GroupLoss:
        return (self.mean(hidden) - target.float()).square().mean((-2, -1))

    def mean(self, hidden: GroupHidden) -> GroupTokens:
        return _in_float32(self.mlp, hidden)

    def sample(
        self,
        hidden: StepHidden,
        generators: Sequence[torch.Generator],
        sampling: SamplingConfig,
        null_hidden: StepHidden | None = None,
    ) -> StepTokens:
        mean = self.mean(hidden)
        return mean if null_hidden is None else mean + (sampling.guidance - 1) * (mean - self.mean(null_hidden))


class Modulation(NamedTuple):
    """What is added to a block's normalised input, after the factor `scale`; and the factor of its output."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class FlowHead(nn.Module):
    """A small network that predicts the velocities of all tokens of a group; a draw takes a few Euler steps.

    Each token has a residual MLP, modulated by time and hidden state (MAR, arXiv 2406.11838, section 3.4, there with
    noise prediction); where a group has several tokens, every block also mixes them (MLP-Mixer, arXiv 2105.01601).
    Targets and noise schedule are those of the decoder's `flow`: x_σ = (1 − σ)·x + σ·noise, the velocity noise − x,
    σ logit-normal in training and in equal steps from 1 to 0 in generation.
    """

    initialises_itself = True  # zero outputs and adaLN-Zero must stay

    def __init__(self, config: DeepLMConfig) -> None:
        super().__init__()
        places = config.block_tokens if config.order == "keyframe" else 1
        self.token_width, width = config.token_width, config.head.width
        self.read = nn.Linear(self.token_width, width)
        self.condition = nn.Linear(config.body.width, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_FlowBlock(width, places) for _ in range(config.head.depth))
        self.write = nn.Linear(width, self.token_width)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def velocity(
        self, noisy: Float[Tensor, "*group p d"], sigma: Float[Tensor, "*group"], hidden: GroupHidden
    ) -> GroupTokens:
        """The expectation of `noise − tokens`, float32, at these shares of noise."""
        return self._velocity(noisy, self._condition(sigma, hidden))

    def _condition(self, sigma: Tensor, hidden: Tensor) -> Tensor:
        """What all blocks read of hidden states and noise, whose shapes are broadcast: `*group p width`."""
        time = self.time(_waves(sigma).to(self.condition.weight.dtype)).unsqueeze(-2)
        return F.silu(self.condition(hidden) + time)

    def _velocity(self, noisy: Tensor, condition: Tensor | Sequence[Modulation]) -> Tensor:
        """By the condition, or by each block's modulation from it."""
        x = self.read(noisy.to(self.read.weight.dtype))
        for number, block in enumerate(self.blocks):
            x = block(x, condition if isinstance(condition, Tensor) else condition[number])
        return self.write(F.layer_norm(x, x.shape[-1:])).float()

    def loss(self, hidden: GroupHidden, target: GroupTokens, generator: torch.Generator | None = None) -> GroupLoss:
        """Mean squared error of the velocity. In eval mode the draws are always the same, so that losses compare."""
        if generator is None and not self.training:
            generator = torch.Generator().manual_seed(0)
        device = target.device if generator is None else generator.device
        target = target.float().expand(DRAWS, *target.shape)
        sigma = torch.sigmoid(torch.randn(target.shape[:-2], generator=generator, device=device)).to(target)
        noise = torch.randn(target.shape, generator=generator, device=device).to(target)
        share = sigma[..., None, None]
        predicted = self._velocity((1 - share) * target + share * noise, self._condition(sigma, hidden))
        return (predicted - (noise - target)).square().mean((0, -2, -1))

    def mean(self, hidden: GroupHidden) -> GroupTokens:
        """The expected tokens: at σ = 1 the input holds nothing of them, and the velocity is noise − mean."""
        noise = torch.zeros(*hidden.shape[:-1], self.token_width, device=hidden.device)
        return -self.velocity(noise, noise.new_ones(hidden.shape[:-2]), hidden)

    def sample(
        self,
        hidden: StepHidden,
        generators: Sequence[torch.Generator],
        sampling: SamplingConfig,
        null_hidden: StepHidden | None = None,
    ) -> StepTokens:
        """From noise, its variance scaled, in `flow_steps` Euler steps of null + guidance·(velocity − null)."""
        steps, p = sampling.flow_steps, hidden.shape[1]
        noise = torch.stack([torch.randn(p, self.token_width, generator=g) for g in generators])
        tokens = noise.to(hidden.device)
        if sampling.variance_scale != 1.0:
            tokens = tokens * sampling.variance_scale**0.5
        both = hidden if null_hidden is None else torch.cat([hidden, null_hidden])
        sigma = torch.arange(steps, 0, -1, device=hidden.device) / steps
        condition = self._condition(sigma[:, None], both)  # of all steps at once, as what blocks make of it
        modulations = [cast(_FlowBlock, block).modulation_of(condition) for block in self.blocks]
        for step in range(steps):
            of_step = [Modulation(*(part[step] for part in own)) for own in modulations]
            if null_hidden is None:
                velocity = self._velocity(tokens, of_step)
            else:
                velocity, null = self._velocity(tokens.repeat(2, 1, 1), of_step).chunk(2)
                velocity = null + sampling.guidance * (velocity - null)
            tokens = tokens - velocity / steps
        return tokens


class _FlowBlock(nn.Module):
    """x + gate · MLP(modulated norm of x), after a mixing of places where there are several."""

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.mix = nn.Linear(places, places) if places > 1 else None
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)  # every block begins as the identity (adaLN-Zero)
        nn.init.zeros_(self.modulation.bias)

    def modulation_of(self, condition: Tensor) -> Modulation:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return Modulation(shift, 1 + scale, gate)

    def forward(self, x: Tensor, condition: Tensor | Modulation) -> Tensor:
        shift, scale, gate = self.modulation_of(condition) if isinstance(condition, Tensor) else condition
        if self.mix is not None:
            normed = rearrange(F.layer_norm(x, x.shape[-1:]), "... p width -> ... width p")
            x = x + rearrange(self.mix(normed), "... width p -> ... p width")
        # not torch.addcmul, which rounds by a number's place in memory: a sample would depend on its batch
        return x + gate * self.mlp(F.layer_norm(x, x.shape[-1:]) * scale + shift)


def _waves(sigma: Float[Tensor, "*group"]) -> Float[Tensor, "*group waves"]:
    """Sines and cosines of the share of noise, periods from 1/100 to 4 of its range."""
    rates = 2 * torch.pi * torch.logspace(-0.6, 2.0, 32, device=sigma.device)
    angles = sigma.float().unsqueeze(-1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def split_mixture(
    parameters: Float[Tensor, "*group p numbers"], components: int
) -> tuple[Components, Components, Float[Tensor, "*group p m"]]:
    """Means, variances and component logits of a mixture from the numbers that a network predicts."""
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


def _draw(
    means: Float[Tensor, "b p m d"],
    variances: Float[Tensor, "b p m d"],
    weights: Float[Tensor, "b m"],
    generators: Sequence[torch.Generator],
) -> StepTokens:
    # All draws are on the CPU, one row a sample, so that neither device nor batch changes them.
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
    """A head's layers with the last one in float32: bfloat16's three digits would blur means and variances."""
    between, last = mlp[:-1](hidden), cast(nn.Linear, mlp[-1])
    meta = hidden.device.type == "meta"  # sizing counts there; torch has no autocast for it, not even to switch off
    with nullcontext() if meta else torch.autocast(hidden.device.type, enabled=False):
        return F.linear(between.float(), last.weight.float(), last.bias.float())


HEADS: dict[str, type[nn.Module]] = {
    "mixture": MixtureHead,
    "gaussian": MixtureHead,  # of one component
    "regression": RegressionHead,
    "flow": FlowHead,
}
