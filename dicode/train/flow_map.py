"""Few steps: a trained flow denoiser becomes a flow map, which jumps from one time to any earlier one.

A flow map is the mean velocity u(x, t, r) between times t ≥ r: x_r = x_t − (t − r)·u(x_t, t, r). Its derivative along a
path gives what to regress on without a second network (MeanFlow, arXiv 2505.13447), here by central finite differences
(AnyFlow, arXiv 2605.13724); u(x, t, t) is the velocity, with which training starts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dicode.shapes import ClipLatents
from dicode.tokenizer.denoiser import shifted

EPSILON = 0.02  # half the time between the two values of a difference; with 0.005 bfloat16 rounds half of it away
SAME, TO_THE_END = 0.5, 0.25  # shares of samples whose r is t, and is 0; of the others it is drawn as t is

Velocity = Callable[[ClipLatents, Tensor, Tensor], ClipLatents]  # of x, t and r, `b` each, 0…1


def drawn_times(count: int, generator: torch.Generator, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """t ≥ r of each sample, logit-normal and `shifted` as the times of plain flow matching."""
    one, other = shifted(torch.sigmoid(torch.randn(2, count, generator=generator)), shift)
    kind = torch.rand(count, generator=generator)
    t, r = torch.maximum(one, other), torch.minimum(one, other)
    r = torch.where(kind < SAME + TO_THE_END, torch.zeros_like(r), r)
    return torch.where(kind < SAME, one, t), torch.where(kind < SAME, one, r)


def fused(conditional: ClipLatents, null: ClipLatents, guidance: float) -> ClipLatents:
    """What is added to velocities of the data, so that a network which learns their sum comes to hold the guidance.

    `conditional` and `null` are the network's own. With κ = 1 − 1/guidance, v + κ·(conditional − null) equals
    `conditional` where that is null + guidance·(v − null), as in MeanFlow; guidance − 1 in place of κ
    would add it anew at every step.
    """
    return (1 - 1 / guidance) * (conditional - null)


def flow_map_loss(
    u: Velocity, guide: Velocity, clips: ClipLatents, noise: ClipLatents, t: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean squared error of u(x, t, r), and that of the samples whose r is t alone: of plain flow matching.

    `guide` is what guidance adds to the velocity, which sampling need not add then. Errors of r < t are scaled to the
    size of the others, so that neither decides the step alone.
    """
    broad = (-1, *[1] * (clips.ndim - 1))
    x = (1 - t.view(broad)) * clips + t.view(broad) * noise
    with torch.no_grad():
        v = noise - clips + guide(x, t, t)
        change = (u(x + EPSILON * v, t + EPSILON, r) - u(x - EPSILON * v, t - EPSILON, r)) / (2 * EPSILON)
        target = v - (t - r).view(broad) * change
    errors = (u(x, t, r) - target).square().flatten(1).mean(1)
    same = t == r
    found = errors.detach()  # means without branches on their content, so that plans can count on tensors without any
    plain = torch.where(same.any(), (found * same).sum() / same.sum(), found.mean())
    jumps = torch.where(same.all(), plain, (found * ~same).sum() / (~same).sum())
    return torch.where(same, errors, plain / jumps.clamp_min(1e-8) * errors).mean(), plain
