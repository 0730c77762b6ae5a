"""How a model is sampled: one configuration from flags and `config.json` to language model and denoiser."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from dicode.config import Factor, Guidance, Share, Steps, Whole, check_ranges

Joins = Literal["chained", "parallel", "independent"]


@dataclass(frozen=True)
class SamplingConfig:
    """Of the language model, then of the decoder. Raises `ValueError` that names a field out of its range.

    A checkpoint holds one, within its tokenizer's configuration: what a caller leaves out is taken from there.
    """

    guidance: Guidance = 1.0  # of the language model against the null prompt
    variance_scale: Factor = 1.0  # of the distribution of the next deep token; 0 takes its mean
    first_variance_scale: Factor | None = None  # the same of a video's first key frame; None: as of the others
    temperature: Factor = 1.0  # of the choice between the mixture's components; 0 takes the likeliest
    flow_steps: Steps = 8  # of the flow head a token or key frame
    window: Whole = 0  # key frames of the language model's sequence, for any length; 0: all, as many as it holds
    steps: Steps = 12  # of the denoiser a clip
    decoder_guidance: Guidance = 1.0  # of the denoiser against null tokens
    decoder_temperature: Factor = 1.0  # of its noise: below 1 clips hold together better and move less
    guidance_rescale: Share = 0.0  # pulls the deviation of a guided prediction back; published 0.7
    eta: Share = 0.0  # DDIM's noise; published 1.0
    motion_scale: Factor = 1.0  # how far frames move from their clip's mean, times what was rendered: `scale_motion`
    joins: Joins = "chained"

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.joins not in get_args(Joins):
            raise ValueError(f"joins: expected one of {', '.join(get_args(Joins))}, got {self.joins!r}")

    def changed(self, **options: object) -> "SamplingConfig":
        """With these fields changed; None leaves a field. Raises `ValueError` for one that does not exist."""
        known = self.__dataclass_fields__.keys()
        if unknown := options.keys() - known:
            raise ValueError(f"unknown options {sorted(unknown)}; known: {list(known)}")
        return replace(self, **{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]
