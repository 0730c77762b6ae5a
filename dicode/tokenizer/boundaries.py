"""Where clips meet: indices of key frames, and joins of clips rendered on their own, blended in latents.

A clip of ours ends one frame before the next one begins; published clips share that moment and render it twice
(`TokenizerConfig.tail_frame`).
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from dicode.shapes import ClipLatents, ImageLatents

# On each side of a join. With key frames jittered for every clip, joins of the bundled model were 2.35 times an inside
# step; 2, 3, 4 and 5 frames lowered that to 1.32, 1.21, 1.14 and 1.10. More frames drag more of a clip from its place.
BLEND_FRAMES = 3
FEWEST_FRAMES = 4  # of a clip, to measure how evenly it moves


def blended(
    earlier: ClipLatents, later: ClipLatents, shares_frame: bool, moves_later: bool = True
) -> tuple[ClipLatents, ClipLatents]:
    """Two consecutive clips → the same with the gap between them spread over the steps around the join.

    `shares_frame`: the first frame of `later` is the moment of the last one of `earlier`; both become their mean.
    Without `moves_later` only `earlier` changes. Raises `ValueError` for clips of fewer than 4 frames.
    """
    if earlier.shape[1] < FEWEST_FRAMES:
        raise ValueError(
            f"joins 'parallel': expected clips of at least {FEWEST_FRAMES} frames, got {earlier.shape[1]}; "
            "use 'independent'"
        )
    gap = gap_between(earlier, later, shares_frame)[:, None]
    frames = min(BLEND_FRAMES, earlier.shape[1] // 2)
    steps = frames + frames * moves_later + (not shares_frame)
    share = torch.arange(1, frames + 1).to(gap)[:, None, None, None] / steps
    earlier = torch.cat([earlier[:, :-frames], earlier[:, -frames:] + share * gap], dim=1)
    if moves_later:
        later = torch.cat([later[:, :frames] - share.flip(0) * gap, later[:, frames:]], dim=1)
    return earlier, later


def gap_between(earlier: ClipLatents, later: ClipLatents, shares_frame: bool) -> ImageLatents:
    """The difference to close.

    A shared moment's two renderings differ by error alone. Else the excess over the mean of the steps on either side is
    error and ordinary unevenness, the latter as large as inside the two clips. It is shrunk to the part that is error
    (positive-part James–Stein): a join that is no more uneven than its clips stays as it is.
    """
    jump = later[:, 0] - earlier[:, -1]
    if shares_frame:
        return jump
    excess = jump - (earlier[:, -1] - earlier[:, -2] + later[:, 1] - later[:, 0]) / 2
    usual = (unevenness(earlier) + unevenness(later)) / 2
    size = excess.square().mean((1, 2, 3))
    error_share = (1 - usual / size.clamp_min(1e-12)).clamp_min(0)
    return excess * error_share[:, None, None, None]


def unevenness(clip: ClipLatents) -> Float[Tensor, "b"]:
    """Mean square of a step less the mean of its two neighbours: 0 for what moves at constant speed."""
    steps = clip.diff(dim=1)
    return (steps[:, 1:-1] - (steps[:, :-2] + steps[:, 2:]) / 2).square().mean((1, 2, 3, 4))


def blended_stream(clips: Iterator[ClipLatents], shares_frame: bool, moves_later: bool) -> Iterator[ClipLatents]:
    """Clips with every join blended; one clip is held back until the next arrives."""
    held = next(clips, None)
    for clip in clips:
        assert held is not None
        finished, held = blended(held, clip, shares_frame, moves_later)
        yield finished
    if held is not None:
        yield held


def key_frame_indices(num_frames: int, spacing: int = 16) -> list[int]:
    """Indices of the key frames of a video, `spacing` apart: 0, 16, 32, … and the end of its last clip (DESIGN §2.9).

    N clips have N+1 key frames. A video that ends with or within its last clip has no frame 16·N: its last frame takes
    that place. Raises ValueError for a video of fewer than 2 frames.
    """
    if num_frames < 2:
        raise ValueError(f"expected at least 2 frames, got {num_frames}")
    num_clips = max(1, -(-(num_frames - 1) // spacing))
    return [min(i * spacing, num_frames - 1) for i in range(num_clips + 1)]
