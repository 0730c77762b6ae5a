"""From the best weights of separate runs to one checkpoint folder."""

from dataclasses import replace
from pathlib import Path

import torch

from dicode.checkpoint import load_weights, read_config
from dicode.config import CheckpointError
from dicode.lm.deep_lm import DeepTokenLM
from dicode.pipeline import DiCoDe
from dicode.saving import check_model_folder, model_folder
from dicode.tokenizer.encoder import DECODER, FirstStage
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, VideoTokenizer


def assemble(
    tokenizer: Path,
    lm: Path,
    output: Path,
    first_stage: Path | None = None,
    dtype: torch.dtype = torch.float16,
    card: str | None = None,
    **options: object,
) -> DiCoDe:
    """Join a tokenizer run's and a language model run's weights; returns the model as loaded back from `output`.

    `first_stage` names a later run of the same first stage, of which only the decoder may differ. float16 keeps three
    more bits than bfloat16, and weights fit it. The tokenizer's sampling is kept but for `options`, fields of
    `SamplingConfig`; `card` is its README.md. Raises `CheckpointError` where the deep tokens would change, or the
    language model was trained on others.
    """
    check_model_folder(output)  # before any work
    parts = VideoTokenizer.from_pretrained(tokenizer)
    if (trained_on := read_config(lm).get("deep_tokens")) != parts.token_hash():
        raise CheckpointError(
            f"{lm} was trained on the deep tokens {trained_on}, {tokenizer} encodes {parts.token_hash()}"
        )
    if first_stage is not None:
        later = FirstStage(parts.config.first_stage)
        load_weights(later, first_stage / FIRST_STAGE_WEIGHTS)
        for name, value in parts.first_stage.state_dict().items():
            if not name.startswith(DECODER) and not torch.equal(value, later.state_dict()[name]):
                raise CheckpointError(f"{first_stage}: {name} differs from {tokenizer}; the deep tokens would change")
        parts.first_stage.load_state_dict(later.state_dict())
    parts.config = replace(parts.config, sampling=parts.config.sampling.changed(**options))
    whole = DiCoDe(parts, DeepTokenLM.from_pretrained(lm))
    with model_folder(output) as folder:
        whole.save_pretrained(folder, dtype)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return DiCoDe.from_pretrained(output)


def last_of(best: Path) -> Path:
    """RUN/last, the averaged weights of a run's last evaluation, for RUN/best. Raises `CheckpointError` without one."""
    last = best.with_name("last")
    if best.name != "best" or not last.is_dir():
        raise CheckpointError(f"--last: expected RUN/best with RUN/last beside it, got {best}")
    return last
