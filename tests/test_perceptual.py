"""Perceptual and adversarial losses: against the formulas, their gradients apart, and what they teach."""

import pytest
import torch
from synthetic import draw_clip
from torch import nn
from torch.nn import functional

from dicode.features.extract import FeatureMaps, perceptual_distance
from dicode.train.cached import frames_to_pixels
from dicode.train.first_stage import FeatureDiscriminator, ReconstructionStats, adversarial_losses


class Scale(nn.Module):
    """A discriminator of one weight, whose verdict is the weighted mean of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.weight * x.mean((1, 2, 3), keepdim=True) for x in maps]


def maps_of(value: float, count: int, side: int = 16) -> list[torch.Tensor]:
    widths = FeatureDiscriminator(4).heads
    return [torch.full((count, head[0].in_channels, side >> i, side >> i), value) for i, head in enumerate(widths)]


def sharp_and_blurred() -> tuple[torch.Tensor, torch.Tensor]:
    pytest.importorskip("efficientnet_lite_pytorch")
    frames, _ = draw_clip(seed=1, num_frames=4, size=64)
    sharp = frames_to_pixels(torch.from_numpy(frames))
    return sharp, functional.avg_pool2d(sharp, 5, 1, 2)


def test_the_perceptual_distance_sees_blur_and_has_gradients() -> None:
    sharp, blurred = sharp_and_blurred()
    blurred.requires_grad_()
    feature_maps = FeatureMaps()
    assert perceptual_distance(feature_maps(sharp), feature_maps(sharp)).item() == 0
    far = perceptual_distance(feature_maps(blurred), feature_maps(sharp))
    far.backward()
    assert far > 0.05 and blurred.grad is not None and blurred.grad.abs().max() > 0


def test_sets_are_judged_by_distance_and_by_distribution() -> None:
    """The same images in another order are far from each other one by one, and the same set."""
    sharp, blurred = sharp_and_blurred()
    feature_maps = FeatureMaps()
    found = {}
    for name, made in (("same", sharp), ("turned", sharp.roll(1, 0)), ("blurred", blurred)):
        judged = ReconstructionStats()
        for part in (slice(0, 3), slice(3, None)):  # batch by batch
            judged.add(feature_maps(made[part]), feature_maps(sharp[part]))
        found[name] = judged.figures()
    assert found["same"]["perceptual"] == 0 and found["same"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert found["turned"]["frechet"] == pytest.approx(0, abs=1e-6) and found["turned"]["perceptual"] > 0
    assert found["blurred"]["frechet"] > 1e-3


def test_losses_are_those_of_the_hinge_formulas() -> None:
    convincing, telling = adversarial_losses(Scale(), maps_of(-1.0, 2), maps_of(0.4, 3))
    assert convincing.item() == 0.5  # −D(made)
    torch.testing.assert_close(telling, torch.tensor((1 - 0.5) + (1 - 0.2)))


def test_each_loss_teaches_one_side_alone() -> None:
    discriminator, made = FeatureDiscriminator(8), [x.requires_grad_() for x in maps_of(0.1, 2)]
    convincing, telling = adversarial_losses(discriminator, made, maps_of(0.3, 2))
    convincing.backward(retain_graph=True)
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in made)
    assert all(p.grad is None for p in discriminator.parameters())
    before = [x.grad.clone() for x in made if x.grad is not None]
    telling.backward()
    assert all(torch.equal(x.grad, grad) for x, grad in zip(made, before, strict=True) if x.grad is not None)
    assert all(p.grad is not None for p in discriminator.parameters())


def test_a_blur_is_undone_by_hearing_of_it_alone() -> None:
    """A maker that may only choose how much to blur, told nothing but real or not, comes to blur nothing."""
    sharp, blurred = sharp_and_blurred()
    torch.manual_seed(0)
    feature_maps, discriminator = FeatureMaps(), FeatureDiscriminator(16)
    share = nn.Parameter(torch.tensor(0.2))  # of the sharp image
    optimizer = torch.optim.Adam([share, *discriminator.parameters()], lr=1e-2, betas=(0.5, 0.9))
    with torch.no_grad():
        real = feature_maps(sharp)
    for _ in range(80):
        losses = adversarial_losses(discriminator, feature_maps(share * sharp + (1 - share) * blurred), real)
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    assert share.item() == pytest.approx(1, abs=0.2)
