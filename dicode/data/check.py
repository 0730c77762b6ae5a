"""Figures of a cache of clips, and the settings that follow from them, as flags to copy."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dicode.checkpoint import resolve
from dicode.data.cache import CachedVideo, FrameCache
from dicode.data.columns import LOOPS, VALIDATION
from dicode.data.index import CLIP_S
from dicode.lm.text import TextTokenizer
from dicode.stopwatch import tracked
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.video.images import resized
from dicode.video.timed import Video

LOOKED_AT, THROUGH_NETWORKS = 256, 96  # clips
BUNDLED = ("sprites", "world")
CHANGED = 0.1  # of the range from black to white: a pixel further from its clip's mean frame changes
GOOD_PSNR_DB, GOOD_MOVING_DB = 27.0, 21.0  # of a first stage, all over and where something moves (docs/log.md)
READ_TOKENS, WRITTEN_KEY_FRAMES = 24, 3  # of the language model of recipes/small.py
VOCABULARY, MOST_CAPTIONS = 1024, 20_000


@dataclass(frozen=True)
class Findings:
    """Of all clips of a cache, or of some of them spread over it."""

    clips: int
    validation: int
    median_s: float
    longest_s: float
    shorter: float  # share of clips that end before their second key frame
    looping: float  # share cached as loops …
    seamless: float  # … and of the others, share that end where they begin
    captioned: float
    captions: int  # different ones
    most_repeated: int  # clips of one caption
    text_tokens: int  # that 95 % of the captions need
    sided: float  # share of captions that tell left from right
    changing: float  # share of the picture that changes within a clip, in the median
    psnr_db: dict[str, float]  # of a bundled first stage on these frames …
    moving_db: dict[str, float]  # … and on what of them changes
    change_variance: float  # of the tokens of a key frame less those before it, over the variance of the tokens

    def lines(self) -> list[str]:
        """The figures, in words."""
        named = ", ".join(f"{n} {self.psnr_db[n]:.1f} dB ({self.moving_db[n]:.1f} where it moves)" for n in BUNDLED)
        return [
            f"clips: {self.clips}, {self.validation} of them for validation; median {self.median_s:.1f} s, longest "
            f"{self.longest_s:.1f} s; {self.shorter:.0%} end before the second key frame ({CLIP_S:g} s)",
            f"loops: {self.looping:.0%} cached as loops; of the others {self.seamless:.0%} end where they begin",
            f"captions: {self.captioned:.0%} of clips have one, {self.captions} different, the most frequent "
            f"{self.most_repeated} times; 95 % need at most {self.text_tokens} text tokens; {self.sided:.0%} tell left "
            "from right",
            f"picture: {self.changing:.1%} of it changes within a clip",
            f"bundled first stages on it: {named}",
            f"key frames: changes from one to the next have {self.change_variance:.2f} times the variance of tokens",
        ]

    def advice(self) -> list[str]:
        """The commands and flags that follow."""
        key_frames = 2 if self.median_s < 2 * CLIP_S else int(self.median_s / CLIP_S) + 1
        length = -(-self.text_tokens // 8) * 8
        clips_of_each = max(1, self.clips * self.captioned / max(1, self.captions))
        best = max(BUNDLED, key=lambda name: self.moving_db[name])
        good = self.psnr_db[best] >= GOOD_PSNR_DB and self.moving_db[best] >= GOOD_MOVING_DB
        changing = self.change_variance >= 0.7
        rules = [
            (self.seamless > 0.5,
             "most clips end where they begin: cache them with --loops (dicode data cache … --loops)"),
            (self.shorter > 0.1 and self.seamless <= 0.5,
             f"{self.shorter:.0%} of clips are shorter than {CLIP_S:g} s: they teach pictures, not motion"),
            (not self.looping and key_frames != WRITTEN_KEY_FRAMES,
             f"clips of {self.median_s:.1f} s have {key_frames} key frames: lm --key-frames {key_frames}"),
            (not self.validation, "no clip is kept for validation: 15 clips or more are needed"),
            (self.captioned < 0.9,
             f"{1 - self.captioned:.0%} of clips have no caption: they teach motion, not what words mean"),
            (self.text_tokens > READ_TOKENS,
             f"captions are long: lm --model.text-length {length} --model.positions {length + 16 * 33}, "
             "or their ends are not read"),
            (self.most_repeated > 3 * clips_of_each,
             "few captions stand for many clips: validation loss and rank tell more than written_share"),
            (self.sided > 0.02, "captions tell left from right: leave mirroring off"),
            (good, f"the first stage of {best} will do: train … --all --first-stage {best} saves a third of the time"),
            (not good,
             f"{self.psnr_db[best]:.1f} dB ({self.moving_db[best]:.1f} where it moves) is below {GOOD_PSNR_DB:g} "
             f"({GOOD_MOVING_DB:g}): train a first stage of your own, as recipes/small.py does"),
            (not changing, "key frames change little: lm --model.residual-anchor 0 is worth trying"),
            (changing, "key frames change much: leave lm --model.residual-anchor at None"),
        ]  # fmt: skip
        return [text for holds, text in rules if holds]


def check_cache(cache: FrameCache) -> Findings:
    """Look at up to 256 clips, send a frame of 96 through each bundled first stage; less than a minute."""
    videos = cache.columns
    tokenizers = {name: VideoTokenizer.from_pretrained(resolve(name)) for name in BUNDLED}
    periods_s = videos.column("period_s")
    firsts = [(*video.captions, "")[0] for video in videos.spread(MOST_CAPTIONS)]
    captions = [caption for caption in firsts if caption]
    some = list(videos.spread(LOOKED_AT))
    seamless, changing = [], []
    for video in tracked(some, "looking at clips", "clip"):
        frames = frames_of(cache, video)
        changing.append(float(moving(frames).mean()))
        if not video.loops:
            seamless.append(ends_where_it_begins(frames))
    chosen = some[:: max(1, len(some) // THROUGH_NETWORKS)]
    whole_db: dict[str, float] = {}
    moving_db: dict[str, float] = {}
    for name, tokenizer in tracked(list(tokenizers.items()), "first stages"):
        whole_db[name], moving_db[name] = through(tokenizer, cache, chosen)
    best = max(BUNDLED, key=lambda name: whole_db[name])
    return Findings(
        clips=len(videos),
        validation=len(videos.having(VALIDATION)),
        median_s=float(np.median(periods_s)),
        longest_s=float(periods_s.max()),
        shorter=1 - len(videos.lasting(CLIP_S)) / len(videos),
        looping=len(videos.having(LOOPS)) / len(videos),
        seamless=mean(seamless),
        captioned=len(captions) / len(firsts),
        captions=len(set(captions)),
        most_repeated=max(Counter(captions).values(), default=0),
        text_tokens=text_tokens(captions),
        sided=mean([bool({"left", "right"} & set(caption.lower().split())) for caption in captions]),
        changing=float(np.median(changing)),
        psnr_db=whole_db,
        moving_db=moving_db,
        change_variance=change_variance(tokenizers[best], cache, chosen),
    )


def mean(values: Sequence[float] | Sequence[bool]) -> float:
    """The mean, 0 of none."""
    return float(np.mean(values)) if values else 0.0


def frames_of(cache: FrameCache, video: CachedVideo) -> Video:
    """All cached frames of a video."""
    return cache.frames[video.first : video.first + video.count].numpy()


def scaled(frames: Video, size: int) -> Video:
    """Frames brought to the side of a tokenizer's."""
    return np.stack([resized(frame, size, size) for frame in frames])


def moving(frames: Video) -> np.ndarray:
    """Which pixels `h w` of a clip leave its mean frame by more than a tenth of the range at some time."""
    away = np.abs(frames - frames.mean(0, dtype=np.float32)).max((0, 3))
    return away > CHANGED * 255


def ends_where_it_begins(frames: Video) -> bool:
    """Whether the last frame is a step away from the first, of the size of those within, and the clip went further."""
    if len(frames) < 4:
        return False
    signed = frames.astype(np.float32)
    steps = np.abs(np.diff(signed, axis=0)).mean((1, 2, 3))
    away = np.abs(signed - signed[0]).mean((1, 2, 3))
    return bool(away.max() > 0.5 and away[-1] < 0.75 * away.max() and away[-1] <= 2 * steps.max())


def text_tokens(captions: Sequence[str]) -> int:
    """Text tokens that 95 % of the captions need, in a vocabulary learnt from them."""
    if not captions:
        return 0
    text = TextTokenizer.train(list(captions), VOCABULARY)
    lengths = [len(entry.ids) for entry in text.tokenizer.encode_batch(list(captions))]
    return int(np.percentile(lengths, 95, method="higher"))


@torch.no_grad()
def through(tokenizer: VideoTokenizer, cache: FrameCache, videos: Sequence[CachedVideo]) -> tuple[float, float]:
    """Mean PSNR in dB of the middle frames through a first stage: all over, and of the pixels that change."""
    whole, inside = [], []
    for video in videos:
        frames = scaled(frames_of(cache, video), tokenizer.config.size)
        pixels = torch.from_numpy(frames[len(frames) // 2]).permute(2, 0, 1)[None] / 127.5 - 1
        decoded = tokenizer.first_stage.decode(tokenizer.first_stage.encode(pixels)).clamp(-1, 1)
        error = ((decoded - pixels) / 2).square().mean(1)[0]
        whole.append(psnr_db(error))
        if (mask := torch.from_numpy(moving(frames))).any():
            inside.append(psnr_db(error[mask]))
    return mean(whole), mean(inside or whole)


def psnr_db(squared_errors: Tensor) -> float:
    """Peak signal-to-noise ratio of squared errors of values in 0…1."""
    return float(-10 * squared_errors.mean().clamp_min(1e-10).log10())


def change_variance(tokenizer: VideoTokenizer, cache: FrameCache, videos: Sequence[CachedVideo]) -> float:
    """Variance of key frame tokens less those of the key frame before, over that of tokens; 0 where no clip has two."""
    size, clip_s = tokenizer.config.size, tokenizer.config.clip_s
    pairs = [cache.frames[cache.clip_rows(v, 0.0, 2, 1 / clip_s)].numpy() for v in videos if v.lasts(clip_s)]
    if len(pairs) < 2:
        return 0.0
    tokens = torch.cat([tokenizer.encode_frames(scaled(pair, size)) for pair in pairs])
    change = tokens[:, 1] - tokens[:, 0]
    return float(change.var(0).mean() / tokens[:, 0].var(0).mean().clamp_min(1e-8))
