"""Stage 2: the language model learns from captions and cached deep tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from dicode.checkpoint import load_state, load_weights, read_config, read_section, read_tensors
from dicode.checkpoint.hub import downloaded
from dicode.checkpoint.saving import write_config
from dicode.data.columns import CAPTIONED, CachedVideo, Videos, spread_numbers
from dicode.device import pick_device
from dicode.lm.config import DeepLMConfig
from dicode.lm.deep_lm import WEIGHTS, DeepTokenLM
from dicode.lm.text import TextTokenizer
from dicode.pipeline import check_shared
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.augment import View, augmented_caption
from dicode.train.cached import at_once, frame_tokens, key_frames_of, pixels_to_frames, splits, trained_part
from dicode.train.distributed import Processes
from dicode.train.lora import add_adapters, merged
from dicode.train.runs import VALIDATION_CLIPS, LanguageRun
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

PLACE = "embedding.place"
WHOLE_MOTION = 0.5  # probability of a batch with all motion tokens
RANKED_CLIPS = 48  # validation clips whose captions are matched with each other
WRITTEN_CLIPS = 64  # captions of either split that the model generates from at every evaluation …
WRITTEN_AMONG = 2048  # … and clips among which the result is looked up
SCORED_CLIPS = 16  # validation captions whose generated videos are scored
MEASURED_CLIPS = 512  # whose variances show whether residuals or whole key frames are easier to predict
MOST_READ = 200_000  # training videos whose captions the vocabulary is learnt from
BODY_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "vocab.json", "merges.txt"]


def start_from(module: DeepTokenLM, folder: Path) -> None:
    """Take a trained language model's weights. One without motion tokens is a beginning: their places start afresh."""
    if not module.config.motion_tokens or read_section(folder, "lm", DeepLMConfig).motion_tokens:
        load_weights(module, folder / WEIGHTS)
        return
    state, place = read_tensors(folder / WEIGHTS), module.embedding.place.detach()
    held = state[PLACE]
    load_state(module, state | {PLACE: torch.cat([held, place[len(held) :].to(held)])}, str(folder / WEIGHTS))


class LanguageTraining:
    """The `Stage` of a `LanguageRun`."""

    def __init__(self, run: LanguageRun):
        named = [name for name in ("init", "body", "vocabulary") if getattr(run, name)]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)}: each brings a vocabulary of its own; name one of them")
        if run.lora.rank and not run.init:
            raise ValueError("lora: name in init the trained language model that is to be adapted")
        self.run = run
        folder, precision = Path(run.tokenizer), run.loop.precision
        self.scorer: Any = None if run.scorer is None else self._scorer(run.scorer, folder)
        self.tokenizer = VideoTokenizer.from_pretrained(folder).to(pick_device(run.loop.device))
        self._check(run, folder)
        cache, self.cache, self.validation = splits(run.cache)
        body = None
        if run.body:
            body = Path(run.body) if Path(run.body).is_dir() else downloaded(run.body, BODY_FILES)
        captions = [video.captions for video in self.cache.columns.having(CAPTIONED).spread(MOST_READ)]
        self.text = self._text(body, captions)
        if self.text.vocab_size > run.model.vocab_size:
            raise ValueError(f"vocab_size: expected {self.text.vocab_size} or more, got {run.model.vocab_size}")
        self.tokens = frame_tokens(self.tokenizer, cache, precision=precision)
        self.views = [View.numbered(number) for number in range(1, run.augment.views + 1)]
        self.view_tokens = [frame_tokens(self.tokenizer, cache, view, precision) for view in self.views]
        self.tokenizer.cpu()  # an accelerator's memory is for the language model
        torch.manual_seed(run.loop.seed)
        self.words = [[word for texts in captions for word in texts[kind].split()] for kind in (0, -1)]  # short, long
        # the loss is lowest before captions have an effect, and the very caption is met late or never (docs/log.md)
        self.best = "written_rank" if captions else "-validation_loss"
        config = replace(run.model, pad_id=self.text.pad_id, begin_id=self.text.begin_id)
        self.module = DeepTokenLM(config, self.text)
        if run.init:
            start_from(self.module, Path(run.init))
        if body:
            from dicode.lm.library import load_pretrained

            load_pretrained(self.module.backbone, body)
        if run.lora.rank:
            add_adapters(self.module, run.lora, run.loop.seed)
        if run.loop.compile:
            self.module.compile(dynamic=False)
        if Processes().first and not run.init and (line := self.residual_variance()):  # else it is decided
            print(line, flush=True)

    def residual_variance(self) -> str:
        """A line that compares `model.residual_anchor` with the data; empty where key frames stand alone."""
        videos = self.cache.columns.lasting(self.tokenizer.config.clip_s).spread(MEASURED_CLIPS)
        if len(videos) < 2 or max((self.run.key_frames, *self.run.longer)) < 2:
            return ""
        tokens = self.tokens[torch.stack([self.key_frames(video, 2)[0] for video in videos])].float()
        tokens = tokens[:, :, : self.run.model.tokens_per_keyframe]
        residual = (tokens[:, 1] - tokens[:, 0]).square().mean().item()
        whole = (tokens[:, 1] - tokens[:, 1].mean(0)).square().mean().item()
        anchor, fits = self.run.model.residual_anchor, residual < whole
        advice = "fits" if (anchor is not None) == fits else f"may not fit, try {0.0 if fits else None}"
        return (
            f"variance of key frames {whole:.3g}, of their residuals {residual:.3g} ({len(videos)} clips): "
            f"model.residual_anchor {anchor} {advice}"
        )

    def _check(self, run: LanguageRun, folder: Path) -> None:
        """Raise `ValueError` for tokens that the model does not write, or that mean nothing yet; for long sequences."""
        model = run.model
        check_shared(self.tokenizer.config, model)
        if model.motion_tokens and trained_part(folder) == "code":
            raise ValueError(
                f"tokenizer: {folder} computes no motion tokens yet; name a run that has trained them, such as "
                "runs/NAME-motion/best"
            )
        if model.motion_tokens and model.order == "token" and run.loop.compile:
            raise ValueError("loop.compile: sequences of motion tokens have many lengths; leave it out")
        drawn = [count for count, share in zip(run.longer, run.longer_share, strict=True) if share > 0]
        if (longest := max([run.key_frames, *drawn])) > model.keyframe_limit:
            raise ValueError(f"key_frames and longer: expected up to {model.keyframe_limit}, got {longest}")

    def _scorer(self, spec: str, folder: Path) -> Any:
        """The `Scorer`. Raises `ValueError` where this tokenizer renders no clips to score."""
        from dicode.features.scorer import Scorer

        if trained_part(folder) in ("code", "motion"):
            raise ValueError(
                f"scorer: {folder} has not learnt to render clips; name in tokenizer a run that has, of the same "
                "tokens, such as runs/NAME-denoiser/best"
            )
        if self.run.key_frames < 2:
            raise ValueError("scorer: expected key_frames 2 or more, since there is no clip before a second one")
        return Scorer(spec)

    def _text(self, body: Path | None, captions: Sequence[tuple[str, ...]]) -> TextTokenizer:
        """The vocabulary of the weights to begin from, the one named, or one learnt from the captions."""
        if self.run.init:
            return TextTokenizer.load(Path(self.run.init))
        if folder := body or self.run.vocabulary:
            return TextTokenizer.from_pretrained(Path(folder))
        return TextTokenizer.train([text for texts in captions for text in texts], self.run.model.vocab_size)

    def num_samples(self) -> int:
        return len(self.cache.videos)

    def by_size(self, indices: Tensor) -> Tensor:
        sizes = [self.size(self.cache.videos[i]) for i in indices.tolist()]
        return indices[sorted(range(len(sizes)), key=sizes.__getitem__)]

    def size(self, video: CachedVideo) -> tuple[int, int]:
        """Key frames in a sample of a video, and letters of its caption: what makes a sequence long."""
        most = self.run.key_frames
        held = most if video.loops else min(most, key_frames_of(video, self.tokenizer.config.clip_s))
        return held, len(video.caption)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        def chance() -> float:
            return float(torch.rand((), generator=generator))

        drawn, key_frames = chance(), self.run.key_frames
        for longer, share in zip(self.run.longer, self.run.longer_share, strict=True):
            if 0 <= drawn < share:
                key_frames = longer
            drawn -= share
        texts, masks = [], []
        places: list[Tensor] = []
        views: dict[int, Tensor] = {}
        for i in indices:
            video = self.cache.videos[int(i)]
            start_s = 0.0 if chance() < self.run.from_start else self.later_start_s(video, key_frames, chance())
            rows, real = self.key_frames(video, key_frames, start_s)
            text = augmented_caption(video.captions, self.run.augment, self.words, generator)
            if self.views and chance() < self.run.augment.view_share:
                number = int(chance() * len(self.views))
                real[0], text = False, self.views[number].of_caption(text)
                views[len(places)] = self.view_tokens[number][rows]
            places.append(rows)
            masks.append(real)
            texts.append(text)
        tokens = self.tokens[torch.stack(places)]
        for sample, of_view in views.items():
            tokens[sample] = of_view
        mask = torch.stack(masks)
        everywhere = 1 + int(mask[:, 1:].all(0).long().cumprod(0).sum())  # key frames that all samples have
        reached = everywhere > self.run.model.nearest_goal
        goal = self.run.end_frame_prob > 0 and reached and chance() < self.run.end_frame_prob
        length = everywhere if goal else 1 + int(mask[:, 1:].any(0).sum())
        beyond = self.run.model.most_keyframes(beside=goal) - length if self.run.augment.shift_key_frames else 0
        first_keyframe = int(chance() * (beyond + 1)) if beyond > 0 else 0
        count, motion = self.run.model.block_tokens, self.run.model.motion_tokens
        if motion and self.run.model.order == "token" and chance() >= WHOLE_MOTION:
            count -= int(chance() * (motion + 1))  # any first ones: so can fewer be written
        return {
            "text_ids": self.encode(texts),
            "tokens": tokens[:, :length, :count].float(),
            "mask": mask[:, :length],  # False, no loss: past the end of a video, and the first key frame of a view
            "goal": torch.tensor(goal),
            "first_keyframe": torch.tensor(first_keyframe),
        }

    def later_start_s(self, video: CachedVideo, key_frames: int, drawn: float) -> float:
        """Start of a sample, for a number 0…1: anywhere in a loop.

        Another video that is longer than the sample loses whole clips; of one that is not, the sample holds all.
        """
        clip_s = self.tokenizer.config.clip_s
        if video.loops:
            return drawn * video.period_s
        beyond = key_frames_of(video, clip_s) - key_frames
        return clip_s * (1 + int(drawn * beyond)) if beyond > 0 else 0.0

    def key_frames(self, video: CachedVideo, count: int, start_s: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cache rows of `count` key frames, one clip apart, and which of them are real.

        Past the end of a video that does not loop the last real one comes again; of a still image the first is real.
        """
        clip_s, numbers = self.tokenizer.config.clip_s, torch.arange(count)
        endless = video.loops and video.count > 1
        held = count if endless else max(1, key_frames_of(video, clip_s) - round(start_s / clip_s))
        rows = self.cache.clip_rows(video, start_s, count, 1 / clip_s)
        return rows[numbers.clamp(max=held - 1)], numbers < held

    def encode(self, texts: list[str]) -> Tensor:
        """Text ids, cut to the model's length: long captions exceed it, and their beginning matters most.

        Without padding beyond the longest, to 16, where the model does not attend to it, and no length is compiled.
        """
        length = self.run.model.text_length
        rows = [entry.ids[:length] for entry in self.text.tokenizer.encode_batch([" ".join(t.split()) for t in texts])]
        if not (self.run.model.attend_padding or self.run.loop.compile):
            length = min(length, max(1, -(-max(map(len, rows)) // 16)) * 16)
        return torch.tensor([row + [self.text.pad_id] * (length - len(row)) for row in rows])

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(self.module.parameters()).device
        text_ids, tokens = batch["text_ids"].to(device), batch["tokens"].to(device)
        mask = None if batch["mask"].all() else batch["mask"].to(device)
        draws: torch.Generator | None = generator
        if self.run.loop.compile:  # a generator breaks a compiled graph in seven
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            draws = None
        output = self.module(
            text_ids, tokens, mask, draws, goal=bool(batch["goal"]), first_keyframe=int(batch["first_keyframe"])
        )
        return output.loss, {"first_key_frame": output.keyframe_loss[:, 0].mean().detach()}

    def weight(self, batch: dict[str, Tensor]) -> float:
        """Number of key frames with a loss; of a goal only motion has one."""
        has_motion = batch["tokens"].shape[2] > self.run.model.tokens_per_keyframe
        return float(batch["mask"][:, : -1 if batch["goal"] and not has_motion else None].sum())

    def validate(self) -> tuple[dict[str, float], Image.Image | None]:
        """Losses from the start of validation and of training clips, and how well captions and clips match.

        On `VALIDATION_CLIPS` or fewer of either split. `written_rank` is the mean of those of both splits. No sheet
        where deep tokens do not decode to key frames alone, and clips would have to be rendered for it.
        """
        metrics: dict[str, float] = {}
        held_out, trained = self.validation.columns, self.cache.columns
        for name, videos in (("validation", held_out), ("training", trained.spread(1 + len(trained) // 14))):
            metrics[f"{name}_loss"] = self.loss_of(videos.spread(VALIDATION_CLIPS))
        metrics["caption_rank"] = self.caption_rank()
        metrics["written_share"], metrics["written_rank_training"] = self.written(trained)
        metrics["written_rank_validation"] = self.written(held_out)[1]
        metrics["written_rank"] = (metrics["written_rank_training"] + metrics["written_rank_validation"]) / 2
        metrics |= self.scored()
        return metrics, self.sheet() if self.tokenizer.config.has_key_latents else None

    def loss_of(self, videos: Sequence[CachedVideo]) -> float:
        """Mean loss of the key frames that videos have, from their start."""
        losses, counts = [], []
        for part in chunks(videos, 32):
            real = torch.stack([self.key_frames(video, self.run.key_frames)[1] for video in part])
            ids, tokens = self.sample_of(part)
            losses.append(self.module(ids, tokens, real.to(ids.device)).loss.float().cpu() * real.sum())
            counts.append(real.sum())
        return (torch.stack(losses).sum() / torch.stack(counts).sum()).item()

    def sample_of(self, videos: Sequence[CachedVideo], key_frames: int | None = None) -> tuple[Tensor, Tensor]:
        """Short captions and tokens of videos from their start, without augmentation."""
        device = next(self.module.parameters()).device
        rows = torch.stack([self.key_frames(v, key_frames or self.run.key_frames)[0] for v in videos])
        return self.encode([v.caption for v in videos]).to(device), self.tokens[rows].float().to(device)

    def caption_rank(self) -> float:
        """Mean percentile rank (100 best, 50 chance) of a clip's own caption among all, by its tokens' likelihood.

        Unlike the loss it does not punish confidence: a model may be overfitted in its variances and still rank well.
        """
        ids, tokens = self.sample_of(self.validation.columns.spread(RANKED_CLIPS), key_frames=1)
        n = len(ids)
        ranks = []
        for own in range(n):
            loss = self.module(ids, repeat(tokens[own], "k n d -> b k n d", b=n)).keyframe_loss[:, 0]
            ranks.append((loss > loss[own]).float().sum() / max(1, n - 1) * 100)
        return torch.stack(ranks).mean().item()

    def written(self, videos: Sequence[CachedVideo]) -> tuple[float, float]:
        """Generate first key frames of up to 64 captions, look them up among the real ones of up to 2,048 `videos`.

        Returns the share whose nearest real key frame carries the caption (0…1), and the mean percentile rank (100
        best, 50 chance) of the true one: text control without the decoder.
        """
        captioned = list(Videos.of(videos).having(CAPTIONED).spread(WRITTEN_AMONG))
        if not captioned:
            return 0.0, 50.0
        numbers = spread_numbers(len(captioned), WRITTEN_CLIPS).tolist()
        count = self.run.model.tokens_per_keyframe
        parts = [self.sample_of(part, key_frames=1)[1][:, :, :count].flatten(1) for part in chunks(captioned, 256)]
        real = torch.cat(parts)
        ids, _ = self.sample_of([captioned[i] for i in numbers], key_frames=1)
        distances = torch.cdist(next(self.written_of(ids, 1))[:, :count].flatten(1).to(real), real)
        own = torch.tensor(numbers, device=distances.device)
        nearest = distances.argmin(1).tolist()
        hits = [captioned[i].caption == captioned[j].caption for i, j in zip(nearest, numbers, strict=True)]
        nearer = (distances < distances.gather(1, own[:, None])).float().sum(1) / max(1, len(captioned) - 1)
        return sum(hits) / len(numbers), 100 * (1 - nearer).mean().item()

    def scored(self) -> dict[str, float]:
        """Share of right answers of the run's scorer on videos generated from up to 16 validation captions.

        `scorer_KEY` of each key that their lines have too, and `scorer_all` of those together. Nothing without one.
        """
        if self.scorer is None:
            return {}
        from dicode.features.scorer import ALL, scorer_metrics, truth_of

        captioned = self.validation.columns.having(CAPTIONED).spread(SCORED_CLIPS)
        videos: list[Video] = []
        self.tokenizer.to(next(self.module.parameters()).device)  # until they are rendered
        for part in chunks(captioned, at_once(SCORED_CLIPS, self.tokenizer.config.size)):
            ids, _ = self.sample_of(part, key_frames=1)
            tokens = torch.stack([*self.written_of(ids, self.run.key_frames)], dim=1).to(self.tokenizer.device)
            indices = list(range(len(videos), len(videos) + len(part)))
            decoded = self.tokenizer.decode(tokens.float(), seed=self.run.loop.seed, sample_indices=indices)
            videos += [*torch.cat([frames.cpu() for frames in decoded], dim=1).numpy()]
        self.tokenizer.cpu()
        found = scorer_metrics(self.scorer, videos, [truth_of(video) for video in captioned])
        together = found.pop(ALL, None) or next(iter(found.values()))
        return {f"scorer_{key}": own.value for key, own in found.items()} | {"scorer_all": together.value}

    def written_of(self, text_ids: Tensor, key_frames: int) -> Iterator[Tensor]:
        """Key frames as the model will be sampled."""
        sampling = replace(self.tokenizer.config.sampling, context_key_frames=0)
        return self.module.generate(text_ids, key_frames, sampling=sampling)

    def sheet(self) -> Image.Image:
        """Real and generated key frames, as their tokens give them back, for six captions of either split."""
        videos = [*self.cache.columns.spread(6), *self.validation.columns.spread(6)]
        ids, real = self.sample_of(videos)
        written = torch.stack(list(self.written_of(ids, self.run.key_frames)), dim=1)
        both = torch.cat([real, written.to(real)], dim=1)
        latents = self.tokenizer.key_latents(rearrange(both, "b k n d -> (b k) n d").to(self.tokenizer.device))
        frames = pixels_to_frames(self.tokenizer.first_stage.decode(latents))
        clips = rearrange(frames, "(b k) h w c -> b k h w c", b=len(videos)).cpu().numpy()
        return contact_sheet(list(clips), [v.caption for v in videos], columns=clips.shape[1])

    def export(self, folder: Path) -> None:
        with merged(self.module):
            section = self.module.save_pretrained(folder)
        tokenizer = read_config(Path(self.run.tokenizer))["tokenizer"]
        write_config(folder, {"lm": section, "tokenizer": tokenizer, "deep_tokens": self.tokenizer.token_hash()})


def chunks(videos: Sequence[CachedVideo], size: int) -> list[Sequence[CachedVideo]]:
    """Consecutive parts of at most `size`."""
    return [videos[i : i + size] for i in range(0, len(videos), size)]
