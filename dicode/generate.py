"""Text to video: the one place where the language model and the decoder meet."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch

from dicode.hub import config_from_dict, config_to_dict, push_folder, read_config, resolve, write_config
from dicode.lm.deep_lm import DeepTokenLM
from dicode.shapes import DeepTokens, FrameStack, KeyFrameTokens, Video
from dicode.tokenizer.video_tokenizer import VideoTokenizer

Joins = Literal["chained", "parallel"]


@dataclass(frozen=True)
class GenerationConfig:
    """How a model is sampled where the caller does not say; part of its checkpoint."""

    guidance: float = 1.0  # of the language model against the null prompt
    variance_scale: float = 1.0  # of the mixture over the next deep token; 0 takes its mean
    temperature: float = 1.0  # of the choice between the mixture's components; 0 takes the likeliest
    decoder_guidance: float = 1.0  # of the denoiser against null tokens
    decoder_temperature: float = 1.0  # of its noise: below 1 clips hold together better and move less
    steps: int = 12  # of the denoiser a clip
    joins: Joins = "chained"


class DiCoDe:
    """A tokenizer and a language model that share deep tokens: prompts in, clips out."""

    def __init__(self, tokenizer: VideoTokenizer, lm: DeepTokenLM, defaults: GenerationConfig | None = None):
        n, d = tokenizer.config.resampler.queries, tokenizer.config.resampler.token_width
        if (n, d) != (lm.config.tokens_per_keyframe, lm.config.token_width):
            raise ValueError(
                f"tokenizer and language model do not share tokens: {n}×{d} a key frame against "
                f"{lm.config.tokens_per_keyframe}×{lm.config.token_width}"
            )
        if lm.text is None:
            raise ValueError("the language model has no text tokenizer; load it with DeepTokenLM.from_pretrained")
        self.tokenizer, self.lm, self.defaults = tokenizer.eval(), lm.eval(), defaults or GenerationConfig()
        self.text = lm.text

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path | None = None,
        device: str = "cpu",
        revision: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "DiCoDe":
        """Load a checkpoint folder, a model in the box (default: `sprites`) or `owner/name` from the Hub, strictly.

        `revision` is a branch, tag or commit on the Hub, `dtype` that of the parameters (default: float32).
        """
        folder = resolve(name_or_folder, revision)
        defaults = config_from_dict(GenerationConfig, read_config(folder).get("generation", {}), "generation")
        tokenizer = VideoTokenizer.from_pretrained(folder, dtype=dtype).to(device)
        return cls(tokenizer, DeepTokenLM.from_pretrained(folder, dtype=dtype).to(device), defaults)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder (weights and `config.json`; the model card is the caller's)."""
        folder = Path(folder)
        write_config(
            folder,
            {
                "tokenizer": self.tokenizer.save_pretrained(folder, dtype),
                "lm": self.lm.save_part(folder, dtype),
                "generation": config_to_dict(self.defaults),
                "deep_tokens": self.tokenizer.token_hash(dtype),
            },
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "Upload a dicode model",
        card: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, and a model card, to a repository on the Hub; returns its address.

        Repository and branch (`revision`, default: main) are made where missing. `card` is the text of README.md;
        without one a card that is there stays. Raises `ValueError` where `private` is asked of a public repository.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            return push_folder(
                Path(folder),
                repo_id,
                private=private,
                revision=revision,
                token=token,
                commit_message=commit_message,
                card=card,
            )

    def num_frames(self, seconds: float) -> int:
        """Frames of a video of this length, at least one."""
        return max(1, round(seconds * self.tokenizer.config.fps))

    def generate(
        self, prompt: str, *, seconds: float = 4.0, seed: int = 0, sample_index: int = 0, **options: object
    ) -> Iterator[Video]:
        """Clips of one video, uint8 `f h w c`, each made when asked for; together exactly `seconds` long.

        `options` are fields of `GenerationConfig`. Raises `ValueError` at the call for an empty prompt, an unknown
        option, or more seconds than the language model has positions for.
        """
        clips = self.generate_batch([prompt], seconds=seconds, seed=seed, sample_indices=[sample_index], **options)
        return (clip[0].numpy() for clip in clips)

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        seconds: float = 4.0,
        seed: int = 0,
        sample_indices: Sequence[int] | None = None,
        **options: object,
    ) -> Iterator[FrameStack]:
        """As `generate` for several prompts at once: clips uint8 `b f h w c`, sample i as if it were made alone."""
        unknown = options.keys() - GenerationConfig.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"unknown options {sorted(unknown)}; known: {list(GenerationConfig.__dataclass_fields__)}")
        settings = replace(self.defaults, **options)  # type: ignore[arg-type]
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise ValueError("expected a prompt of at least one word")
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"seconds: expected a positive number, got {seconds}")
        frames = self.num_frames(seconds)
        num_clips = self.tokenizer.config.num_clips(frames)
        indices = list(range(len(prompts))) if sample_indices is None else list(sample_indices)
        ids = self.text.encode(list(prompts), self.lm.config.text_length).to(self.tokenizer.device)
        key_frames = self.lm.generate(
            ids,
            num_clips + 1,
            seed=seed,
            sample_indices=indices,
            guidance=settings.guidance,
            variance_scale=settings.variance_scale,
            temperature=settings.temperature,
        )
        clips = self.tokenizer.decode_pairs(
            consecutive(key_frames),
            seed=seed,
            sample_indices=indices,
            steps=settings.steps,
            guidance=settings.decoder_guidance,
            temperature=settings.decoder_temperature,
            joins=settings.joins,
        )
        return trimmed(clips, frames)

    def reconstruct(self, frames: Video, *, seed: int = 0, **decode_options: object) -> Iterator[Video]:
        """Clips of a video after its way through deep tokens; as many frames as went in, less a lone last one."""
        tokens = self.tokenizer.encode(torch.from_numpy(np.ascontiguousarray(frames))[None])
        clips = self.tokenizer.decode(tokens, seed=seed, **decode_options)  # type: ignore[arg-type]
        return (clip[0].numpy() for clip in trimmed(clips, len(frames)))


def consecutive(key_frames: Iterator[KeyFrameTokens]) -> Iterator[DeepTokens]:
    """Key frames one by one → (head, tail) pairs `b 2 n d`; reads one key frame ahead, no more."""
    head = next(key_frames)
    for tail in key_frames:
        yield torch.stack([head, tail], dim=1)
        head = tail


def trimmed(clips: Iterator[FrameStack], num_frames: int) -> Iterator[FrameStack]:
    """The first `num_frames` frames of a stream of clips; clips after them are never made."""
    while num_frames > 0:
        clip = next(clips, None)
        if clip is None:
            return
        yield clip[:, :num_frames].cpu()
        num_frames -= clip.shape[1]
