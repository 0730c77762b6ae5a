"""Flow matching as a head: a small network turns noise into the next deep tokens, given their hidden states."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dicode.lm.heads import GroupHidden, GroupLoss, GroupTokens, StepHidden, StepTokens, TokenSampling

DRAWS = 4  # times and noises for every group at a training step, as in MAR: the transformer's pass serves all of them


class FlowHead(nn.Module):
    """A small network that predicts velocities of `places` tokens at once; drawing takes a few Euler steps.

    Each token has a residual MLP, modulated by time and hidden state (MAR, arXiv 2406.11838, section 3.4, there with
    noise prediction); where there are several tokens, every block also mixes them (MLP-Mixer, arXiv 2105.01601), since
    they are one picture. Targets and noise schedule are those of the decoder's `flow`: x_σ = (1 − σ)·x + σ·noise, the
    velocity noise − x, σ logit-normal in training and in equal steps from 1 to 0 in use.
    """

    def __init__(self, width: int, token_width: int, places: int = 1, hidden_width: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.token_width = token_width
        self.read = nn.Linear(token_width, hidden_width)
        self.condition = nn.Linear(width, hidden_width)
        self.time = nn.Sequential(nn.Linear(64, hidden_width), nn.SiLU(), nn.Linear(hidden_width, hidden_width))
        self.blocks = nn.ModuleList(_Block(hidden_width, places) for _ in range(depth))
        self.write = nn.Linear(hidden_width, token_width)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def velocity(
        self, noisy: Float[Tensor, "*group p d"], sigma: Float[Tensor, "*group"], hidden: GroupHidden
    ) -> GroupTokens:
        """What `noise − tokens` is on average, float32, at these shares of noise."""
        told = self.condition(hidden) + self.time(_waves(sigma).to(self.condition.weight.dtype)).unsqueeze(-2)
        x, told = self.read(noisy.to(told.dtype)), F.silu(told)
        for block in self.blocks:
            x = block(x, told)
        return self.write(F.layer_norm(x, x.shape[-1:])).float()

    def loss(self, hidden: GroupHidden, target: GroupTokens, generator: torch.Generator | None = None) -> GroupLoss:
        """Mean squared error of the velocity. In eval mode its draws are always the same, to be compared."""
        if generator is None and not self.training:
            generator = torch.Generator().manual_seed(0)
        device = target.device if generator is None else generator.device
        hidden, target = (x.expand(DRAWS, *x.shape) for x in (hidden, target.float()))
        sigma = torch.sigmoid(torch.randn(target.shape[:-2], generator=generator, device=device)).to(target)
        noise = torch.randn(target.shape, generator=generator, device=device).to(target)
        share = sigma[..., None, None]
        predicted = self.velocity((1 - share) * target + share * noise, sigma, hidden)
        return (predicted - (noise - target)).square().mean((0, -2, -1))

    def mean(self, hidden: GroupHidden) -> GroupTokens:
        """The expected tokens: at σ = 1 nothing of them is seen yet, and the velocity is noise − mean."""
        noise = torch.zeros(*hidden.shape[:-1], self.token_width, device=hidden.device)
        return -self.velocity(noise, noise.new_ones(hidden.shape[:-2]), hidden)

    def sample(
        self,
        hidden: StepHidden,
        generators: Sequence[torch.Generator],
        sampling: TokenSampling,
        null_hidden: StepHidden | None = None,
    ) -> StepTokens:
        """From noise, its variance scaled, in `flow_steps` Euler steps of null + guidance·(velocity − null)."""
        b, p = hidden.shape[:2]
        noise = torch.stack([torch.randn(p, self.token_width, generator=g) for g in generators])
        tokens = noise.to(hidden.device) * sampling.variance_scale**0.5
        for step in range(sampling.flow_steps):
            sigma = tokens.new_full((b,), 1 - step / sampling.flow_steps)
            velocity = self.velocity(tokens, sigma, hidden)
            if null_hidden is not None:
                null = self.velocity(tokens, sigma, null_hidden)
                velocity = null + sampling.guidance * (velocity - null)
            tokens = tokens - velocity / sampling.flow_steps
        return tokens


class _Block(nn.Module):
    """x + gate · MLP(modulated norm of x), and before it the same with a mixing of places, where there are several."""

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.mix = nn.Linear(places, places) if places > 1 else None
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)  # every block begins as the identity (adaLN-Zero)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(told).chunk(3, dim=-1)
        if self.mix is not None:
            normed = rearrange(F.layer_norm(x, x.shape[-1:]), "... p width -> ... width p")
            x = x + rearrange(self.mix(normed), "... width p -> ... p width")
        return x + gate * self.mlp(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


def _waves(sigma: Float[Tensor, "*group"]) -> Float[Tensor, "*group waves"]:
    """Sines and cosines of the share of noise, periods from 1/100 to 4 of its range."""
    rates = 2 * torch.pi * torch.logspace(-0.6, 2.0, 32, device=sigma.device)
    angles = sigma.float().unsqueeze(-1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
