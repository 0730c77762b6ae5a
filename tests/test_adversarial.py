"""Adversarial losses: against the formulas, their gradients apart, and what they teach."""

import torch
from torch import nn
from torch.nn import functional

from dicode.train.adversarial import PatchDiscriminator, adversarial_losses


class Scale(nn.Module):
    """A discriminator of one weight, whose verdict is the weighted mean of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.weight * pixels.mean((1, 2, 3), keepdim=True)


def test_losses_are_those_of_the_hinge_formulas() -> None:
    made, real = torch.full((2, 3, 4, 5), -1.0), torch.full((2, 3, 4, 5), 0.4)
    convincing, telling = adversarial_losses(Scale(), made, real)
    assert convincing.item() == 0.5  # −D(made)
    torch.testing.assert_close(telling, torch.tensor((1 - 0.5) + (1 - 0.2)))


def test_each_loss_teaches_one_side_alone() -> None:
    discriminator, made = PatchDiscriminator(8), torch.zeros(2, 3, 32, 32, requires_grad=True)
    convincing, telling = adversarial_losses(discriminator, made, torch.ones(2, 3, 32, 32))
    convincing.backward(retain_graph=True)
    assert made.grad is not None and made.grad.abs().sum() > 0
    assert all(p.grad is None for p in discriminator.parameters())
    before = made.grad.clone()
    telling.backward()
    assert torch.equal(made.grad, before)
    assert all(p.grad is not None for p in discriminator.parameters())


def test_a_verdict_hears_of_its_own_patch_alone() -> None:
    discriminator = PatchDiscriminator(8)
    norms = [m for m in discriminator.modules() if isinstance(m, nn.GroupNorm)]
    for norm in norms:  # a norm over the whole image is not a patch's own
        norm.forward = lambda x: x  # type: ignore[method-assign]
    pixels = torch.randn(1, 3, 64, 96, requires_grad=True)
    verdicts = discriminator(pixels)
    assert verdicts.shape == (1, 1, 8, 12)
    verdicts[0, 0, 4, 6].backward()
    assert pixels.grad is not None
    seen = pixels.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [38, 38]


def test_two_players_on_one_optimizer_find_what_is_real() -> None:
    """A maker of blurred checks, told nothing but real or not, comes to draw their contrast."""
    torch.manual_seed(0)
    checks = torch.ones(8, 3, 16, 16)
    checks[..., ::2] = -1
    contrast = nn.Parameter(torch.tensor(0.2))
    discriminator = PatchDiscriminator(8)
    optimizer = torch.optim.Adam([contrast, *discriminator.parameters()], lr=5e-3, betas=(0.5, 0.9))
    for _ in range(150):
        made = contrast * checks + 0.05 * torch.randn(checks.shape)
        losses = adversarial_losses(discriminator, made, checks + 0.05 * torch.randn(checks.shape))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    assert functional.l1_loss(contrast, torch.tensor(1.0)) < 0.3
