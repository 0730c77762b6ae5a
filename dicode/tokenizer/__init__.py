"""Frames ⇄ deep tokens: first stage, linear code or resampler, denoiser, and the diffusion that joins them."""
