"""The linear code fitted to training latents in closed form: what of an image's latents survives noise best."""

import math

import torch
from einops import rearrange
from torch import Tensor

from dicode.shapes import ImageLatents
from dicode.tokenizer.encoder import LinearCode


@torch.no_grad()
def fit_projections(linear: LinearCode, latents: ImageLatents) -> None:
    """Set both projections from training latents `f c h w`, so that each number of their tokens has mean 0, variance 1.

    Of all linear codes of this width that keep the leading principal components, the one that loses least to equal
    noise on all of its numbers: component i, of variance w, gets power √w (Lee & Petersen 1976, "Optimal linear
    coding for vector channels"). A rotation, which changes no error, then aligns every token with the image under
    it (orthogonal Procrustes, the tokens as a square grid) and evens the variances of each token's numbers, so that
    scaling them to 1 leaves the noise equal.

    Raises `ValueError` where the tokens are no square grid, or hold more numbers than latents or images there are.
    """
    flat = latents.flatten(1).double()
    count, numbers = linear.encode.out_features, linear.encode.in_features
    if count > min(numbers, len(flat)):
        raise ValueError(f"tokens of {count} numbers: expected at most {numbers}, of at least {count} images")
    mean = flat.mean(0)
    variance, components = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    variance = variance.flip(0)[:count].clamp_min(1e-6 * float(variance[-1]))
    components = components.flip(1)[:, :count]
    gain = variance.rsqrt() * variance.pow(0.25)  # unit variance, then power √w
    gain *= (count / (gain.square() * variance).sum()).sqrt()
    code = gain[:, None] * components.T
    u, _, v = torch.linalg.svd(_cells(linear, latents) @ code.T)
    power = (gain.square() * variance).diag()
    width = count // linear.num_tokens
    rotation = torch.cat([_evened(part @ power @ part.T) @ part for part in (u @ v).split(width)])
    deviation = (rotation @ power @ rotation.T).diag().sqrt()
    encode = rotation @ code / deviation[:, None]
    linear.encode.weight.copy_(encode)
    linear.encode.bias.copy_(-(encode @ mean))
    linear.decode.weight.copy_(components / gain @ rotation.T * deviation)
    linear.decode.bias.copy_(mean)


def _cells(linear: LinearCode, latents: ImageLatents) -> Tensor:
    """The projection that gives each token the principal components of its own cell alone, `(n d) (c h w)`."""
    grid = math.isqrt(linear.num_tokens)
    if grid * grid != linear.num_tokens or linear.size % grid:
        raise ValueError(f"{linear.num_tokens} tokens are no square grid over {linear.size}×{linear.size} latents")
    width = linear.encode.out_features // linear.num_tokens
    index = torch.arange(linear.encode.in_features).view(latents.shape[1:])
    cells = rearrange(index, "c (h i) (w j) -> (h w) (c i j)", h=grid, w=grid)
    target = torch.zeros(linear.encode.out_features, linear.encode.in_features, dtype=torch.double)
    for token, cell in enumerate(cells):
        own = latents.flatten(1)[:, cell].double()
        own = own - own.mean(0)
        _, components = torch.linalg.eigh(own.T @ own / len(own))
        target[token * width : (token + 1) * width, cell] = components.flip(1)[:, :width].T
    return target


def _evened(covariance: Tensor) -> Tensor:
    """A rotation after which all numbers of this covariance have the same variance (Schur 1923, Horn 1954).

    Each plane rotation gives the number of largest variance the mean, at the cost of the one of smallest.
    """
    rotation, mean = torch.eye(len(covariance)).to(covariance), covariance.diag().mean()
    for _ in range(len(covariance) - 1):
        now = rotation @ covariance @ rotation.T
        i, j = now.diag().argmax(), now.diag().argmin()
        above, below, both = now[i, i] - mean, now[j, j] - mean, now[i, j]
        if above - below < 1e-9 * mean:
            break
        tangent = (both + (both.square() - above * below).sqrt()) / below
        cosine = 1 / (1 + tangent.square()).sqrt()
        row = cosine * (rotation[i] - tangent * rotation[j])
        rotation[j] = cosine * (tangent * rotation[i] + rotation[j])
        rotation[i] = row
    return rotation
