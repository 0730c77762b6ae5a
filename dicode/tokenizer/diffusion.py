"""The diffusion that trains and drives a denoiser: three objectives, samplers from diffusers, guidance."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dicode.shapes import ClipLatents
from dicode.tokenizer.config import Objective, SamplingConfig

Predict = Callable[[ClipLatents, Tensor], ClipLatents]


def ddim_scheduler(objective: Objective) -> DDIMScheduler:
    """Published: `v_prediction` on zero terminal SNR, which agrees with the public sampler to 1e-5 relative."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=objective,
        rescale_betas_zero_snr=objective == "v_prediction",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def noised(
    objective: Objective, latents: ClipLatents, noise: ClipLatents, generator: torch.Generator
) -> tuple[ClipLatents, Tensor, ClipLatents]:
    """Latents at a random time: (noisy latents, timestep `b` in 0…1000, the denoiser's target)."""
    b = len(latents)
    if objective == "flow":
        sigma = torch.sigmoid(torch.randn(b, generator=generator)).to(latents.device)
        mix = sigma[:, None, None, None, None]
        return (1 - mix) * latents + mix * noise, sigma * 1000, noise - latents
    timesteps = torch.randint(0, 1000, (b,), generator=generator).to(latents.device)
    scheduler = ddim_scheduler(objective)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if objective == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    return noisy, timesteps.float(), target


def sample(
    objective: Objective,
    sampling: SamplingConfig,
    predict: Predict,
    predict_null: Predict,
    noise: ClipLatents,
    generators: list[torch.Generator] | None = None,
) -> ClipLatents:
    """Noise → clean latents.

    With a guidance other than 1 the prediction is null + guidance·(conditional − null) (Ho & Salimans 2022), its
    deviation pulled back by `guidance_rescale` (Lin et al. 2024, section 3.4).
    """

    def guided(latents: ClipLatents, timestep: Tensor) -> ClipLatents:
        conditional = predict(latents, timestep)
        if sampling.decoder_guidance == 1.0:
            return conditional
        null = predict_null(latents, timestep)
        prediction = null + sampling.decoder_guidance * (conditional - null)
        if sampling.guidance_rescale == 0.0:
            return prediction
        axes = tuple(range(1, prediction.ndim))
        ratio = conditional.std(axes, keepdim=True) / prediction.std(axes, keepdim=True)
        return prediction * (sampling.guidance_rescale * ratio + 1 - sampling.guidance_rescale)

    if objective == "flow":  # from 1 in equal steps to 0; left alone, diffusers takes its last step at 0.001
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / sampling.steps, sampling.steps), device=noise.device)
    else:
        scheduler = ddim_scheduler(objective)
        scheduler.set_timesteps(sampling.steps, device=noise.device)
    # arguments that only DDIM's step takes
    noise_options: dict[str, Any] = {} if objective == "flow" else {"eta": sampling.eta, "generator": generators}
    latents = sampling.decoder_temperature * noise
    for timestep in scheduler.timesteps:
        prediction = guided(latents, timestep.expand(len(latents)).to(noise))
        latents = scheduler.step(prediction, timestep, latents, **noise_options).prev_sample
    return latents


def scale_motion(clips: ClipLatents, scale: float, keys: list[int]) -> ClipLatents:
    """Move every frame of clips `b f c h w` away from its clip's mean, `scale` times as far; key frames stay.

    A denoiser uncertain about what happens between key frames renders frames that are too similar. Latents are
    normalised, so that one factor, measured on training clips, restores their variance over time (studies/motion).
    """
    if scale == 1.0:
        return clips
    scaled = torch.lerp(clips.mean(1, keepdim=True), clips, scale)
    scaled[:, keys] = clips[:, keys]
    return scaled
