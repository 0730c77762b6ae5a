"""Models in less memory: parts that take turns on a device, and matrices that stay 8-bit."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dicode.checkpoint.saving import as_stored
from dicode.lm.deep_lm import DeepTokenLM
from dicode.tokenizer.video_tokenizer import VideoTokenizer

INT8_PARTS = ("encoder", "resampler", "denoiser")  # of a tokenizer; an autoencoder's convolutions are small


class Offload:
    """Parts of a model that take turns on a device; the others wait in the CPU's memory.

    A part comes when one of its methods is called, and stays until that of another one is: the steps of a stage move
    nothing. As `enable_model_cpu_offload` of diffusers, for methods other than `forward` too, and without accelerate.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.present: nn.Module | None = None
        self.homes: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # tensors of a part, and their content on the CPU

    def add(self, part: nn.Module, owner: nn.Module, *methods: str) -> None:
        """Bring `part` to the device whenever one of these methods of `owner` is called."""
        self.homes[part] = [(own, own.data) for own in (*part.parameters(), *part.buffers())]
        for name in methods:
            setattr(owner, name, self._bringing(part, getattr(owner, name)))

    def bring(self, part: nn.Module) -> None:
        """Have this part on the device, and no other."""
        if self.present is part:
            return
        for own, home in self.homes[self.present] if self.present is not None else ():
            own.data = home  # weights do not change: nothing is copied back
        for own, home in self.homes[part]:
            own.data = home.to(self.device, copy=True)
        self.present = part

    def _bringing(self, part: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def brought(*given: Any, **named: Any) -> Any:
            self.bring(part)
            made = method(*given, **named)
            return self._resumed(part, made) if isinstance(made, Iterator) else made

        return brought

    def _resumed(self, part: nn.Module, made: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.bring(part)  # another one may have come since
            try:
                value = next(made)
            except StopIteration:
                return
            yield value


def load_tokenizer(
    folder: Path, device: str, dtype: torch.dtype | None, *, offload: bool, vae_tiling: bool, int8: bool
) -> VideoTokenizer:
    """The tokenizer of a checkpoint folder, by options of `DiCoDe.from_pretrained`.

    On the device, or with `offload` on the CPU, for the function of that name.
    """
    if offload and torch.device(device).type == "cpu":
        raise ValueError("offload: expected a device other than the CPU, in whose memory the model is already")
    tokenizer = VideoTokenizer.from_pretrained(folder, dtype=None if int8 else dtype)
    if vae_tiling:
        tokenizer.first_stage.enable_tiling()
    if int8:
        to_int8_tokenizer(tokenizer, dtype or torch.float32)
    return tokenizer if offload else tokenizer.to(device)


def offload(tokenizer: VideoTokenizer, lm: DeepTokenLM | None, device: torch.device) -> Offload:
    """Let first stage, image encoder, denoiser and language model, which are on the CPU, take turns on a device.

    The rest of the tokenizer, which is small, stays there.
    """
    turns, stage = Offload(device), tokenizer.first_stage
    turns.add(stage.autoencoder, stage, "raw_latents", "raw_decode", "encode_clips", "decode_clips")
    turns.add(tokenizer.denoiser, tokenizer.denoiser, "forward")
    if tokenizer.config.resampler is not None:
        turns.add(tokenizer.encoder, tokenizer.encoder, "forward")
    if lm is not None:
        turns.add(lm, lm, "generate")
    waiting = {id(own) for part in turns.homes for own in (*part.parameters(), *part.buffers())}
    for own in (*tokenizer.parameters(), *tokenizer.buffers()):
        if id(own) not in waiting:
            own.data = own.data.to(device)
    return turns


class Int8(nn.Module):
    """A weight of 8 bits a number and a float32 scale a row, as `save_weights` stores it, expanded when it is read."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, stored: Tensor, scales: Tensor) -> Tensor:
        return (stored * scales).to(self.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        stored, scales = as_stored(weight, torch.int8)
        assert scales is not None
        return stored, scales


def to_int8(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of linear layers 8-bit in memory, for inference; they compute in `dtype`, as all others are.

    Weights that were stored 8-bit come out as they were stored, where the module is float32.
    """
    from transformers.pytorch_utils import Conv1D  # of GPT-2

    module.requires_grad_(False)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | Conv1D)]
    quantized = {id(layer.weight) for layer in layers}
    for own in module.parameters():
        if id(own) not in quantized:
            own.data = own.data.to(dtype)
    for layer in layers:
        # unsafe: the type may become that of `dtype`
        parametrize.register_parametrization(layer, "weight", Int8(dtype), unsafe=True)


def to_int8_tokenizer(tokenizer: VideoTokenizer, dtype: torch.dtype) -> None:
    """`to_int8` for image encoder, resampler and denoiser; the rest becomes `dtype`."""
    for name, part in tokenizer.named_children():
        if name in INT8_PARTS:
            to_int8(part, dtype)
        else:
            for own in part.parameters():
                own.data = own.data.to(dtype)
