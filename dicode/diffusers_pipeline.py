"""`DiCoDe` as a pipeline of `diffusers`, with the call, the output and the callbacks of its text-to-video pipelines."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from einops import rearrange
from PIL import Image

from dicode.lm.deep_lm import DeepTokenLM
from dicode.pipeline import DiCoDe, Given, Prompt, length_s
from dicode.shapes import FrameStack
from dicode.storyboard import parse_storyboard
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.video.images import fitted
from dicode.video.timed import Still

Callback = Callable[["DiCoDePipeline", int, int, dict[str, Any]], dict[str, Any] | None]
Seeds = torch.Generator | list[torch.Generator]
Picture = Image.Image | np.ndarray | torch.Tensor  # array h w c or tensor c h w, both 0…1
LARGEST_SEED = 2**63 - 1


@dataclass
class DiCoDePipelineOutput(BaseOutput):
    """Videos: array `b f h w c` or tensor `b f c h w`, both 0…1, or a list of PIL images a video."""

    frames: Any


class DiCoDePipeline(DiffusionPipeline):
    """Text to video, and image to video, with a checkpoint of `dicode`.

    A step, of the progress bar and of callbacks, is a clip: two seconds in the bundled models.
    """

    _callback_tensor_inputs = ("frames",)
    _interrupt = False

    def __init__(self, tokenizer: VideoTokenizer, lm: DeepTokenLM) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, lm=lm)
        self.model = DiCoDe(tokenizer, lm)
        self.video_processor = VideoProcessor(vae_scale_factor=1, do_normalize=False, do_convert_rgb=True)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        revision: str | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> "DiCoDePipeline":
        """As `DiCoDe.from_pretrained`: a bundled model (default: `blocks`), a checkpoint folder, or a Hub id."""
        model = DiCoDe.from_pretrained(pretrained_model_name_or_path, revision=revision, dtype=torch_dtype)
        return cls(model.tokenizer, model.lm)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a checkpoint folder of `dicode`, which has no `model_index.json`."""
        self.model.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """As `DiCoDe.push_to_hub`."""
        return self.model.push_to_hub(repo_id, **options)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "DiCoDePipeline":
        """Move the pipeline, or convert its parameters; statistics and positions stay float32."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for part in (self.tokenizer, self.lm):
            part.to(device)
            for parameter in part.parameters():
                parameter.data = parameter.data.to(dtype or parameter.dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tokenizer.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.lm.parameters()).dtype

    @property
    def fps(self) -> float:
        """Frames a second of the videos, for `export_to_video`."""
        return self.tokenizer.config.fps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Picture | None = None,
        num_frames: int | None = None,
        seconds: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Seeds | None = None,
        output_type: Literal["np", "pt", "pil"] = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("frames",),
        **sampling: Any,
    ) -> DiCoDePipelineOutput | tuple[Any]:
        """Generate videos; what is left out is the model's own, and a length 4 s.

        `prompt`: texts, or storyboards, such as "[4s: a spark] [4s: it grows]", which have lengths of their own.
        `image`: the first frame, cropped to the model's square. `num_inference_steps`: of the denoiser, a clip.
        `guidance_scale`: of the language model. `sampling`: further fields of `SamplingConfig`. A `generator` gives the
        seed of all videos, and other ones in the next call; of a list, each gives that of one video. None: torch's own.

        `callback_on_step_end(pipeline, step, num_frames_so_far, {"frames": uint8 b f h w c})` runs after every clip;
        frames in the dict that it returns replace the clip's. `pipeline._interrupt = True` ends the video with it.

        Raises `ValueError` for both lengths, an unknown option, or another number of generators than of videos.
        """
        if num_frames is not None and seconds is not None:
            raise ValueError(f"expected num_frames or seconds, got both: {num_frames} and {seconds}")
        if num_frames is not None:
            seconds = num_frames / self.fps
        if unknown := set(callback_on_step_end_tensor_inputs) - {*self._callback_tensor_inputs}:
            raise ValueError(f"callback_on_step_end_tensor_inputs: expected 'frames', got {sorted(unknown)}")
        self.model.sampling.changed(**sampling)  # of these alone: no seed
        texts = [prompt] if isinstance(prompt, str) else prompt
        prompts = [parse_storyboard(text) or text for text in texts for _ in range(num_videos_per_prompt)]
        options = {"seconds": seconds, "guidance": guidance_scale, "steps": num_inference_steps, **sampling}
        streams = self._streams(prompts, image, generator if isinstance(generator, list) else [generator], options)
        clips: list[FrameStack] = []
        self._interrupt = False
        total = self.tokenizer.config.num_clips(self.model.num_frames(length_s(prompts, seconds)))
        with self.progress_bar(total=total) as bar:
            for step, parts in enumerate(zip(*streams, strict=True)):
                clip = torch.cat(parts)
                if callback_on_step_end is not None:
                    done = clip.shape[1] + sum(earlier.shape[1] for earlier in clips)
                    held = dict.fromkeys(callback_on_step_end_tensor_inputs, clip)
                    clip = (callback_on_step_end(self, step, done, held) or {}).get("frames", clip)
                clips.append(clip)
                bar.update()
                if self._interrupt:
                    break
        pixels = rearrange(torch.cat(clips, dim=1), "b f h w c -> b c f h w").float() / 255
        frames = self.video_processor.postprocess_video(pixels, output_type)
        return DiCoDePipelineOutput(frames) if return_dict else (frames,)

    def _streams(
        self,
        prompts: Sequence[Prompt],
        image: Picture | None,
        generators: Sequence[torch.Generator | None],
        options: dict[str, Any],
    ) -> list[Iterator[FrameStack]]:
        """Clips of all videos, in a batch for each generator."""
        if len(generators) not in (1, len(prompts)):
            raise ValueError(
                f"generator: expected one, or one for each of {len(prompts)} videos, not {len(generators)}"
            )
        size, streams = len(prompts) // len(generators), []
        given = None if image is None else self._given(image, size)
        for number, generator in enumerate(generators):
            device = "cpu" if generator is None else generator.device
            seed = int(torch.randint(LARGEST_SEED, (), generator=generator, device=device))
            batch = prompts[number * size : (number + 1) * size]
            streams.append(self.model.generate_batch(batch, seed=seed, given=given, **options))
        return streams

    def _given(self, image: Picture, videos: int) -> Given:
        """The image as the first frame of so many videos."""
        pixels = self.video_processor.preprocess(image)
        frame = rearrange((255 * pixels).round().byte(), "1 c h w -> h w c").numpy()
        still: Still = fitted(Path("image"), frame, self.tokenizer.config.frame_shape, "crop")[None]
        given = self.model.given(image=still)
        parts = (given.key_frames, given.before)
        return Given(*(None if own is None else own.expand(videos, *own.shape[1:]) for own in parts))
