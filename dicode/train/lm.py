"""Stage 2: the language model learns from captions and cached deep tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from dicode.checkpoint import content_hash, downloaded, load_weights, read_config, write_config
from dicode.data.cache import CachedVideo, FrameCache, Rows
from dicode.data.columns import CAPTIONED, Videos, spread_numbers
from dicode.device import Precision, autocast, pick_device
from dicode.features.scorer import ALL, Scorer, scorer_metrics, truth_of
from dicode.files import read_json
from dicode.lm.deep_lm import WEIGHTS as LM_WEIGHTS
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.text import TextTokenizer
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, WEIGHTS, VideoTokenizer
from dicode.train.augment import View
from dicode.train.first_stage import frames_to_pixels, pixels_to_frames
from dicode.train.lora import add_adapters, merged
from dicode.train.parallel import Processes
from dicode.train.runs import VALIDATION_CLIPS, LanguageRun
from dicode.train.tokenizer import at_once, latents_name
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

RANKED_CLIPS = 48  # validation clips whose captions are matched with each other
WRITTEN_CLIPS = 64  # captions of either split that the model writes from at every evaluation …
WRITTEN_AMONG = 2048  # … and clips among which what it writes is looked up
SCORED_CLIPS = 16  # validation captions whose videos a scorer sees
MEASURED_CLIPS = 512  # that say whether changes or whole key frames are the easier to predict
MOST_READ = 200_000  # training videos whose captions the vocabulary is learnt from
BODY_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "vocab.json", "merges.txt"]


def frame_tokens(
    tokenizer: VideoTokenizer, cache: FrameCache, source: Path, view: View | None = None, precision: Precision = "auto"
) -> Rows:
    """Deep tokens of the frames that can be key frames, or of a view of them, float16 `f n d`.

    Those are all frames of a loop, and those a whole number of clips after the start of another video. Computed once
    and kept beside the shards, under a name that tells the weights of the tokenizer's `source`; where a tokenizer's
    training left first-stage latents there, from those.
    """
    clip_s, reads_latents = tokenizer.config.clip_s, tokenizer.config.encoder.reads_latents
    names = [latents_name(source / FIRST_STAGE_WEIGHTS, mirror) for mirror in (False, True)]

    def chosen(rows: range) -> Tensor:
        found = [torch.empty(0, dtype=torch.long)]
        for video in cache.of_rows(rows):
            every = torch.arange(video.first, video.first + video.count)
            found.append(
                every if video.loops else cache.clip_rows(video, 0.0, key_frames_of(video, clip_s), 1 / clip_s)
            )
        return torch.cat(found).unique()

    def tokens(rows: Tensor) -> Tensor:
        latents = next((k for name in names if (k := cache.kept(name, rows)) is not None), None)
        device, resampler = tokenizer.device, tokenizer.config.resampler
        parts = [torch.empty(0, resampler.queries, resampler.token_width, dtype=torch.half)]
        with torch.no_grad(), autocast(device, precision):
            for at in torch.arange(len(rows)).split(at_once(128, tokenizer.config.size)):
                if reads_latents and view is None and latents is not None:
                    read = latents[at, 0].float().to(device)
                else:
                    frames = cache.frames[rows[at]] if view is None else view.of_frames(cache.frames[rows[at]])
                    read = tokenizer.source_of(frames_to_pixels(frames).to(device))
                parts.append(tokenizer.tokens_of(read).half().cpu())
        return torch.cat(parts)

    name = f"tokens-{content_hash(source / FIRST_STAGE_WEIGHTS, source / WEIGHTS)}-{clip_s:g}s"
    return cache.computed_of(name if view is None else f"{name}-{view.name}", chosen, tokens)


def key_frames_of(video: CachedVideo, clip_s: float) -> int:
    """How many key frames, one clip apart from its start on, a video that does not loop has; a still image has one."""
    count = 1 + int(video.period_s / clip_s)
    return 1 if video.count == 1 else count + video.lasts(count * clip_s)


def body_folder(name: str) -> Path:
    """The folder of a `transformers` model: one on disk, or downloaded by its id. Raises `CheckpointError`."""
    return Path(name) if Path(name).is_dir() else downloaded(name, BODY_FILES)


class LanguageTraining:
    """The `Stage` of a `LanguageRun`."""

    def __init__(self, run: LanguageRun, measure: "Callable[[LanguageTraining], dict[str, float]] | None" = None):
        """`measure` is a validation of another kind, in place of `validate`'s own."""
        self.measure = measure
        named = [name for name in ("init", "body", "vocabulary") if getattr(run, name)]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)}: each brings a vocabulary of its own; name one of them")
        if not 0 <= run.self_rollout_prob <= 1:
            raise ValueError(f"self_rollout_prob: expected a share of steps, 0 to 1, got {run.self_rollout_prob}")
        if run.self_rollout_prob and run.model.order == "token":
            raise ValueError(
                "self_rollout_prob: needs model.order 'keyframe'; in 'token' a key frame is read as it is learnt"
            )
        if run.self_rollout_prob and run.loop.strategy == "fsdp":
            raise ValueError(
                "self_rollout_prob: needs loop.strategy 'ddp'; under FSDP all processes must draw as often"
            )
        if run.lora.rank and not run.init:
            raise ValueError("lora: name in init the trained language model that is to be adapted")
        self.run = run
        folder = Path(run.tokenizer)
        self.scorer = None if run.scorer is None else self._scorer(run.scorer, folder)
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
        told = self.captions()
        self.words = [[word for captions in told for word in captions[kind].split()] for kind in (0, -1)]
        # the loss is least long before the caption is heard, and the very caption is met late or never (docs/log.md)
        self.best = "written_rank" if told else "-validation_loss"
        self.module = DeepTokenLM(replace(run.model, pad_id=text.pad_id, begin_id=text.begin_id), text)
        if run.init:
            load_weights(self.module, Path(run.init) / LM_WEIGHTS)
        if body:
            self.module.backbone.load_pretrained(body)
        if run.lora.rank:
            add_adapters(self.module, run.lora, run.loop.seed)
        if run.loop.compile:
            self.module.compile(dynamic=False)
        if Processes().first and (said := self.change_said()):
            print(said, flush=True)

    def _scorer(self, spec: str, folder: Path) -> Scorer:
        """The scorer. Raises `ValueError` where no clips of this tokenizer's can be shown to it."""
        note = folder.parent / "recipe.json"
        if note.is_file() and read_json(note)["recipe"].get("run", {}).get("train_denoiser") is False:
            raise ValueError(
                f"scorer: {folder} has not learnt to render clips; name in tokenizer a run that has, of the same "
                "tokens, such as runs/NAME-denoiser/best"
            )
        if self.run.key_frames < 2:
            raise ValueError("scorer: expected key_frames 2 or more, since there is no clip before a second one")
        return Scorer(spec)

    def captions(self) -> list[tuple[str, ...]]:
        """The captions of up to `MOST_READ` training videos."""
        return [video.captions for video in self.cache.columns.having(CAPTIONED).spread(MOST_READ)]

    def change_said(self) -> str:
        """A line that says whether `model.predict_residual` fits these videos; nothing where key frames stand alone."""
        clip_s = self.tokenizer.config.clip_s
        videos = self.cache.columns.lasting(clip_s).spread(MEASURED_CLIPS)
        if len(videos) < 2 or max((self.run.key_frames, *self.run.longer)) < 2:
            return ""
        tokens = self.tokens[torch.stack([self.key_frame_rows(video, 2) for video in videos])].float()
        change = (tokens[:, 1] - tokens[:, 0]).square().mean().item()
        whole = (tokens[:, 1] - tokens[:, 1].mean(0)).square().mean().item()
        held, fits = self.run.model.predict_residual, change < whole
        return (
            f"variance of key frames {whole:.3g}, of changes from one to the next {change:.3g} ({len(videos)} clips): "
            f"model.predict_residual {held} {'fits' if held == fits else 'may not fit, try ' + str(fits)}"
        )

    def _text(self, body: Path | None) -> TextTokenizer:
        """The vocabulary of the weights to begin from, the one named, or one learnt from the captions."""
        if self.run.init:
            return TextTokenizer.load(Path(self.run.init))
        if folder := body or self.run.vocabulary:
            return TextTokenizer.from_pretrained(Path(folder))
        captions = [caption for captions in self.captions() for caption in captions]
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
        for i in indices:
            video = self.cache.videos[int(i)]
            start_s = 0.0 if chance() < self.run.from_start else self.later_start_s(video, key_frames, chance())
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
        everywhere = 1 + int(mask[:, 1:].all(0).long().cumprod(0).sum())  # key frames that all samples have
        goal = self.run.end_frame_prob > 0 and everywhere > 2 and chance() < self.run.end_frame_prob
        length = everywhere if goal else 1 + int(mask[:, 1:].any(0).sum())
        return {
            "text_ids": self.encode(texts),
            "tokens": torch.stack(tokens)[:, :length].float(),
            "mask": mask[
                :, :length
            ],  # False, no loss: past the end of a video that does not loop, and the first one of a view
            "goal": torch.tensor(goal),
            "own": torch.tensor(not goal and self.run.self_rollout_prob > 0 and chance() < self.run.self_rollout_prob),
        }

    def later_start_s(self, video: CachedVideo, key_frames: int, drawn: float) -> float:
        """Where a sample begins that need not begin at the start, for a number 0…1: anywhere in a loop.

        Another video that is longer than the sample loses whole clips; of one that is not, the sample holds all.
        """
        clip_s = self.tokenizer.config.clip_s
        if video.loops:
            return drawn * video.period_s
        beyond = key_frames_of(video, clip_s) - key_frames
        return clip_s * (1 + int(drawn * beyond)) if beyond > 0 else 0.0

    def key_frame_rows(self, video: CachedVideo, key_frames: int, start_s: float = 0.0) -> Tensor:
        """Cache rows of `key_frames` frames, one clip apart; past the end of a video the last real one again."""
        rows = self.cache.clip_rows(video, start_s, key_frames, 1 / self.tokenizer.config.clip_s)
        return rows[torch.arange(key_frames).clamp(max=int(self.is_real(video, key_frames, start_s).sum()) - 1)]

    def is_real(self, video: CachedVideo, key_frames: int, start_s: float = 0.0) -> Tensor:
        """Which of `key_frame_rows` are not past the end of a video that does not loop; of a still image the first."""
        clip_s = self.tokenizer.config.clip_s
        if video.loops and video.count > 1:
            return torch.full((key_frames,), True)
        return torch.arange(key_frames) < max(1, key_frames_of(video, clip_s) - round(start_s / clip_s))

    def text_of(self, video: CachedVideo, generator: torch.Generator) -> str:
        """One of the video's captions, whole, with words missing or words of other captions in it, or nothing.

        Of two captions the second is the long one; of more each is as likely.
        """
        draws = torch.rand(4, generator=generator).tolist()
        if draws[0] < self.run.null_captions or not video.captions:
            return ""
        number = -1 if draws[1] < self.run.long_captions else 0
        if len(video.captions) > 2:  # not a short and a long one but several of a kind
            number = int(draws[1] * len(video.captions))
        words, others = video.captions[number].split(), self.words[min(number, 1)]
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
        output = self.module(text_ids, tokens, mask, generator, goal=told)
        return output.loss, {"first_key_frame": output.keyframe_loss[:, 0].mean().detach()}

    def weight(self, batch: dict[str, Tensor]) -> float:
        """How many key frames carry the loss; a goal is given."""
        return float(batch["mask"][:, : -1 if batch["goal"] else None].sum())

    def validate(self) -> tuple[dict[str, float], Image.Image | None]:
        """Loss on validation and on training clips from their start; how well captions pick out their own clip.

        On `VALIDATION_CLIPS` or fewer of either split. `written_rank` is the mean of those of both splits. No sheet
        where a tokenizer has no key-frame head, and would have to render clips for it.
        """
        if self.measure:
            return self.measure(self), None
        metrics: dict[str, float] = {}
        held, trained = self.validation.columns, self.cache.columns
        for name, videos in (("validation", held), ("training", trained.spread(1 + len(trained) // 14))):
            metrics[f"{name}_loss"] = self.loss_of(videos.spread(VALIDATION_CLIPS))
        metrics["caption_rank"] = self.caption_rank()
        metrics["written_share"], metrics["written_rank_training"] = self.written(trained)
        metrics["written_rank_validation"] = self.written(held)[1]
        metrics["written_rank"] = (metrics["written_rank_training"] + metrics["written_rank_validation"]) / 2
        metrics |= self.scored()
        return metrics, None if self.tokenizer.key_head is None else self.sheet()

    def loss_of(self, videos: Sequence[CachedVideo]) -> float:
        """Mean loss of the key frames that videos have, from their start."""
        losses, counts = [], []
        for part in chunks(videos, 32):
            real = torch.stack([self.is_real(video, self.run.key_frames) for video in part])
            ids, tokens = self.sample_of(part)
            losses.append(self.module(ids, tokens, real.to(ids.device)).loss.float().cpu() * real.sum())
            counts.append(real.sum())
        return (torch.stack(losses).sum() / torch.stack(counts).sum()).item()

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
        ids, tokens = self.sample_of(self.validation.columns.spread(RANKED_CLIPS), key_frames=1)
        n = len(ids)
        ranks = []
        for own in range(n):
            loss = self.module(ids, repeat(tokens[own], "k n d -> b k n d", b=n)).keyframe_loss[:, 0]
            ranks.append((loss > loss[own]).float().sum() / max(1, n - 1) * 100)
        return torch.stack(ranks).mean().item()

    def written(self, videos: Sequence[CachedVideo]) -> tuple[float, float]:
        """Write first key frames of up to 64 captions and look them up among the real ones of up to 2,048 `videos`.

        They are drawn as the model will be used. Returns the share whose nearest real key frame carries the caption
        (0…1), and the mean percentile rank (100 best, 50 chance) of the true one: text control without the decoder.
        """
        captioned = list(Videos.of(videos).having(CAPTIONED).spread(WRITTEN_AMONG))
        if not captioned:
            return 0.0, 50.0
        numbers = spread_numbers(len(captioned), WRITTEN_CLIPS).tolist()
        captions = [v.captions[0] for v in captioned]
        real = torch.cat([self.sample_of(part, key_frames=1)[1].flatten(1) for part in chunks(captioned, 256)])
        ids, _ = self.sample_of([captioned[i] for i in numbers], key_frames=1)
        made = next(self.written_of(ids, 1))
        distances = torch.cdist(made.flatten(1).to(real), real)
        own = torch.tensor(numbers, device=distances.device)
        nearest = distances.argmin(1).tolist()
        share = sum(captions[i] == captions[j] for i, j in zip(nearest, numbers, strict=True)) / len(numbers)
        nearer = (distances < distances.gather(1, own[:, None])).float().sum(1) / max(1, len(captioned) - 1)
        return share, 100 * (1 - nearer).mean().item()

    def scored(self) -> dict[str, float]:
        """Share of videos written and rendered of up to 16 validation captions of which the run's scorer is right.

        `scorer_KEY` of each key that their lines have too, and `scorer_all` of those together. Nothing without one.
        """
        if self.scorer is None:
            return {}
        videos = self.validation.columns.having(CAPTIONED).spread(SCORED_CLIPS)
        made: list[Video] = []
        self.tokenizer.to(next(self.module.parameters()).device)  # until they are rendered
        for part in chunks(videos, at_once(SCORED_CLIPS, self.tokenizer.config.size)):
            ids, _ = self.sample_of(part, key_frames=1)
            tokens = torch.stack([*self.written_of(ids, self.run.key_frames)], dim=1).to(self.tokenizer.device)
            indices = list(range(len(made), len(made) + len(part)))
            decoded = self.tokenizer.decode(tokens.float(), seed=self.run.loop.seed, sample_indices=indices)
            made += [*torch.cat([frames.cpu() for frames in decoded], dim=1).numpy()]
        self.tokenizer.cpu()
        found = scorer_metrics(self.scorer, made, [truth_of(video) for video in videos])
        together = found.pop(ALL, None) or next(iter(found.values()))
        return {f"scorer_{key}": own.value for key, own in found.items()} | {"scorer_all": together.value}

    def written_of(self, text_ids: Tensor, key_frames: int) -> Iterator[Tensor]:
        """Key frames as the model will be sampled."""
        sampling = replace(self.tokenizer.config.sampling, context_key_frames=0)
        return self.module.generate(text_ids, key_frames, sampling=sampling)

    def sheet(self) -> Image.Image:
        """Real and written key frames, through the key-frame head, for six training and six validation captions."""
        videos = [*self.cache.columns.spread(6), *self.validation.columns.spread(6)]
        ids, real = self.sample_of(videos)
        written = torch.stack(list(self.written_of(ids, self.run.key_frames)), dim=1)
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
