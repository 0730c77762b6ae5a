"""Where in their videos the clips of a tokenizer's run lie, and at which rate they are read."""

import torch
from torch import Tensor

from dicode.data.columns import CachedVideo, Videos
from dicode.train.runs import TokenizerRun


class ClipPlaces:
    """The clips of a run: as many frames as its model takes, from a random moment on, at a random frame stride."""

    def __init__(self, run: TokenizerRun):
        self.run = run

    @property
    def head(self) -> int:
        """Where among the frames of a clip and its context the clip begins."""
        return 0 if self.whole else self.run.model.denoiser.context_frames

    @property
    def whole(self) -> bool:
        """Whether the first stage codes clips as one, with the frame that is their context."""
        return self.run.model.first_stage.frames_a_latent > 1

    @property
    def frames(self) -> int:
        """Frames of context, of a clip, and its tail key frame where it lies after them."""
        return self.head + self.run.model.clip_span

    def drawn(
        self, videos: Videos, indices: Tensor, generator: torch.Generator
    ) -> tuple[list[tuple[CachedVideo, float, int]], Tensor]:
        """Video, start and frame stride of a clip of each sample, and whether it is mirrored."""
        starts = torch.rand(len(indices), generator=generator)
        mirrored = (torch.rand(len(indices), generator=generator) < 0.5 * self.run.mirror).long()
        chosen = [videos[int(i)] for i in indices]
        strides = [self.stride_of(video, generator) for video in chosen]
        return list(zip(chosen, starts.tolist(), strides, strict=True)), mirrored

    def stride_of(self, video: CachedVideo, generator: torch.Generator) -> int:
        """A frame stride for a clip of this video, drawn from those that it has frames for.

        DynamiCrafter's stride counts frames of the source video from one frame of a clip to the next. Here videos have
        times: a stride of s is s/frame_stride steps of the model's own rate (with 8 fps and stride 6, strides 1…6 are
        48, 24, 16, 12, 9.6 and 8 frames a second). Strides that would repeat frames, or need a longer video, are not
        drawn; where none is left, the model's own is taken.
        """
        if self.run.frame_strides is None:
            return self.run.model.denoiser.frame_stride
        least, most = self.run.frame_strides
        video_fps = video.count / video.period_s * 1.05  # a tolerance: rates of files are uneven
        fitting = [
            stride
            for stride in range(least, most + 1)
            if self.fps_of(stride) <= video_fps
            and (video.loops or self.run.model.tail_frame / self.fps_of(stride) <= video.period_s)
        ] or [self.run.model.denoiser.frame_stride]
        return fitting[int(torch.randint(len(fitting), (), generator=generator))]

    def fps_of(self, stride: int | None) -> float:
        """Frames a second of clips with this stride, by default the model's own."""
        fps = self.run.model.fps
        return fps if stride is None else fps * self.run.model.denoiser.frame_stride / stride

    def has_context(self, video: CachedVideo, start: float, stride: int | None) -> bool:
        """Whether something was recorded before a clip."""
        return self.whole or video.loops or self.first_s(video, start, stride) >= 0

    def first_s(self, video: CachedVideo, start: float, stride: int | None) -> float:
        """When the first of its frames is shown, context included: before the video's beginning for some."""
        fps = self.fps_of(stride)
        clip_s = self.run.model.tail_frame / fps
        latest_s = max(0.0, video.period_s - clip_s)
        if self.run.whole_clips and not video.loops:
            return clip_s * int(start * (1 + int(latest_s / clip_s))) - self.head / fps
        return ((1 + start) * video.period_s if video.loops else start * latest_s) - self.head / fps
