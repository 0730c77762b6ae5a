"""One change at a time: tokens a key frame, their width, head, noise on the inputs, joins of clips.

Losses over different tokens, or of different heads, cannot be compared. All runs are measured in the first stage's
latents, which every tokenizer decodes to.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import pdist
from torch import Tensor

from dicode.checkpoint import read_section
from dicode.data.cache import FrameCache
from dicode.evaluate.generation import draw_prompts
from dicode.evaluate.long import JOINS, join_score, long_video
from dicode.lm.config import HeadName
from dicode.pipeline import DiCoDe
from dicode.shapes import DeepTokens
from dicode.tokenizer.config import TokenizerConfig
from dicode.train.cached import frames_to_pixels
from dicode.train.lm import LanguageTraining
from dicode.train.runs import LanguageRun, LinearCodeRun
from dicode.train.stages import run_recipe

HEADS: tuple[HeadName, ...] = ("gaussian", "regression", "flow")  # beside the base's mixture
NOISE = (0.0, 0.5, 1.0)
CONDITIONS, SAMPLES = 64, 4  # validation captions, and samples of each
JOIN_PROMPTS, JOIN_S = 6, 8.0


def ablated_runs(base: LanguageRun, studies: tuple[str, ...], folder: Path) -> dict[str, LanguageRun]:
    """The base and its variants; their tokenizers are linear codes fitted in `folder`."""
    model, n, d = base.model, base.model.tokens_per_keyframe, base.model.token_width
    codes = {"base": (n, d)}
    if "tokens" in studies:
        codes |= {f"tokens {fewer}": (fewer, d) for fewer in (1, 4) if fewer < n}
    if "width" in studies:
        codes |= {f"width {less}": (n, less) for less in (d // 4, d // 2)}
    runs = {}
    for name, (tokens, width) in codes.items():
        other = replace(model, tokens_per_keyframe=tokens, token_width=width)
        runs[name] = replace(base, tokenizer=str(linear_tokenizer(base, tokens, width, folder)), model=other)
    base = runs["base"]
    if "head" in studies:
        runs |= {
            f"head {head}": replace(base, model=replace(model, head=replace(model.head, kind=head, width=96)))
            for head in HEADS
        }
    if "noise" in studies:
        runs |= {f"noise {share:g}": replace(base, model=replace(model, input_noise=share)) for share in NOISE}
    return runs


def linear_tokenizer(base: LanguageRun, tokens: int, width: int, folder: Path) -> Path:
    """The linear code of so many tokens of this width, fitted to the training frames' latents, as a tokenizer."""
    model = read_section(Path(base.tokenizer), "tokenizer", TokenizerConfig)
    model = replace(model, tokens_per_keyframe=tokens, token_width=width)
    run = LinearCodeRun(base.cache, base.tokenizer, model, precision=base.loop.precision)
    run_recipe(run, folder / f"{tokens}x{width}", {})
    return folder / f"{tokens}x{width}/best"


@torch.no_grad()
def in_latents(stage: LanguageTraining) -> dict[str, float]:
    """Figures of validation captions and their real latents.

    `lost`: share of the real key frames' variance that their own tokens lose. `energy/…`: energy score of `SAMPLES`
    key frames, without guidance: of the first, of the third, and of the third given the true two before it ("told").
    `rank`: percentile rank (100 best, 50 chance) of the true first key frame by its distance to the samples' mean.
    """
    lasting = [v for v in stage.validation.videos if v.captions and stage.key_frames(v, 3)[1].all()]
    videos = tuple(lasting[:: max(1, len(lasting) // CONDITIONS)][:CONDITIONS])
    ids, tokens = stage.sample_of(videos, key_frames=3)
    frames = stage.cache.frames[torch.stack([stage.key_frames(v, 3)[0] for v in videos]).flatten()]
    truth = stage.tokenizer.first_stage.encode(frames_to_pixels(frames)).float().unflatten(0, (-1, 3)).flatten(2)
    decoded = latents_of(stage, tokens)
    module, many = stage.module, ids.repeat_interleave(SAMPLES, 0)
    free = torch.stack(list(module.generate(many, 3)), dim=1)
    before = tokens[:, :2].repeat_interleave(SAMPLES, 0)
    forced = torch.stack(list(module.generate(many, 1, prefix=before)), dim=1)
    written = latents_of(stage, torch.cat([free[:, [0, 2]], forced], dim=1)).unflatten(0, (-1, SAMPLES))
    figures = {"lost": ((decoded - truth).square().mean() / (truth - truth.mean(0)).square().mean()).item()}
    for i, (name, number) in enumerate((("first", 0), ("third", 2), ("third, told", 2))):
        figures[f"energy/{name}"] = energy_score(written[:, :, i].numpy(), truth[:, number].numpy())
    distances = torch.cdist(written[:, :, 0].mean(1), truth[:, 0])
    nearer = (distances < distances.diag()[:, None]).float().sum(1) / max(1, len(videos) - 1)
    return {**figures, "rank": 100 * (1 - nearer).mean().item()}


def energy_score(samples: np.ndarray, truths: np.ndarray) -> float:
    """Mean of (E‖X-y‖ - ½E‖X-X'‖) / √width over conditions: samples `c s width`, truths `c width`; lower is better.

    Gneiting & Raftery 2007, equation 22. A proper score: it does not reward the mean.
    """
    errors = np.linalg.norm(samples - truths[:, None], axis=2).mean(1)
    spreads = np.array([pdist(drawn).mean() for drawn in samples])
    return float((errors - spreads / 2).mean() / np.sqrt(truths.shape[1]))


def latents_of(stage: LanguageTraining, tokens: DeepTokens) -> Tensor:
    """Key latents `b k numbers`, on the CPU."""
    return stage.tokenizer.key_latents(tokens.cpu().flatten(0, 1)).float().unflatten(0, tokens.shape[:2]).flatten(2)


def joins(folder: Path, cache: Path) -> dict[str, Any]:
    """Step at joins over step inside clips of a whole model's videos of a few captions, by the kind of joins."""
    model, videos = DiCoDe.from_pretrained(folder), FrameCache.load(cache).subset(validation=False).videos
    prompts = draw_prompts({v.captions[0] for v in videos if v.captions}, JOIN_PROMPTS, 0)
    config, scores = model.tokenizer.config, {}
    for kind in JOINS:
        made = [long_video(model, prompt, JOIN_S, 0, i, kind) for i, prompt in enumerate(prompts)]
        scores[kind] = join_score(made, config.clip_frames, config.repeated_frames, seed=0)
    return {"seconds": JOIN_S, "prompts": prompts, "scores": scores}
