"""Heads and orders of the language model, compared: same transformer, data, FLOPs and seeds, one thing changed.

    python studies/heads cache/sprites    # trains and measures 10 arrangements × 3 seeds, writes results/heads.json
    dicode train studies/heads/__main__.py:run --model.head.kind flow --model.order keyframe --loop.seed 1    # one

440 clips, a transformer of 0.8 M parameters, CPU. The same command continues; measured runs are not trained again.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from scipy.spatial.distance import pdist

from dicode.data.cache import FrameCache
from dicode.data.columns import CachedVideo
from dicode.evaluate.generation import draw_prompts, plain_caption, text_control
from dicode.evaluate.samples import RealClips, first_clip, generated_clips
from dicode.features.extract import EfficientNetLite0Features
from dicode.features.metrics import bootstrap_interval, frechet_distance
from dicode.lm.config import BodyConfig, HeadName, Order
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.presets import SIZES
from dicode.pipeline import DiCoDe
from dicode.provenance import write_result
from dicode.sizing.plan import Planner
from dicode.tokenizer.config import SamplingConfig
from dicode.train.lm import LanguageTraining
from dicode.train.loop import train
from dicode.train.runs import AugmentConfig, LanguageRun, LoopConfig, OptimConfig

TOKENIZER = "dicode/checkpoints/sprites"
CACHE = Path("cache/heads")  # the clips of this comparison, a part of the cache named
HEADS, ORDERS, SEEDS = get_args(HeadName), get_args(Order), (0, 1, 2)
OTHER_CAPTIONS = 160  # besides those with four variants or more
SWAPS = (("mixture", "token"), ("flow", "keyframe"))  # the published and the best, trained with words swapped as well
STEPS = 1600  # of the mixture over tokens; the others take as many as cost the same
PROMPTS, SAMPLES, CONDITIONS = 80, 6, 64
SAMPLING = {"guidance": 1.5, "variance_scale": 0.01, "temperature": 1.0, "flow_steps": 8}  # the flow: scale 1


def run() -> LanguageRun:
    """A small Llama on short captions as they stand, in 3 key frames (4 s)."""
    model = replace(
        SIZES["sprites"], body=BodyConfig("llama", width=128, depth=3, heads=2, feed_forward=384),
        head=replace(SIZES["sprites"].head, width=96, depth=2), vocab_size=1024, text_length=16, input_noise=1.0,
        positions=16 + 17 * 34,
    )  # fmt: skip
    optim = OptimConfig(
        optimizer="muon", steps=STEPS, batch_size=16, lr=3e-3, warmup_steps=50, decay_fraction=0.6, ema_decay=0.99
    )
    return LanguageRun(
        cache=str(CACHE), tokenizer=TOKENIZER, model=model, from_start=1.0, longer=(), longer_share=(),
        augment=AugmentConfig(long_captions=0.0, null_captions=0.1, word_dropout=0.0),
        loop=LoopConfig(evaluate_every=100_000, checkpoint_every=400, optim=optim),
    )  # fmt: skip


def arrangement(head: HeadName, order: Order, seed: int, swaps: bool = False) -> LanguageRun:
    """The run with another head, order and seed; with `swaps` a tenth of the captions have words of others."""
    base = run()
    model, loop = (
        replace(base.model, head=replace(base.model.head, kind=head), order=order),
        replace(base.loop, seed=seed),
    )
    augment = replace(base.augment, word_swaps=0.1 if swaps else 0.0, swapped_words=0.7)
    return replace(base, model=model, loop=loop, augment=augment)


def main(cache: str) -> None:
    """All arrangements and seeds, into results/heads.json."""
    whole, sprites = FrameCache.load(cache), DiCoDe.from_pretrained(TOKENIZER)
    if not (CACHE / "index.json").exists():
        chosen_clips(whole).save(CACHE)
    reference = RealClips(whole, sprites.tokenizer.config, Path(cache))
    extractor = EfficientNetLite0Features()
    features = extractor.means(reference.features(extractor, whole.videos))
    budget = STEPS * Planner(arrangement("mixture", "token", 0)).step_flops()
    values: dict[str, Any] = {}
    kinds = [(head, order, False) for order in ORDERS for head in HEADS] + [(*pair, True) for pair in SWAPS]
    for seed in SEEDS:
        for head, order, swaps in kinds:
            name = f"{head}-{order}{'-swaps' * swaps}-{seed}"
            kept = Path("runs/heads") / name / "figures.json"
            if not kept.exists():
                stage = LanguageTraining(arrangement(head, order, seed, swaps))
                figures = trained_and_measured(kept.parent, stage, budget, sprites, whole, features)
                kept.write_text(json.dumps(figures, indent=2))
            values[name] = json.loads(kept.read_text())
            print(name, {k: v for k, v in values[name].items() if not isinstance(v, dict)}, flush=True)
    both = {"sampling": {head: sampling_of(head) for head in HEADS}, "runs": values}
    write_result("results/heads.json", "heads and orders", both, PROMPTS, 0, f"python studies/heads {cache}")


def chosen_clips(whole: FrameCache) -> FrameCache:
    """All clips of the captions with four variants and of some others; all validation clips."""
    training = [v for v in whole.videos if not v.validation and v.captions]
    variants = captions_with_variants([v.captions[0] for v in training], 4)
    kept = {*variants, *draw_prompts({v.captions[0] for v in training} - set(variants), OTHER_CAPTIONS, seed=0)}
    videos: list[CachedVideo] = []
    rows: list[int] = []
    for video in whole.videos:
        if video.validation or (video.captions and video.captions[0] in kept):
            videos.append(replace(video, first=len(rows)))
            rows += range(video.first, video.first + video.count)
    return FrameCache(tuple(videos), whole.frames[rows], whole.times_s[rows])


def trained_and_measured(
    folder: Path, stage: LanguageTraining, budget: float, sprites: DiCoDe, whole: FrameCache, features: Any
) -> dict[str, Any]:
    """Figures of one run of `budget` FLOPs."""
    flops = Planner(stage.run).step_flops()
    steps = round(budget / flops)
    loop = replace(stage.run.loop, optim=replace(stage.run.loop.optim, steps=steps))
    metrics = train(stage, loop, folder, {"name": folder.name})
    lm = DeepTokenLM.from_pretrained(folder / "best")
    sampling = SamplingConfig(decoder_guidance=2.5, decoder_temperature=0.95, **sampling_of(lm.config.head.kind))
    sprites.tokenizer.config = replace(sprites.tokenizer.config, sampling=sampling)
    return {
        "parameters": sum(p.numel() for p in lm.parameters()),
        "steps": steps,
        "training_tflop": steps * flops / 1e12,
        "validation_loss": metrics["validation_loss"],
        "training_loss": metrics["training_loss"],
        **measure(DiCoDe(sprites.tokenizer, lm), stage, whole, features, loop.seed),
    }


def measure(model: DiCoDe, stage: LanguageTraining, whole: FrameCache, features: Any, seed: int) -> dict[str, Any]:
    """Everything in the table, of one trained run; `features` are mean ones of all videos' first clips."""
    extractor, config = EfficientNetLite0Features(), model.tokenizer.config
    training = [v for v in stage.cache.videos if v.captions]
    prompts = draw_prompts({v.captions[0] for v in training}, PROMPTS, seed=0)
    generated = extractor.features(generated_clips(model, prompts, seed))
    real = [first_clip(config, stage.cache, next(v for v in training if v.captions[0] == p))[:-1] for p in prompts]
    validation = np.array([v.validation for v in whole.videos])
    captions = [v.captions[0] if v.captions else "" for v in whole.videos if not v.validation]
    control = text_control(extractor.means(generated), prompts, features[~validation], captions, seed=0)
    distance = frechet_distance(extractor.features(real).vectors, generated.vectors)
    variants = {}
    for caption, rows in captions_with_variants([v.captions[0] for v in training], 4).items():
        frames = np.stack([first_clip(config, stage.cache, training[row])[0] for row in rows])
        variants[caption] = extractor.frame_features(frames).double().numpy()
    variants = {caption: own for caption, own in variants.items() if own.std(0).any()}  # some share their first frame
    sampled = [key_frame_features(model, extractor, caption, seed) for caption in variants]
    return {
        "text_control": control["share"],
        "text_control_interval": control["interval"],
        "frechet": {"generated": {f"FVD-{extractor.name}": distance}},
        "diversity": diversity(sampled, list(variants.values())),
        "energy_validation": scored(model, stage, tuple(stage.validation.videos), seed),
        "energy_training": scored(model, stage, tuple(training), seed),
    }


def sampling_of(head: HeadName) -> dict[str, Any]:
    """Sampling of a head: the published scale, but the flow as it was learnt."""
    return {**SAMPLING, "variance_scale": 1.0} if head == "flow" else SAMPLING


def scored(model: DiCoDe, stage: LanguageTraining, videos: Sequence[CachedVideo], seed: int) -> dict[str, Any]:
    """Energy score of the first two key frames, without guidance, whose samples are of no distribution."""
    videos = videos[:: max(1, len(videos) // CONDITIONS)][:CONDITIONS]
    ids, truth = stage.sample_of(videos, key_frames=2)
    sampling = SamplingConfig(**{**sampling_of(model.lm.config.head.kind), "guidance": 1.0})
    indices = list(range(SAMPLES * len(ids)))
    tokens = model.lm.generate(
        ids.repeat_interleave(SAMPLES, 0), 2, seed=seed, sample_indices=indices, sampling=sampling
    )
    samples = torch.stack(list(tokens), dim=1).unflatten(0, (-1, SAMPLES)).flatten(2)
    return energy_score(samples.numpy(), truth.flatten(1).numpy())


def energy_score(samples: np.ndarray, truths: np.ndarray) -> dict[str, Any]:
    """(E‖X-y‖ - ½E‖X-X'‖) / √width, mean over conditions: samples `c s width`, truths `c width`; lower is better.

    Gneiting & Raftery 2007, equation 22. A proper score: it does not reward the mean.
    """
    root = np.sqrt(truths.shape[1])
    errors = np.linalg.norm(samples.astype(np.float64) - truths[:, None], axis=2).mean(1) / root
    spreads = np.array([pdist(drawn).mean() for drawn in samples]) / root
    scores = errors - spreads / 2
    spread, interval = float(spreads.mean()), bootstrap_interval(np.mean, scores)
    return {
        "mean": float(scores.mean()), "interval": interval, "error": float(errors.mean()), "spread": spread,
        "n": len(scores),
    }  # fmt: skip


def diversity(features: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean distance of two samples of a caption over that of two real clips of it: 1 as diverse as they are."""
    rows = np.array([[pdist(a).mean(), pdist(b).mean()] for a, b in zip(features, real, strict=True)])
    interval = bootstrap_interval(lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum(), rows)
    generated, of_real = rows.mean(axis=0).tolist()
    ratio = float(rows[:, 0].sum() / rows[:, 1].sum())
    return {"ratio": ratio, "interval": interval, "generated": generated, "real": of_real, "n": len(rows)}


def captions_with_variants(captions: Sequence[str], least: int = 4) -> dict[str, list[int]]:
    """Captions that at least `least` clips carry, as the first of these spells it, with the clips' positions."""
    carriers: dict[str, list[int]] = {}
    for clip, caption in enumerate(captions):
        if plain := plain_caption(caption):
            carriers.setdefault(plain, []).append(clip)
    return {captions[clips[0]]: clips for _, clips in sorted(carriers.items()) if len(clips) >= least}


@torch.no_grad()
def key_frame_features(model: DiCoDe, extractor: EfficientNetLite0Features, caption: str, seed: int) -> np.ndarray:
    """Features of the first key frame of several samples, as the linear code decodes it."""
    ids = model.text.encode([caption] * SAMPLES, model.lm.config.text_length)
    tokens = next(model.lm.generate(ids, 1, seed=seed, sampling=model.sampling))
    frames = model.tokenizer.frames_of(model.tokenizer.key_latents(tokens)[None])[0]
    return extractor.frame_features(frames).double().numpy()


if __name__ == "__main__":
    main(*sys.argv[1:])
