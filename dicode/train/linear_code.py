"""The linear code of a small model fitted in a run folder, as other stages are trained.

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

from dicode.checkpoint import content_hash
from dicode.checkpoint.saving import write_config
from dicode.config import config_to_dict
from dicode.data.cache import Rows
from dicode.device import pick_device
from dicode.files import put_text, read_json, whole_folder
from dicode.stopwatch import Progress
from dicode.tokenizer.linear import fit_projections
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, VideoTokenizer
from dicode.train.begin import load_first_stage
from dicode.train.cached import first_stage_latents, psnr_db, splits
from dicode.train.loop import data_of, environment_of, session
from dicode.train.run_log import RunLog, note_start
from dicode.train.runs import VALIDATION_CLIPS, LinearCodeRun, LoopConfig

MOST_FITTED = 20_000  # frames, mirrored ones included
FIT = "fit.json"


def fit_of(folder: Path, run: LinearCodeRun) -> dict[str, Any] | None:
    """The note of a fit that is done in this folder, of the same run on the same data and first stage."""
    note = read_json(folder / FIT) if (folder / FIT).is_file() and (folder / "best").is_dir() else {}
    return note if asked_of(run).items() <= note.items() else None


def asked_of(run: LinearCodeRun) -> dict[str, Any]:
    """What a fit depends on."""
    weights = Path(run.first_stage) / FIRST_STAGE_WEIGHTS
    held = content_hash(weights) if weights.is_file() else ""  # whoever reads them raises
    return {"run": config_to_dict(run), "data": data_of(run), "first_stage": held}


def fit_run(run: LinearCodeRun, folder: Path, recipe: dict[str, Any], source: Path | None = None) -> dict[str, float]:
    """Fit a run's linear code in `folder`, unless that is done; returns its metrics on validation frames.

    Raises `ValueError` as `fit_projections`, and for a model with a resampler, which is trained with the denoiser.
    """
    if run.model.resampler is not None or run.model.code is not None:
        raise ValueError("model.resampler and model.code: expected neither; there is no linear code to fit then")
    began_s = time.monotonic()
    loop = LoopConfig(device=run.device, precision=run.precision, tracker="none")
    with session(folder, run, loop) as (processes, stop):
        if done := processes.from_first(fit_of(folder, run)):
            return done["metrics"]
        with stop.cutting(), Progress(f"fitting {folder.name}"):
            tokenizer, latents = unfitted(run)
        if not processes.first:
            processes.wait()
            return read_json(folder / FIT)["metrics"]
        (folder / FIT).unlink(missing_ok=True)
        note_start(folder, 0, {"recipe": recipe}, source, environment_of(run, loop, processes))
        with stop.cutting(), Progress(f"fitting {folder.name}"):
            metrics, sheet = fit(run, tokenizer, latents)
            with whole_folder(folder / "best") as new:
                write_config(new, {"tokenizer": tokenizer.save_pretrained(new)})
        with RunLog(folder, 0, loop.tracker, recipe) as log:
            log.write("validation", 0, metrics)
            log.sheet(0, sheet)
        note = {**asked_of(run), "metrics": metrics, "fitted_s": time.monotonic() - began_s}
        put_text(folder / FIT, json.dumps(note, indent=1) + "\n")
        processes.wait()
        return metrics


def unfitted(run: LinearCodeRun) -> tuple[VideoTokenizer, Rows]:
    """A tokenizer with its first stage, and the latents of all frames, which all processes compute together."""
    torch.manual_seed(0)  # of the denoiser
    tokenizer = VideoTokenizer(run.model).eval()
    load_first_stage(tokenizer, Path(run.first_stage))
    tokenizer.to(pick_device(run.device))
    return tokenizer, first_stage_latents(tokenizer, splits(run.cache)[0], run.precision, run.mirror)


@torch.no_grad()
def fit(run: LinearCodeRun, tokenizer: VideoTokenizer, latents: Rows) -> tuple[dict[str, float], Image.Image]:
    """Fit the code; error and PSNR of validation frames through tokens, and a sheet of both."""
    _, training, validation = splits(run.cache)
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
    return metrics, Image.fromarray(rearrange(strips, "two f h w c -> (two h) (f w) c").numpy())
