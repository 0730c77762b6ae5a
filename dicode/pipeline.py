"""Text to video: prompt → key frames (language model) → clips (decoder)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from dicode.checkpoint import resolve
from dicode.checkpoint.hub import push_folder
from dicode.checkpoint.saving import write_config
from dicode.lm.config import DeepLMConfig
from dicode.lm.deep_lm import DeepTokenLM
from dicode.seeds import SeedPlan
from dicode.shapes import DeepTokens, FrameStack, KeyFrameTokens
from dicode.storyboard import Shot, key_frames_of
from dicode.tokenizer.config import SamplingConfig, TokenizerConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.video.timed import Still, Video

Prompt = str | Sequence[Shot]  # one text, or the shots of a storyboard


@dataclass(frozen=True)
class Given:
    """Conditions of a batch of videos besides their prompts; `DiCoDe.given` encodes them from frames."""

    key_frames: DeepTokens | None = None  # `b k n d`, prefix of the sequence; clips start at the last of them
    before: FrameStack | None = None  # the frames right before that last key frame, of Wan itself: for chained joins
    goal: KeyFrameTokens | Literal["first"] | None = None  # the key frame that the video ends on


def check_shared(tokenizer: TokenizerConfig, lm: DeepLMConfig) -> None:
    """Raise `ValueError` where a language model writes other tokens than a tokenizer has."""
    ours, theirs = (f"{c.tokens_per_keyframe} + {c.motion_tokens} × {c.token_width}" for c in (tokenizer, lm))
    if ours != theirs:
        raise ValueError(
            f"tokenizer and language model do not share tokens (key frame + motion × width): {ours} and {theirs}"
        )


class DiCoDe:
    """A tokenizer and a language model that share deep tokens."""

    def __init__(self, tokenizer: VideoTokenizer, lm: DeepTokenLM):
        check_shared(tokenizer.config, lm.config)
        if lm.text is None:
            raise ValueError("the language model has no text tokenizer; load it with DeepTokenLM.from_pretrained")
        self.tokenizer, self.lm = tokenizer.eval(), lm.eval()
        self.text = lm.text
        self.card: str | None = None  # README.md of the folder that the model was loaded from
        self.offloads = self.int8 = False  # whether parts take turns on the device, and matrices are 8-bit

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path | None = None,
        device: str = "cpu",
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offload: bool = False,
        vae_tiling: bool = False,
        int8: bool = False,
    ) -> "DiCoDe":
        """Load a checkpoint folder, a bundled model (default: `blocks`) or `owner/name` from the Hub, strictly.

        `revision` is a branch, tag or commit on the Hub, `dtype` that of the parameters (default: float32). For less
        memory: `offload` keeps first stage, image encoder, denoiser and language model in the CPU's memory but for the
        one that computes; `vae_tiling` codes large frames in tiles, which changes them a little (a first stage of Wan);
        `int8` keeps matrices of denoiser, image encoder and language model 8-bit. Raises `ValueError` where that cannot
        be.
        """
        from dicode.memory import load_tokenizer, to_int8

        folder = resolve(name_or_folder, revision)
        tokenizer = load_tokenizer(folder, device, dtype, offload=offload, vae_tiling=vae_tiling, int8=int8)
        model = cls(tokenizer, DeepTokenLM.from_pretrained(folder, dtype=None if int8 else dtype))
        if int8:
            to_int8(model.lm, dtype or torch.float32)
            model.int8 = True
        if offload:
            model.offload(device)
        else:
            model.lm.to(device)
        if (folder / "README.md").is_file():
            model.card = (folder / "README.md").read_text(encoding="utf-8")
        return model

    def offload(self, device: str) -> None:
        """Have the parts of a model on the CPU take turns on a device; key frames are then written before any clip."""
        from dicode.memory import offload

        offload(self.tokenizer, self.lm, torch.device(device))
        self.offloads = True

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder (weights and `config.json`, without a model card).

        Raises `ValueError` for a model loaded with `int8`.
        """
        if self.int8:
            raise ValueError("int8: load the model without it, and save it with dtype=torch.int8")
        sections = {
            "tokenizer": self.tokenizer.save_pretrained(folder, dtype),
            "lm": self.lm.save_pretrained(folder, dtype),
            "deep_tokens": self.tokenizer.token_hash(dtype),
        }
        write_config(Path(folder), sections)

    def push_to_hub(self, repo_id: str, *, dtype: torch.dtype | None = None, **options: Any) -> str:
        """Upload the model and its card to a repository on the Hub; returns its address.

        Options are those of `push_folder`: private, revision, token, commit_message, card.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            if self.card is not None:
                (Path(folder) / "README.md").write_text(self.card, encoding="utf-8")
            return push_folder(Path(folder), repo_id, **options)

    @property
    def sampling(self) -> SamplingConfig:
        """The model's own sampling, for what a caller leaves out."""
        return self.tokenizer.config.sampling

    def num_frames(self, seconds: float) -> int:
        """Frames of a video of this length, at least one."""
        return max(1, round(seconds * self.tokenizer.config.fps))

    def given(
        self,
        *,
        image: Still | None = None,
        last_image: Still | None = None,
        continued: Video | None = None,
        loop: bool = False,
    ) -> Given:
        """Conditions of one video, from uint8 frames `f h w c` of the tokenizer's size (images: `1 h w c`).

        `image` is its first frame, `last_image` the one after its last, `loop` makes that the first frame. A video
        `continued` from another begins on the other's last frame. Raises `ValueError` for two beginnings or two ends.
        """
        if image is not None and continued is not None:
            raise ValueError("image and continued: a video begins with one of them")
        if loop and (last_image is not None or continued is not None):
            raise ValueError("loop: ends on the first frame; it cannot continue a video or end on another image")
        goal: KeyFrameTokens | Literal["first"] | None = "first" if loop else None
        if last_image is not None:
            goal = self.tokenizer.encode_frames(last_image)[:, 0]
        if image is not None:
            return Given(self.tokenizer.encode_frames(image), self._context_of(image), goal)
        if continued is None:
            return Given(goal=goal)
        places = key_places(len(continued), self.tokenizer.config.tail_frame)
        key_frames = self.tokenizer.encode_at(torch.from_numpy(np.ascontiguousarray(continued))[None], places)
        return Given(key_frames, self._context_of(continued), goal)

    def _context_of(self, frames: np.ndarray) -> FrameStack | None:
        """The context, `1 p h w c`, of a clip that begins on the last of these frames `f h w c`, or None."""
        config = self.tokenizer.config
        count, whole = config.denoiser.context_frames, config.first_stage.frames_a_latent > 1
        before = frames[-count:] if whole else frames[-1 - count : -1]  # of a whole clip its own first frame
        return torch.from_numpy(before.copy())[None] if len(before) == count > 0 else None

    def generate(self, prompt: Prompt, *, sample_index: int = 0, **options: Any) -> Iterator[Video]:
        """Clips of one video, uint8 `f h w c`, each rendered when asked for; together exactly `seconds` (default: 4).

        Options are those of `generate_batch`: seconds, seed, given, and fields of `SamplingConfig`.
        """
        clips = self.generate_batch([prompt], sample_indices=[sample_index], **options)
        return (clip[0].numpy() for clip in clips)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        seconds: float | None = None,
        seed: int | SeedPlan = 0,
        sample_indices: Sequence[int] | None = None,
        given: Given | None = None,
        **options: object,
    ) -> Iterator[FrameStack]:
        """As `generate` for several prompts: clips uint8 `b f h w c`; a sample does not depend on its batch.

        The shots of a storyboard bring their own seconds. `options` change fields of the model's own `sampling`. Raises
        `ValueError` at the call for an empty prompt, an unknown option, or more seconds than the language model has
        positions for.
        """
        draws: dict[str, Any] = {"seed": seed, "sample_indices": sample_indices, "given": given}
        draws["sampling"] = self.sampling.changed(**options)
        return self.render(self.write(prompts, seconds=seconds, **draws), length_s(prompts, seconds), **draws)

    def write(
        self,
        prompts: Sequence[Prompt],
        *,
        seconds: float | None = None,
        seed: int | SeedPlan = 0,
        sample_indices: Sequence[int] | None = None,
        given: Given | None = None,
        sampling: SamplingConfig | None = None,
    ) -> Iterator[KeyFrameTokens]:
        """The language model's half of `generate_batch`: key frames, from the first clip's head to the last one's tail.

        A storyboard's prompt changes after the key frame that ends its shot. Everything is checked at the call.
        """
        given, config, length = given or Given(), self.tokenizer.config, length_s(prompts, seconds)
        scripts = [[Shot(p, length)] if isinstance(p, str) else list(p) for p in prompts]
        start = 0 if given.key_frames is None else given.key_frames.shape[1]
        counts = key_frames_of(scripts[0], config.clip_s)
        counts[-1] += config.num_clips(self.num_frames(length)) + 1 - sum(counts)
        counts[0] -= start > 0
        texts = [[shot.prompt for shot in shots] for shots in zip(*scripts, strict=True)]
        text_ids = [self.text.encode(part, self.lm.config.text_length).to(self.tokenizer.device) for part in texts]

        def written(shot: int, prefix: DeepTokens | None, count: int) -> Iterator[KeyFrameTokens]:
            return self.lm.generate(
                text_ids[shot],
                count,
                prefix=prefix,
                goal=given.goal,
                goal_keyframe=None if given.goal is None else start + sum(counts) - 1,
                seed=seed,
                sample_indices=sample_indices,
                sampling=sampling or self.sampling,
            )

        def shots() -> Iterator[KeyFrameTokens]:
            done = given.key_frames
            if done is not None:
                yield done[:, -1]
            for shot, count in enumerate(counts):
                for tokens in written(shot, done, count) if count else ():
                    done = tokens[:, None] if done is None else torch.cat([done, tokens[:, None].to(done)], dim=1)
                    yield tokens

        written(0, given.key_frames, sum(counts))  # generates nothing yet: it checks the whole length
        return at_first(shots) if self.offloads else shots()

    def render(
        self,
        key_frames: Iterator[KeyFrameTokens],
        seconds: float,
        *,
        seed: int | SeedPlan = 0,
        sample_indices: Sequence[int] | None = None,
        given: Given | None = None,
        sampling: SamplingConfig | None = None,
    ) -> Iterator[FrameStack]:
        """The decoder's half of `generate_batch`: the clips between key frames, each rendered when asked for."""
        given = given or Given()
        clips = self.tokenizer.decode_pairs(
            consecutive(key_frames),
            sampling=sampling or self.sampling,
            seed=seed,
            sample_indices=sample_indices,
            before=given.before,
            first_clip=0 if given.key_frames is None else given.key_frames.shape[1] - 1,
        )
        return trimmed(clips, self.num_frames(seconds))

    def reconstruct(self, frames: Video, *, seed: int = 0, **options: object) -> Iterator[Video]:
        """A video's clips after encoding and decoding; as many frames as the input, less a lone last one."""
        tokens = self.tokenizer.encode(torch.from_numpy(np.ascontiguousarray(frames))[None])
        clips = self.tokenizer.decode(tokens, seed=seed, sampling=self.sampling.changed(**options))
        return (clip[0].numpy() for clip in trimmed(clips, len(frames)))


def at_first(shots: Callable[[], Iterator[KeyFrameTokens]]) -> Iterator[KeyFrameTokens]:
    """All key frames, written when the first one is asked for: a language model is moved once, not for every clip."""
    yield from list(shots())


def key_places(frames: int, spacing: int) -> list[int]:
    """The key frames of a video to continue: every `spacing`-th frame, counted back from the last one.

    Its first frame is one too where it lies at least half that before the others: the language model takes a lone end
    for a beginning. Without it, bundled `sprites` continued videos of two seconds with 0.42 of the motion
    (docs/long.md).
    """
    places = list(range((frames - 1) % spacing, frames, spacing))
    return [0, *places] if 2 * places[0] >= spacing else places


def length_s(prompts: Sequence[Prompt], seconds: float | None) -> float:
    """The length of a batch of videos. Raises `ValueError` for none, for two, or for an empty prompt."""
    if not prompts or not all(prompt.strip() if isinstance(prompt, str) else prompt for prompt in prompts):
        raise ValueError("expected a prompt of at least one word")
    boards = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if not boards:
        length = 4.0 if seconds is None else seconds
        if not (math.isfinite(length) and length > 0):
            raise ValueError(f"seconds: expected a positive number, got {length}")
        return length
    durations = {tuple(shot.seconds for shot in board) for board in boards}
    if len(durations) > 1 or len(boards) < len(prompts):
        raise ValueError(f"storyboards of one batch: expected shots of the same seconds, got {sorted(durations)}")
    if seconds is not None:
        raise ValueError(f"seconds: a storyboard's shots have their own, got {seconds:g} as well")
    return sum(shot.seconds for shot in boards[0])


def consecutive(key_frames: Iterator[KeyFrameTokens]) -> Iterator[DeepTokens]:
    """Key frames one by one → (head, tail) pairs `b 2 n d`; reads one key frame ahead."""
    head = next(key_frames)
    for tail in key_frames:
        yield torch.stack([head, tail], dim=1)
        head = tail


def trimmed(clips: Iterator[FrameStack], num_frames: int) -> Iterator[FrameStack]:
    """The first `num_frames` frames of a stream of clips; later clips are not rendered."""
    while num_frames > 0 and (clip := next(clips, None)) is not None:
        yield clip[:, :num_frames].cpu()
        num_frames -= clip.shape[1]
