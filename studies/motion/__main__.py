"""How much less rendered frames move than real ones, and the effect of `motion_scale`, on training clips.

    python studies/motion MODEL CACHE

Writes results/MODEL-motion-scale.json. Every n-th training video is rendered from its key frames, about 120 in all.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from dicode.data.cache import FrameCache
from dicode.evaluate.generation import motion_ratio
from dicode.evaluate.reconstruction import cross_fade
from dicode.features.extract import EfficientNetLite0Features
from dicode.features.metrics import frechet_distance
from dicode.provenance import write_result
from dicode.tokenizer.denoiser import scale_motion
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.cached import frames_to_pixels

SCALES = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
CLIPS = 120


@torch.no_grad()
def main(name: str, folder: str) -> None:
    """Deviation over time of latents, real and rendered; Fréchet distance and motion of the clips at every scale."""
    tokenizer = VideoTokenizer.from_pretrained(name)
    config = tokenizer.config
    tokenizer.config = dataclasses.replace(config, sampling=config.sampling.changed(motion_scale=1.0))
    cache = FrameCache.load(folder).subset(validation=False)
    videos = cache.videos[:: max(1, len(cache.videos) // CLIPS)]
    rows = [cache.clip_rows(video, 0.0, config.tail_frame + 1, config.fps) for video in videos]
    clips = cache.frames[torch.stack(rows)]
    real = clips[:, : config.clip_frames]
    rendered = torch.cat([tokenizer.render(tokenizer.encode(clips[[i]]), [i]) for i in range(len(clips))])
    latents = torch.stack([tokenizer.first_stage.encode(frames_to_pixels(clip)) for clip in real])
    deviations = {"real": over_time(latents), "rendered": over_time(rendered)}
    values = {"deviation over time": {**deviations, "ratio": deviations["real"] / deviations["rendered"]}}
    cases = {"cross-fade of real key frames": [cross_fade(c[0], c[-1], config.clip_frames) for c in clips.numpy()]}
    for scale in SCALES:
        scaled = scale_motion(rendered, scale, [0])
        cases[f"motion scale {scale}"] = [tokenizer.frames_of(clip[None])[0].numpy() for clip in scaled]
    extractor = EfficientNetLite0Features()
    true = extractor.features(list(real.numpy()))
    for case, made in cases.items():
        ours = extractor.features(made)
        sides = {
            "both": (true.vectors, ours.vectors),
            "mean": (extractor.means(true), extractor.means(ours)),
            "change": (true.vectors[:, extractor.width :], ours.vectors[:, extractor.width :]),
        }
        values[case] = {f"Fréchet distance, {part}": frechet_distance(*both) for part, both in sides.items()}
        values[case]["motion"] = motion_ratio(made, list(real.numpy()))["ratio"]
        print(case, values[case], flush=True)
    path, command = Path("results") / f"{Path(name).name}-motion-scale.json", f"python studies/motion {name} {folder}"
    write_result(path, "motion scale, training clips", values, len(real), 0, command)


def over_time(latents: Tensor) -> float:
    """Deviation of `b f c h w` from each clip's mean."""
    return float((latents - latents.mean(1, keepdim=True)).square().mean().sqrt())


if __name__ == "__main__":
    main(*sys.argv[1:])
