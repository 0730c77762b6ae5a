"""Stage 2: the language model learns from captions and cached deep tokens."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dicode.hub import content_hash, load_weights, read_config, write_config
from dicode.lm.deep_lm import WEIGHTS as LM_WEIGHTS
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.sizes import SIZES, DeepLMConfig
from dicode.lm.text import TextTokenizer
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, WEIGHTS, VideoTokenizer
from dicode.train.images import frames_to_pixels, pixels_to_frames
from dicode.train.loop import LoopConfig
from dicode.video.shards import CachedVideo, FrameCache
from dicode.video.sheet import contact_sheet

RANKED_CLIPS = 48  # validation clips whose captions are matched with each other


@dataclass(frozen=True)
class LanguageRun:
    """Train a language model on the deep tokens of a tokenizer; `init` continues from another run's weights."""

    cache: str = "cache/sprites"
    tokenizer: str = "runs/tokenizer/best"
    init: str | None = None
    model: DeepLMConfig = field(default_factory=lambda: SIZES["sprites"])
    loop: LoopConfig = field(default_factory=LoopConfig)
    key_frames: int = 3  # of most samples: 4 s
    longer: tuple[int, ...] = (9, 31)  # key frames of the steps that teach long videos, up to a minute …
    longer_share: tuple[float, ...] = (0.08, 0.02)  # … and the share of steps of each
    from_start: float = 0.75  # share of samples that begin where the video does; the others begin anywhere in its loop
    long_captions: float = 0.4  # share of samples with the expanded caption, where there is one
    null_captions: float = 0.1  # share without text, for guidance
    word_dropout: float = 0.3  # share of samples that lose words …
    dropped_words: float = 0.3  # … and how many of them


def frame_tokens(tokenizer: VideoTokenizer, cache: FrameCache, path: Path) -> Tensor:
    """Deep tokens of every cached frame, float16 `f n d`, computed once and kept at `path`."""
    if not path.is_file():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts = [
                tokenizer.tokens_of(tokenizer.first_stage.encode(frames_to_pixels(part)))
                for part in cache.frames.split(128)
            ]
        save_file({"tokens": torch.cat(parts).half()}, path)
    return load_file(path)["tokens"]


class LanguageTraining:
    """The `Stage` of a `LanguageRun`."""

    best = "-validation_loss"

    def __init__(self, run: LanguageRun):
        self.run = run
        folder = Path(run.tokenizer)
        self.tokenizer = VideoTokenizer.from_pretrained(folder)
        cache = FrameCache.load(run.cache)
        self.cache, self.validation = cache.subset(validation=False), cache.subset(validation=True)
        made_by = content_hash(folder / FIRST_STAGE_WEIGHTS, folder / WEIGHTS)
        self.tokens = frame_tokens(self.tokenizer, cache, Path(run.cache) / f"tokens-{made_by}.safetensors")
        text = TextTokenizer.load(Path(run.init)) if run.init else self._learn_text()
        torch.manual_seed(run.loop.seed)
        self.text = text
        self.module = DeepTokenLM(replace(run.model, pad_id=text.pad_id, begin_id=text.begin_id), text)
        if run.init:
            load_weights(self.module, Path(run.init) / LM_WEIGHTS)
        if run.loop.compile:
            self.module.compile(dynamic=False)

    def _learn_text(self) -> TextTokenizer:
        captions = [caption for video in self.cache.videos for caption in video.captions]
        return TextTokenizer.train(captions, self.run.model.vocab_size)

    def num_samples(self) -> int:
        return len(self.cache.videos)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        def chance() -> float:
            return float(torch.rand((), generator=generator))

        drawn, key_frames = chance(), self.run.key_frames
        for longer, share in zip(self.run.longer, self.run.longer_share, strict=True):
            if 0 <= drawn < share:
                key_frames = longer
            drawn -= share
        texts, rows = [], []
        for i in indices:
            video = self.cache.videos[int(i)]
            start_s = 0.0 if chance() < self.run.from_start else chance() * video.period_s
            rows.append(self.key_frame_rows(video, key_frames, start_s))
            texts.append(self.text_of(video, generator))
        return {"text_ids": self.encode(texts), "tokens": self.tokens[torch.stack(rows)].float()}

    def key_frame_rows(self, video: CachedVideo, key_frames: int, start_s: float = 0.0) -> Tensor:
        """Cache rows of `key_frames` frames, one clip apart."""
        return self.cache.clip_rows(video, start_s, key_frames, 1 / self.tokenizer.config.clip_s)

    def text_of(self, video: CachedVideo, generator: torch.Generator) -> str:
        """One of the video's captions, whole, with words missing, or nothing."""
        draws = torch.rand(4, generator=generator).tolist()
        if draws[0] < self.run.null_captions or not video.captions:
            return ""
        caption = video.captions[-1 if draws[1] < self.run.long_captions else 0]
        words = caption.split()
        if draws[2] < self.run.word_dropout and len(words) > 1:
            kept = torch.rand(len(words), generator=generator) >= self.run.dropped_words
            words = [word for word, keep in zip(words, kept, strict=True) if keep] or words[-1:]
        return " ".join(words)

    def encode(self, texts: list[str]) -> Tensor:
        """Text ids, cut to the model's length: expanded captions run over it, and their beginning says most."""
        length = self.run.model.text_length
        rows = [entry.ids[:length] for entry in self.text.tokenizer.encode_batch([" ".join(t.split()) for t in texts])]
        return torch.tensor([row + [self.text.pad_id] * (length - len(row)) for row in rows])

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(self.module.parameters()).device
        output = self.module(batch["text_ids"].to(device), batch["tokens"].to(device), generator=generator)
        return output.loss, {"first_key_frame": output.keyframe_loss[:, 0].mean().detach()}

    def validate(self) -> tuple[dict[str, float], Image.Image]:
        """Loss on validation and on training clips from their start; how well captions pick out their own clip."""
        metrics: dict[str, float] = {}
        for name, videos in (("validation", self.validation.videos), ("training", self.cache.videos[::14])):
            losses = [self.module(*self.sample_of(part)).loss for part in chunks(videos, 32)]
            metrics[f"{name}_loss"] = torch.stack(losses).mean().item()
        metrics["caption_rank"] = self.caption_rank()
        return metrics, self.sheet()

    def sample_of(self, videos: tuple[CachedVideo, ...], key_frames: int | None = None) -> tuple[Tensor, Tensor]:
        """Short captions and tokens of videos from their start, without augmentation."""
        device = next(self.module.parameters()).device
        rows = torch.stack([self.key_frame_rows(v, key_frames or self.run.key_frames) for v in videos])
        ids = self.encode([v.captions[0] if v.captions else "" for v in videos])
        return ids.to(device), self.tokens[rows].float().to(device)

    def caption_rank(self) -> float:
        """Mean percentile rank (100 best, 50 chance) of a clip's own caption among all, by its tokens' likelihood.

        Unlike the loss it does not punish confidence: a model may be overfitted in its variances and still know best.
        """
        step = max(1, len(self.validation.videos) // RANKED_CLIPS)
        ids, tokens = self.sample_of(self.validation.videos[::step][:RANKED_CLIPS], key_frames=1)
        n = len(ids)
        ranks = []
        for own in range(n):
            loss = self.module(ids, repeat(tokens[own], "k n d -> b k n d", b=n)).keyframe_loss[:, 0]
            ranks.append((loss > loss[own]).float().sum() / (n - 1) * 100)
        return torch.stack(ranks).mean().item()

    def sheet(self) -> Image.Image:
        """Real and written key frames, through the key-frame head, for six training and six validation captions."""
        videos = self.cache.videos[:: len(self.cache.videos) // 6][:6] + self.validation.videos[::20][:6]
        ids, real = self.sample_of(videos)
        written = torch.stack(list(self.module.generate(ids, self.run.key_frames, variance_scale=0.5)), dim=1)
        both = torch.cat([real, written.to(real)], dim=1)
        latents = self.tokenizer.key_latents(rearrange(both, "b k n d -> (b k) n d").to(self.tokenizer.device))
        frames = pixels_to_frames(self.tokenizer.first_stage.decode(latents))
        clips = rearrange(frames, "(b k) h w c -> b k h w c", b=len(videos)).cpu().numpy()
        return contact_sheet(list(clips), [v.captions[0] if v.captions else "" for v in videos], columns=clips.shape[1])

    def export(self, folder: Path) -> None:
        section: dict[str, Any] = self.module.save_part(folder)
        write_config(folder, {"lm": section, "tokenizer": read_config(Path(self.run.tokenizer))["tokenizer"]})


def chunks(videos: tuple[CachedVideo, ...], size: int) -> list[tuple[CachedVideo, ...]]:
    """Consecutive pieces of at most `size`."""
    return [videos[i : i + size] for i in range(0, len(videos), size)]
