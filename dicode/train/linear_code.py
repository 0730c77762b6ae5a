"""The linear code of a small model fitted in a run folder, as other stages are trained: its deep tokens are ready then.

RUN/fit.json     the run, the data, the metrics and the seconds of a fit that is done
RUN/best         the tokenizer: first stage, linear code, and a denoiser of random weights
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional

from dicode.checkpoint.saving import write_config
from dicode.config import config_to_dict
from dicode.device import pick_device
from dicode.files import put_text, read_json, whole_folder
from dicode.stopwatch import Progress
from dicode.tokenizer.linear import fit_projections
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, VideoTokenizer
from dicode.train.cached import first_stage_latents, psnr_db, splits
from dicode.train.loop import data_of, environment_of, session
from dicode.train.run_log import RunLog, note_start
from dicode.train.runs import VALIDATION_CLIPS, LinearCodeRun, LoopConfig
from dicode.train.tokenizer import load_first_stage

MOST_FITTED = 20_000  # frames, mirrored ones included
FIT = "fit.json"


def fit_of(folder: Path, run: LinearCodeRun) -> dict[str, Any] | None:
    """The note of a fit that is done in this folder, of the same run on the same data."""
    note = read_json(folder / FIT) if (folder / FIT).is_file() and (folder / "best").is_dir() else {}
    return note if (note.get("run"), note.get("data")) == (config_to_dict(run), data_of(run)) else None


def fit_run(run: LinearCodeRun, folder: Path, recipe: dict[str, Any], source: Path | None = None) -> dict[str, float]:
    """Fit a run's linear code in `folder`, unless that is done; returns its metrics on validation frames.

    Raises `ValueError` as `fit_projections`, and for a model with a resampler, which is trained with the denoiser.
    """
    if run.model.resampler is not None:
        raise ValueError("model.resampler: a tokenizer with one has no linear code to fit; train it as a TokenizerRun")
    began_s = time.monotonic()
    loop = LoopConfig(device=run.device, precision=run.precision, tracker="none")
    with session(folder, run, loop) as (processes, stop), processes.one_first():  # others then find it done
        if done := fit_of(folder, run):
            return done["metrics"]
        note_start(folder, 0, {"recipe": recipe}, source, environment_of(run, loop, processes))
        with stop.cutting(), Progress(f"fitting {folder.name}"):
            tokenizer, metrics, sheet = fitted(run)
            with whole_folder(folder / "best") as new:
                write_config(new, {"tokenizer": tokenizer.save_pretrained(new)})
        with RunLog(folder, 0, loop.tracker, recipe) as log:
            log.write("validation", 0, metrics)
            log.sheet(0, sheet)
        note = {"run": config_to_dict(run), "data": data_of(run), "metrics": metrics}
        put_text(folder / FIT, json.dumps({**note, "fitted_s": time.monotonic() - began_s}, indent=1) + "\n")
        return metrics


@torch.no_grad()
def fitted(run: LinearCodeRun) -> tuple[VideoTokenizer, dict[str, float], Image.Image]:
    """A tokenizer with its code fitted; error and PSNR of validation frames through tokens, and a sheet of both."""
    torch.manual_seed(0)  # of the denoiser
    tokenizer = VideoTokenizer(run.model).eval()
    load_first_stage(tokenizer, Path(run.first_stage))
    tokenizer.to(pick_device(run.device))
    cache, training, validation = splits(run.cache)
    weights = Path(run.first_stage) / FIRST_STAGE_WEIGHTS
    latents = first_stage_latents(tokenizer, cache, weights, run.precision, run.mirror)
    rows = training.frame_rows().spread(MOST_FITTED // (1 + run.mirror))
    fit_projections(tokenizer.linear_code, latents[rows].flatten(0, 1).float())
    real = latents[validation.frame_rows().spread(VALIDATION_CLIPS), 0].float().to(tokenizer.device)
    kept = tokenizer.key_latents(tokenizer.tokens_of(real))
    psnr = [
        psnr_db(*(tokenizer.first_stage.decode(latents) for latents in pair))
        for pair in zip(kept.split(64), real.split(64), strict=True)
    ]
    metrics = {
        "key_frame_error": functional.mse_loss(kept, real).item(),
        "key_frame_psnr_db": torch.cat(psnr).mean().item(),
    }
    some = slice(None, None, max(1, len(real) // 16))
    strips = tokenizer.frames_of(torch.stack([real[some], kept[some]])).cpu()
    return tokenizer, metrics, Image.fromarray(rearrange(strips, "two f h w c -> (two h) (f w) c").numpy())
