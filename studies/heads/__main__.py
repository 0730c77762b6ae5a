"""Heads and orders of the language model, compared: one transformer, data, FLOPs and seeds, one thing changed.

    python studies/heads cache/sprites    # trains and measures 10 arrangements × 3 seeds, writes results/heads.json

Each arrangement is a recipe as well:

    dicode train studies/heads/__main__.py:run --model.head flow --model.order keyframe --loop.seed 1

Small on purpose, to be repeated on a CPU: 440 clips of the 200-odd captions below, learnt by a transformer of 0.8 M
parameters. A run that was interrupted goes on where it was; a run that is measured is not trained again.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from dicode.data.cache import CachedVideo, FrameCache
from dicode.evaluate.diversity import captions_with_variants, diversity
from dicode.evaluate.generation import draw_prompts, text_control
from dicode.evaluate.reference import RealClips, first_clip
from dicode.evaluate.samples import generated_clips
from dicode.features.extract import EfficientNetLite0Features, features_of_clips
from dicode.features.metrics import bootstrap_interval, frechet_of_sets, mean_pair_distance
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.presets import SIZES, HeadName, Order
from dicode.pipeline import DiCoDe
from dicode.provenance import write_result
from dicode.sizing.count import step_flops
from dicode.tokenizer.config import SamplingConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.lm import LanguageTraining
from dicode.train.loop import train
from dicode.train.runs import LanguageRun, LoopConfig, OptimConfig

TOKENIZER = "dicode/checkpoints/sprites"
CACHE = Path("cache/heads")  # the clips of this comparison, taken from the cache named
HEADS, ORDERS, SEEDS = get_args(HeadName), get_args(Order), (0, 1, 2)
OTHER_CAPTIONS = 160  # besides those with four variants or more
SWAPS = (("mixture", "token"), ("flow", "keyframe"))  # the published and the best, trained with words swapped as well
STEPS = 1600  # of the mixture over tokens; the others take as many as cost the same
WORD_SWAPS = 0.1  # share of samples
PROMPTS, SAMPLES, CONDITIONS = 80, 6, 64
SAMPLING = {"guidance": 1.5, "variance_scale": 0.01, "temperature": 1.0, "flow_steps": 8}  # the published scale …
AS_LEARNT = {"flow"}  # … but of these heads, which are drawn from as they are


def run() -> LanguageRun:
    """A small Llama on short captions as they stand, in 3 key frames (4 s)."""
    return LanguageRun(
        cache=str(CACHE),
        tokenizer=TOKENIZER,
        model=replace(
            SIZES["sprites"], width=128, depth=3, heads=2, feed_forward=384, vocab_size=1024, text_length=16,
            input_noise=1.0, flow_width=96, flow_depth=2, positions=16 + 17 * 34,
        ),
        from_start=1.0,
        longer=(),
        longer_share=(),
        long_captions=0.0,
        null_captions=0.1,
        word_dropout=0.0,
        loop=LoopConfig(
            evaluate_every=100_000,
            checkpoint_every=400,
            optim=OptimConfig(
                optimizer="muon", steps=STEPS, batch_size=16, lr=3e-3, warmup_steps=50, decay_fraction=0.6,
                ema_decay=0.99,
            ),
        ),
    )  # fmt: skip


def arrangement(head: HeadName, order: Order, seed: int, swaps: bool = False) -> LanguageRun:
    """The run with another head, order and seed; with `swaps` some captions hold words of others."""
    base = run()
    model = replace(base.model, head=head, order=order)
    share = WORD_SWAPS if swaps else 0.0
    return replace(base, model=model, loop=replace(base.loop, seed=seed), word_swaps=share, swapped_words=0.7)


def chosen_clips(whole: FrameCache) -> FrameCache:
    """All clips of the captions with four variants and of some others; all validation clips."""
    training = [v for v in whole.videos if not v.validation and v.captions]
    variants = captions_with_variants([v.captions[0] for v in training], 4)
    others = draw_prompts({v.captions[0] for v in training} - set(variants), OTHER_CAPTIONS, seed=0)
    kept = {*variants, *others}
    videos: list[CachedVideo] = []
    rows: list[int] = []
    for video in whole.videos:
        if video.validation or (video.captions and video.captions[0] in kept):
            videos.append(replace(video, first=len(rows)))
            rows += range(video.first, video.first + video.count)
    return FrameCache(tuple(videos), whole.frames[rows], whole.times_s[rows])


def measure(model: DiCoDe, stage: LanguageTraining, bank: FrameCache, features: Any, seed: int) -> dict[str, Any]:
    """Everything in the table, of one trained run."""
    extractor = EfficientNetLite0Features()
    training = [v for v in stage.cache.videos if v.captions]
    prompts = draw_prompts({v.captions[0] for v in training}, PROMPTS, seed=0)
    clips = generated_clips(model, prompts, seed)
    made = features_of_clips(extractor, clips)
    told = [next(v for v in training if v.captions[0] == p) for p in prompts]
    real = [first_clip(model.tokenizer.config, stage.cache, video)[:-1] for video in told]
    held = np.array([v.validation for v in bank.videos])
    captions = [v.captions[0] if v.captions else "" for v in bank.videos if not v.validation]
    control = text_control(made.mean, prompts, features.mean[~held], captions, seed=0)
    distance = frechet_of_sets(features_of_clips(extractor, real).joined(), made.joined())
    variants = captions_with_variants([v.captions[0] for v in training], 4)
    own = {c: real_key_frames(extractor, model, stage.cache, [training[i] for i in r]) for c, r in variants.items()}
    own = {c: features for c, features in own.items() if features.std(0).any()}  # some begin with the same picture
    drawn = [key_frame_features(model, extractor, c, seed) for c in own]
    return {
        "text_control": control.share,
        "text_control_interval": control.interval,
        "frechet": {"generated": {f"FVD-{extractor.name}": distance}},
        "diversity": asdict(diversity(drawn, list(own.values()), seed=0)),
        "energy_validation": scored(model, stage, tuple(stage.validation.videos), seed),
        "energy_training": scored(model, stage, tuple(training), seed),
    }


def sampling_of(head: HeadName) -> dict[str, Any]:
    """How a head is drawn from."""
    return {**SAMPLING, "variance_scale": 1.0} if head in AS_LEARNT else SAMPLING


def scored(model: DiCoDe, stage: LanguageTraining, videos: Sequence[CachedVideo], seed: int) -> dict[str, Any]:
    """Energy score of the first two key frames, without guidance, which makes no samples of a distribution."""
    videos = videos[:: max(1, len(videos) // CONDITIONS)][:CONDITIONS]
    ids, truth = stage.sample_of(videos, key_frames=2)
    sampling = {**sampling_of(model.lm.config.head), "guidance": 1.0}
    indices = list(range(SAMPLES * len(ids)))
    tokens = model.lm.generate(
        ids.repeat_interleave(SAMPLES, 0),
        2,
        seed=seed,
        sample_indices=indices,
        **sampling,
    )
    samples = torch.stack(list(tokens), dim=1).unflatten(0, (-1, SAMPLES)).flatten(2)
    return energy_score(samples.numpy(), truth.flatten(1).numpy())


def energy_score(samples: np.ndarray, truths: np.ndarray) -> dict[str, Any]:
    """(E‖X-y‖ - ½E‖X-X'‖) / √width, mean over conditions: samples `c s width`, truths `c width`; lower is better.

    Gneiting & Raftery 2007, equation 22. A proper score: it does not reward writing the mean.
    """
    root = np.sqrt(truths.shape[1])
    errors = np.linalg.norm(samples.astype(np.float64) - truths[:, None], axis=2).mean(1) / root
    spreads = np.array([mean_pair_distance(drawn) for drawn in samples]) / root
    scores = errors - spreads / 2
    return {
        "mean": float(scores.mean()),
        "interval": bootstrap_interval(np.mean, scores),
        "error": float(errors.mean()),
        "spread": float(spreads.mean()),
        "n": len(scores),
    }


@torch.no_grad()
def key_frame_features(model: DiCoDe, extractor: EfficientNetLite0Features, caption: str, seed: int) -> np.ndarray:
    """Features of the first key frame of several samples, as the key-frame head shows it: the decoder has no part."""
    ids = model.text.encode([caption] * SAMPLES, model.lm.config.text_length)
    sampling = {name: getattr(model.sampling, name) for name in SAMPLING}
    tokens = next(model.lm.generate(ids, 1, seed=seed, **sampling))
    frames = model.tokenizer.frames_of(model.tokenizer.key_latents(tokens)[None])[0]
    return extractor.frame_features(frames).double().numpy()


def real_key_frames(
    extractor: EfficientNetLite0Features, model: DiCoDe, cache: FrameCache, videos: list[CachedVideo]
) -> np.ndarray:
    """Features of the first frames of real clips."""
    frames = np.stack([first_clip(model.tokenizer.config, cache, v)[0] for v in videos])
    return extractor.frame_features(frames).double().numpy()


def trained_and_measured(
    name: str, asked: LanguageRun, budget: int, tokenizer: VideoTokenizer, bank: FrameCache, features: Any
) -> dict[str, Any]:
    """One run of `budget` FLOPs, from wherever it stands to its figures, which are kept beside it."""
    folder, head, seed = Path("runs/heads") / name, asked.model.head, asked.loop.seed
    if (folder / "figures.json").exists():
        return json.loads((folder / "figures.json").read_text())
    stage = LanguageTraining(asked)
    flops = step_flops(stage)
    steps = round(budget / flops)
    loop = replace(asked.loop, optim=replace(asked.loop.optim, steps=steps))
    metrics = train(stage, loop, folder, {"name": name})
    lm = DeepTokenLM.from_pretrained(folder / "best")
    sampling = SamplingConfig(decoder_guidance=2.5, decoder_temperature=0.95, **sampling_of(head))
    tokenizer.config = replace(tokenizer.config, sampling=sampling)
    figures = {
        "parameters": sum(p.numel() for p in lm.parameters()),
        "steps": steps,
        "training_tflop": steps * flops / 1e12,
        "validation_loss": metrics["validation_loss"],
        "training_loss": metrics["training_loss"],
        **measure(DiCoDe(tokenizer, lm), stage, bank, features, seed),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=2))
    return figures


def main(cache: str, *seeds: str) -> None:
    """Run all arrangements of these seeds (default: all); with all of them the result file is written too."""
    bank = FrameCache.load(cache)
    if not (CACHE / "index.json").exists():
        chosen_clips(bank).save(CACHE)
    box = DiCoDe.from_pretrained(TOKENIZER)
    real = RealClips(bank, box.tokenizer.config, Path(cache))
    features = real.features(EfficientNetLite0Features(), range(len(bank.videos)))
    budget = STEPS * step_flops(LanguageTraining(arrangement("mixture", "token", 0)))
    values: dict[str, Any] = {}
    asked = [(head, order, False) for order in ORDERS for head in HEADS] + [(*pair, True) for pair in SWAPS]
    for seed in [int(s) for s in seeds] or SEEDS:
        for head, order, swaps in asked:
            name = f"{head}-{order}{'-swaps' * swaps}-{seed}"
            wanted = arrangement(head, order, seed, swaps)
            values[name] = trained_and_measured(name, wanted, budget, box.tokenizer, bank, features)
            print(name, {k: v for k, v in values[name].items() if not isinstance(v, dict)}, flush=True)
    if not seeds:
        sampled = {head: sampling_of(head) for head in HEADS}
        command = f"python studies/heads {cache}"
        both = {"sampling": sampled, "runs": values}
        write_result("results/heads.json", "heads and orders", both, PROMPTS, 0, command)


if __name__ == "__main__":
    main(*sys.argv[1:])
