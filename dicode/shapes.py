"""The axes and aliases of tensors that cross a function boundary.

    b  batch                    n  deep tokens a key frame, in sequences its motion tokens included
    f  frames in a clip         d  deep-token width
    k  key frames               t  text tokens
    s  sequence positions       m  mixture components, or motion tokens a clip
    c h w  channels, height, width of images; z y x  the same of first-stage latents

Names give ranges: `frames` are uint8 0…255, `pixels` float −1…1, `latents` come from the first stage, `tokens` from the
linear code (unit variance a dimension) or the resampler, `features` from the latter's image encoder. Arrays of readers
of files are in `dicode.video.timed`, without torch. Tests check the aliases (jaxtyping's import hook with beartype).
"""

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

FrameStack = UInt8[Tensor, "b f h w c"]
Frames = UInt8[Tensor, "b h w c"]  # one of each video

KeyFramePixels = Float[Tensor, "b c h w"]  # one key frame a batch entry, −1…1
ImageLatents = Float[Tensor, "b z y x"]
ClipLatents = Float[Tensor, "b f z y x"]
ContextLatents = Float[Tensor, "b before z y x"]  # of the last frames of the clip before
PatchFeatures = Float[Tensor, "b p width"]

MotionTokens = Float[Tensor, "b m d"]
DeepTokens = Float[Tensor, "b k n d"]
KeyFrameTokens = Float[Tensor, "b n d"]
TextIds = Int[Tensor, "b t"]
KeyFrameMask = Bool[Tensor, "b k"]
Hidden = Float[Tensor, "b s width"]
