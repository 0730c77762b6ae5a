"""Stage 2: the language model learns from captions and cached deep tokens."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from dicode.device import Precision, autocast, pick_device
from dicode.hub import content_hash, downloaded, load_weights, read_config, write_config
from dicode.lm.deep_lm import WEIGHTS as LM_WEIGHTS
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.text import TextTokenizer
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, WEIGHTS, VideoTokenizer
from dicode.train.clips import at_once
from dicode.train.images import frames_to_pixels, pixels_to_frames
from dicode.train.lora import add_adapters, merged
from dicode.train.own import with_own
from dicode.train.runs import LanguageRun
from dicode.train.views import View
from dicode.video.shards import CachedVideo, FrameCache, Rows
from dicode.video.sheet import contact_sheet

RANKED_CLIPS = 48  # validation clips whose captions are matched with each other
WRITTEN_CLIPS = 64  # captions of either split that the model writes from at every evaluation
BODY_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "vocab.json", "merges.txt"]


def frame_tokens(
    tokenizer: VideoTokenizer, cache: FrameCache, source: Path, view: View | None = None, precision: Precision = "auto"
) -> Rows:
    """Deep tokens of every cached frame, or of a view of it, float16 `f n d`.

    Computed once and kept beside the shards, under a name that tells the weights of the tokenizer's `source`.
    """

    def tokens(frames: Tensor) -> Tensor:
        device, pieces = tokenizer.device, frames.split(at_once(128, frames.shape[1]))
        pieces = pieces if view is None else [view.of_frames(piece) for piece in pieces]
        with torch.no_grad(), autocast(device, precision):
            sources = (tokenizer.source_of(frames_to_pixels(piece).to(device)) for piece in pieces)
            parts = [tokenizer.tokens_of(part).half().cpu() for part in sources]
        return torch.cat(parts)

    name = f"tokens-{content_hash(source / FIRST_STAGE_WEIGHTS, source / WEIGHTS)}"
    return cache.computed(name if view is None else f"{name}-{view.name}", tokens)


def body_folder(name: str) -> Path:
    """The folder of a `transformers` model: one on disk, or downloaded by its id. Raises `CheckpointError`."""
    return Path(name) if Path(name).is_dir() else downloaded(name, BODY_FILES)


class LanguageTraining:
    """The `Stage` of a `LanguageRun`."""

    best = "written_share"  # the loss is least long before the caption is heard (docs/log.md)

    def __init__(self, run: LanguageRun, measure: "Callable[[LanguageTraining], dict[str, float]] | None" = None):
        """`measure` is a validation of another kind, in place of `validate`'s own."""
        self.measure = measure
        named = [name for name in ("init", "body", "vocabulary") if getattr(run, name)]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)}: each brings a vocabulary of its own; name one of them")
        if not 0 <= run.own_share <= 1:
            raise ValueError(f"own_share: expected a share of steps, 0 to 1, got {run.own_share}")
        if run.own_share and run.model.order == "token":
            raise ValueError("own_share: needs model.order 'keyframe'; in 'token' a key frame is read as it is learnt")
        if run.own_share and run.loop.strategy == "fsdp":
            raise ValueError("own_share: needs loop.strategy 'ddp'; under FSDP all processes must draw as often")
        if run.lora.rank and not run.init:
            raise ValueError("lora: name in init the trained language model that is to be adapted")
        self.run = run
        folder = Path(run.tokenizer)
        self.tokenizer = VideoTokenizer.from_pretrained(folder).to(pick_device(run.loop.device))
        cache = FrameCache.load(run.cache)
        self.cache, self.validation = cache.subset(validation=False), cache.subset(validation=True)
        body = body_folder(run.body) if run.body else None
        text = self._text(body)
        if text.vocab_size > run.model.vocab_size:
            raise ValueError(f"vocab_size: expected {text.vocab_size} or more, got {run.model.vocab_size}")
        precision = run.loop.precision
        self.tokens = frame_tokens(self.tokenizer, cache, folder, precision=precision)
        self.views = [View.numbered(number) for number in range(1, run.views + 1)]
        self.view_tokens = [frame_tokens(self.tokenizer, cache, folder, view, precision) for view in self.views]
        self.tokenizer.cpu()  # an accelerator's memory is for the language model
        torch.manual_seed(run.loop.seed)
        self.text = text
        told = [video.captions for video in self.cache.videos if video.captions]
        self.words = [[word for captions in told for word in captions[kind].split()] for kind in (0, -1)]
        self.module = DeepTokenLM(replace(run.model, pad_id=text.pad_id, begin_id=text.begin_id), text)
        if run.init:
            load_weights(self.module, Path(run.init) / LM_WEIGHTS)
        if body:
            self.module.load_body(body)
        if run.lora.rank:
            add_adapters(self.module, run.lora, run.loop.seed)
        if run.loop.compile:
            self.module.compile(dynamic=False)

    def _text(self, body: Path | None) -> TextTokenizer:
        """The vocabulary of the weights to begin from, the one named, or one learnt from the captions."""
        if self.run.init:
            return TextTokenizer.load(Path(self.run.init))
        if folder := body or self.run.vocabulary:
            return TextTokenizer.from_pretrained(Path(folder))
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
        texts, tokens, masks = [], [], []
        clip_s = self.tokenizer.config.clip_s
        for i in indices:
            video = self.cache.videos[int(i)]
            last_start_s = video.period_s if video.loops else max(0.0, video.period_s - clip_s)
            start_s = 0.0 if chance() < self.run.from_start else chance() * last_start_s
            rows = self.key_frame_rows(video, key_frames, start_s)
            real, text = self.is_real(video, key_frames, start_s), self.text_of(video, generator)
            if self.views and chance() < self.run.view_share:
                number = int(chance() * len(self.views))
                real[0], text = False, self.views[number].of_caption(text)
                tokens.append(self.view_tokens[number][rows])
            else:
                tokens.append(self.tokens[rows])
            masks.append(real)
            texts.append(text)
        mask = torch.stack(masks)
        may = self.run.goal_share > 0 and key_frames > 2 and bool(mask[:, 1:].all())
        goal = may and chance() < self.run.goal_share
        return {
            "text_ids": self.encode(texts),
            "tokens": torch.stack(tokens).float(),
            "mask": mask,  # False, no loss: past the end of a video that does not loop, and the first one of a view
            "goal": torch.tensor(goal),
            "own": torch.tensor(not goal and self.run.own_share > 0 and chance() < self.run.own_share),
        }

    def key_frame_rows(self, video: CachedVideo, key_frames: int, start_s: float = 0.0) -> Tensor:
        """Cache rows of `key_frames` frames, one clip apart."""
        return self.cache.clip_rows(video, start_s, key_frames, 1 / self.tokenizer.config.clip_s)

    def is_real(self, video: CachedVideo, key_frames: int, start_s: float = 0.0) -> Tensor:
        """Which of `key_frame_rows` are not past the end of a video that does not loop."""
        clip_s = self.tokenizer.config.clip_s
        moments_s = start_s + clip_s * torch.arange(key_frames)
        return torch.full((key_frames,), True) if video.loops else moments_s <= max(clip_s, video.period_s)

    def text_of(self, video: CachedVideo, generator: torch.Generator) -> str:
        """One of the video's captions, whole, with words missing or words of other captions in it, or nothing."""
        draws = torch.rand(4, generator=generator).tolist()
        if draws[0] < self.run.null_captions or not video.captions:
            return ""
        kind = -1 if draws[1] < self.run.long_captions else 0
        words, others = video.captions[kind].split(), self.words[kind]
        if draws[3] < self.run.word_swaps:
            swapped = torch.rand(len(words), generator=generator) < self.run.swapped_words
            drawn = torch.randint(len(others), (len(words),), generator=generator).tolist()
            words = [others[i] if swap else word for word, swap, i in zip(words, swapped, drawn, strict=True)]
        elif draws[2] < self.run.word_dropout and len(words) > 1:
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
        text_ids, tokens = batch["text_ids"].to(device), batch["tokens"].to(device)
        mask = None if batch["mask"].all() else batch["mask"].to(device)
        told = bool(batch["goal"])
        read = with_own(self.module, text_ids, tokens, batch["mask"], generator) if batch["own"] else None
        output = self.module(text_ids, tokens, mask, generator, goal=told, read=read)
        return output.loss, {"first_key_frame": output.keyframe_loss[:, 0].mean().detach()}

    def weight(self, batch: dict[str, Tensor]) -> float:
        return float(batch["mask"].sum())

    def validate(self) -> tuple[dict[str, float], Image.Image | None]:
        """Loss on validation and on training clips from their start; how well captions pick out their own clip.

        No sheet where a tokenizer has no key-frame head, and would have to render clips for it.
        """
        if self.measure:
            return self.measure(self), None
        metrics: dict[str, float] = {}
        for name, videos in (("validation", self.validation.videos), ("training", self.cache.videos[::14])):
            losses = [self.module(*self.sample_of(part)).loss for part in chunks(videos, 32)]
            metrics[f"{name}_loss"] = torch.stack(losses).mean().item()
        metrics["caption_rank"] = self.caption_rank()
        metrics["written_share"] = self.written(self.cache.videos)[0]
        metrics["written_rank"] = self.written(self.validation.videos)[1]
        return metrics, None if self.tokenizer.key_head is None else self.sheet()

    def sample_of(self, videos: Sequence[CachedVideo], key_frames: int | None = None) -> tuple[Tensor, Tensor]:
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
            ranks.append((loss > loss[own]).float().sum() / max(1, n - 1) * 100)
        return torch.stack(ranks).mean().item()

    def written(self, videos: Sequence[CachedVideo]) -> tuple[float, float]:
        """Write the first key frame of up to 64 captions and look it up among the real ones of all `videos`.

        Returns the share whose nearest real key frame carries the caption (0…1), and the mean percentile rank (100
        best, 50 chance) of the true one: text control without the decoder.
        """
        captioned = tuple(v for v in videos if v.captions)
        if not captioned:
            return 0.0, 50.0
        asked = captioned[:: max(1, len(captioned) // WRITTEN_CLIPS)][:WRITTEN_CLIPS]
        real = torch.stack([self.sample_of((v,), key_frames=1)[1].flatten() for v in captioned])
        ids, _ = self.sample_of(asked, key_frames=1)
        made = next(self.module.generate(ids, 1, variance_scale=0.1, temperature=0.0, guidance=1.5))
        distances = torch.cdist(made.flatten(1).to(real), real)
        own = torch.tensor([captioned.index(v) for v in asked], device=distances.device)
        nearest = [captioned[i].captions[0] for i in distances.argmin(1).tolist()]
        share = sum(n == v.captions[0] for n, v in zip(nearest, asked, strict=True)) / len(asked)
        nearer = (distances < distances.gather(1, own[:, None])).float().sum(1) / max(1, len(captioned) - 1)
        return share, 100 * (1 - nearer).mean().item()

    def sheet(self) -> Image.Image:
        """Real and written key frames, through the key-frame head, for six training and six validation captions."""
        videos = [*self.cache.columns.spread(6), *self.validation.columns.spread(6)]
        ids, real = self.sample_of(videos)
        written = torch.stack(
            list(self.module.generate(ids, self.run.key_frames, variance_scale=0.1, temperature=0.0)), dim=1
        )
        both = torch.cat([real, written.to(real)], dim=1)
        latents = self.tokenizer.key_latents(rearrange(both, "b k n d -> (b k) n d").to(self.tokenizer.device))
        frames = pixels_to_frames(self.tokenizer.first_stage.decode(latents))
        clips = rearrange(frames, "(b k) h w c -> b k h w c", b=len(videos)).cpu().numpy()
        return contact_sheet(list(clips), [v.captions[0] if v.captions else "" for v in videos], columns=clips.shape[1])

    def export(self, folder: Path) -> None:
        with merged(self.module):
            section: dict[str, Any] = self.module.save_part(folder)
        tokenizer = read_config(Path(self.run.tokenizer))["tokenizer"]
        write_config(folder, {"lm": section, "tokenizer": tokenizer, "deep_tokens": self.tokenizer.token_hash()})


def chunks(videos: Sequence[CachedVideo], size: int) -> list[Sequence[CachedVideo]]:
    """Consecutive pieces of at most `size`."""
    return [videos[i : i + size] for i in range(0, len(videos), size)]
