"""The diffusion that trains and drives a denoiser: three objectives, samplers from diffusers, guidance."""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dicode.shapes import ClipLatents
from dicode.tokenizer.config import DiffusionConfig, SamplingConfig

Predict = Callable[[ClipLatents, Tensor], ClipLatents]


def ddim_scheduler(config: DiffusionConfig) -> DDIMScheduler:
    """Published: `v_prediction` on zero terminal SNR, which agrees with the public sampler to 1e-5 (DESIGN §2.2).

    So does DynamiCrafter-512; DynamiCrafter-256 predicts `epsilon` on the schedule as it is before the rescaling.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=config.objective,
        rescale_betas_zero_snr=config.objective == "v_prediction",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def noised(
    config: DiffusionConfig, latents: ClipLatents, noise: ClipLatents, generator: torch.Generator
) -> tuple[ClipLatents, Tensor, ClipLatents]:
    """Latents at a random time: (noisy latents, timestep `b` in 0…1000, what the denoiser shall predict)."""
    b = len(latents)
    if config.objective == "flow":
        sigma = torch.sigmoid(torch.randn(b, generator=generator)).to(latents.device)
        sigma = config.shift * sigma / (1 + (config.shift - 1) * sigma)
        mix = sigma[:, None, None, None, None]
        return (1 - mix) * latents + mix * noise, sigma * 1000, noise - latents
    timesteps = torch.randint(0, 1000, (b,), generator=generator).to(latents.device)
    scheduler = ddim_scheduler(config)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if config.objective == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    return noisy, timesteps.float(), target


def sample(
    config: DiffusionConfig,
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

    if config.objective == "flow":  # from 1 in equal steps to 0; left alone, diffusers takes its last step at 0.001
        scheduler = FlowMatchEulerDiscreteScheduler(shift=config.shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / sampling.steps, sampling.steps), device=noise.device)
    else:
        scheduler = ddim_scheduler(config)
        scheduler.set_timesteps(sampling.steps, device=noise.device)
    latents = sampling.decoder_temperature * noise
    for timestep in scheduler.timesteps:
        prediction = guided(latents, timestep.expand(len(latents)).to(noise))
        if config.objective == "flow":
            latents = scheduler.step(prediction, timestep, latents).prev_sample
        else:
            latents = scheduler.step(
                prediction, timestep, latents, eta=sampling.eta, generator=generators, use_clipped_model_output=False
            ).prev_sample
    return latents


def scale_motion(clips: ClipLatents, scale: float, keys: list[int]) -> ClipLatents:
    """Move every frame of clips `b f c h w` away from its clip's mean, `scale` times as far; key frames stay.

    A denoiser unsure of what happens between key frames renders frames too like one another. Latents are normalised, so
    that the variance over time which is missing is one number, measured on training clips (studies/motion).
    """
    if scale == 1.0:
        return clips
    scaled = torch.lerp(clips.mean(1, keepdim=True), clips, scale)
    scaled[:, keys] = clips[:, keys]
    return scaled
