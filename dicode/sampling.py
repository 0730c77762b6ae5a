"""How a model is sampled: one configuration from flags and `config.json` to language model and denoiser."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

Joins = Literal["chained", "parallel", "independent"]

# Least and highest value of each number. 1,000 steps are the published schedule's; more take time and memory in vain.
LIMITS = {
    "guidance": (0, math.inf),
    "variance_scale": (0, math.inf),
    "first_variance_scale": (0, math.inf),
    "temperature": (0, math.inf),
    "flow_steps": (1, 1000),
    "window": (0, math.inf),
    "steps": (1, 1000),
    "decoder_guidance": (0, math.inf),
    "decoder_temperature": (0, math.inf),
    "guidance_rescale": (0, 1),
    "eta": (0, 1),
    "motion_scale": (0, math.inf),
}


@dataclass(frozen=True)
class SamplingConfig:
    """Of the language model, then of the decoder. Raises `ValueError` that names a field out of its range.

    A checkpoint holds one, within its tokenizer's configuration: what a caller leaves out is taken from there.
    """

    guidance: float = 1.0  # of the language model against the null prompt
    variance_scale: float = 1.0  # of the distribution of the next deep token; 0 takes its mean
    first_variance_scale: float | None = None  # the same of a video's first key frame; None: as of the others
    temperature: float = 1.0  # of the choice between the mixture's components; 0 takes the likeliest
    flow_steps: int = 8  # of the flow head a token or key frame
    window: int = 0  # key frames of the language model's sequence, for any length; 0: all, as many as it holds
    steps: int = 12  # of the denoiser a clip
    decoder_guidance: float = 1.0  # of the denoiser against null tokens
    decoder_temperature: float = 1.0  # of its noise: below 1 clips hold together better and move less
    guidance_rescale: float = 0.0  # pulls the deviation of a guided prediction back; published 0.7
    eta: float = 0.0  # DDIM's noise; published 1.0
    motion_scale: float = 1.0  # how far frames move from their clip's mean, times what was rendered: `scale_motion`
    joins: Joins = "chained"

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not (least <= value <= most and math.isfinite(value)):
                limits = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise ValueError(f"{name}: expected {limits}, got {value}")
        if self.joins not in get_args(Joins):
            raise ValueError(f"joins: expected one of {', '.join(get_args(Joins))}, got {self.joins!r}")

    def changed(self, **options: object) -> "SamplingConfig":
        """With these fields changed; None leaves a field. Raises `ValueError` for one that does not exist."""
        known = self.__dataclass_fields__.keys()
        if unknown := options.keys() - known:
            raise ValueError(f"unknown options {sorted(unknown)}; known: {list(known)}")
        return replace(self, **{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]
