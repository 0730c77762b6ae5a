"""Frames ⇄ deep tokens: image encoder, resampler, first stage, denoiser, and the diffusion that joins them."""
