"""TinyVT: a small network of clips and captions, trained here, whose features depend on motion.

Two towers as in CLIP (arXiv 2103.00020), of (2+1)-D convolutions (arXiv 1711.11248) and of a transformer over words.
It is neither CLIP, X-CLIP nor I3D: a figure of it compares with no published one. Trained by `studies/tinyvt`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float, Float32, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional

from dicode.checkpoint import CHECKPOINTS, load_model, read_section
from dicode.checkpoint.saving import save_weights, write_config
from dicode.config import Depth, Share, Width, config_to_dict
from dicode.features.extract import Features
from dicode.features.metrics import Clips
from dicode.lm.text import FILE, TextTokenizer
from dicode.tokenizer.config import Depths, Widths
from dicode.video.timed import Video

BUNDLED = CHECKPOINTS / "tinyvt"
WEIGHTS = "video_text.safetensors"
SIZE, FPS, FRAMES = 64, 8.0, 16  # of the clips that it was trained on
TUBE = {"t": 2, "y": 4, "x": 4}  # frames, rows and columns that become one vector at the beginning (arXiv 2103.15691)
CHANGES = 8.0  # factor of a tube's difference of frames, beside their mean: motion is small beside content
ORDERS = ("reversed", "shuffled")  # changed orders of frames, each with an output that scores how unlikely it is


@dataclass(frozen=True)
class TinyVTConfig:
    """Sizes: each stage of the video tower but the first halves height and width, the second also time."""

    widths: Widths = (48, 96, 160)
    depths: Depths = (2, 2, 1)  # blocks of each stage
    text_width: Width = 96
    text_heads: Width = 3
    text_depth: Depth = 1
    text_length: Width = 40
    vocab_size: Width = 1536
    joint_width: Width = 64  # in which clips and captions are compared
    dropout: Share = 0.1


class Block(nn.Module):
    """Convolve in space, then in time, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.space = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.time = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`b f h w c` in and out."""
        y = self.norm(x).movedim(-1, 1)
        return x + self.time(self.space(y).relu()).movedim(1, -1)


class Narrow(nn.Module):
    """Half the height and width, and a `frames`-th of the frames."""

    def __init__(self, width: int, width_out: int, frames: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv3d(width, width_out, (frames, 2, 2), stride=(frames, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """`b f h w c` in and out."""
        narrower: Tensor = self.conv(self.norm(x).movedim(-1, 1))
        return narrower.movedim(1, -1)


class TinyVT(nn.Module):
    """Clips → vectors that depend on motion and order; clips and captions → unit vectors to compare with each other.

    Trained on 16 frames at 8 a second of 64×64. Other sizes are resized (bilinear); other lengths from 8 frames on are
    taken as they are. At another rate all motion is faster or slower than in training.
    """

    name, alignment, least_frames = "TinyVT", "alignment-TinyVT", 8

    def __init__(self, config: TinyVTConfig, text: TextTokenizer) -> None:
        super().__init__()
        if text.vocab_size > config.vocab_size:
            raise ValueError(f"vocab_size: expected {text.vocab_size} or more, got {config.vocab_size}")
        self.config, self.text, self.width = config, text, config.widths[-1]
        first = config.widths[0]
        stages: list[nn.Module] = []
        for i, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            stages += [Narrow(config.widths[i - 1], width, 2 if i == 1 else 1)] if i else []
            stages += [Block(width) for _ in range(depth)]
        self.tubes = nn.Linear(3 * math.prod(TUBE.values()), first)
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.width)
        # Without centring over clips nothing was learnt in 100 steps: means over places are nearly equal (docs/log.md).
        self.centred = nn.BatchNorm1d(self.width, affine=False)
        self.of_clip = nn.Linear(self.width, config.joint_width, bias=False)
        self.in_order = nn.Linear(self.width, len(ORDERS), bias=False)
        self.words = nn.Embedding(config.vocab_size, config.text_width)
        self.places = nn.Parameter(0.02 * torch.randn(config.text_length + 1, config.text_width))
        nn.init.normal_(self.words.weight, std=0.02)
        width = config.text_width
        layer = nn.TransformerEncoderLayer(
            width, config.text_heads, 2 * width, config.dropout, batch_first=True, norm_first=True
        )
        self.reader = nn.TransformerEncoder(layer, config.text_depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.texts_centred = nn.BatchNorm1d(config.text_width, affine=False)
        self.of_text = nn.Linear(config.text_width, config.joint_width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3))  # of cosines in training, e^2.3 = 10

    @classmethod
    def from_pretrained(cls, folder: str | Path = BUNDLED) -> "TinyVT":
        """The network of a folder, by default the bundled one. Raises `CheckpointError`, as every load here."""
        folder = Path(folder)
        config, text = read_section(folder, "video_text", TinyVTConfig), TextTokenizer.load(folder)
        network = load_model(folder, lambda: cls(config, text), lambda network: {WEIGHTS: network})
        return network.requires_grad_(False)

    def save_pretrained(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write config.json, the weights and tokenizer.json."""
        write_config(folder, {"video_text": config_to_dict(self.config)})
        self.text.save(folder)
        save_weights(self, folder / WEIGHTS, dtype, beside=folder / FILE)

    def forward(
        self, frames: UInt8[Tensor, "b f h w c"], light: Float32[Tensor, "b two"] | None = None
    ) -> Float32[Tensor, "b width"]:
        """Vectors of clips, for the Fréchet distance. An odd last frame is left out.

        Training augments brightness: `light` multiplies pixels of −1…1 by its first column and adds its second.
        """
        if frames.shape[2:4] != (SIZE, SIZE):
            images = rearrange(frames, "b f h w c -> (b f) c h w").float()
            images = functional.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
            frames = rearrange(images, "(b f) c h w -> b f h w c", b=len(frames))
        frames = frames[:, : frames.shape[1] // TUBE["t"] * TUBE["t"]]
        tubes = rearrange(frames, "b (f t) (h y) (w x) c -> b f h w (t y x c)", **TUBE)
        pixels = tubes.float() / 127.5 - 1
        if light is not None:
            factor, offset = light.to(pixels)[:, :, None, None, None, None].unbind(1)
            pixels = pixels * factor + offset
        first, second = pixels.chunk(2, dim=-1)
        x = self.stages(self.tubes(torch.cat([(first + second) / 2, CHANGES * (second - first)], dim=-1)))
        vectors: Tensor = self.centred(reduce(self.norm(x).float(), "b f h w c -> b c", "mean"))
        return vectors

    def compared(self, vectors: Float[Tensor, "n width"]) -> Float[Tensor, "n joint"]:
        """Unit vectors of clips to compare with those of texts."""
        return functional.normalize(self.of_clip(vectors).float(), dim=-1)

    def read(self, texts: Sequence[str]) -> Float[Tensor, "n joint"]:
        """Unit vectors of texts, with gradients. Texts beyond `text_length` tokens are cut, and a warning says so."""
        ids = self.text.encode(texts, self.config.text_length).to(self.places.device)
        ids = functional.pad(ids, (1, 0), value=self.text.begin_id)  # so that empty text has a token
        padding = ids == self.text.pad_id
        x = self.reader(self.words(ids) + self.places, src_key_padding_mask=padding)
        x = x.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)
        return functional.normalize(self.of_text(self.texts_centred(x.float())).float(), dim=-1)

    @torch.no_grad()
    def clip_vector(self, clip: Video) -> Float32[ndarray, "width"]:
        """The vector of one clip, uint8 `f h w c`. Raises `ValueError` for one too short for its strides."""
        if len(clip) < self.least_frames:
            raise ValueError(f"TinyVT: expected clips of {self.least_frames} frames or more, got {len(clip)}")
        vector: ndarray = self(torch.from_numpy(np.array(clip))[None].to(self.places.device))[0].cpu().numpy()
        return vector

    def features(self, clips: Clips) -> Features:
        """As `Network.features`: vectors of clips."""
        return Features(np.stack([self.clip_vector(clip) for clip in clips]))

    @torch.no_grad()
    def similarities(self, vectors: Float[ndarray, "n width"], texts: Sequence[str]) -> Float[ndarray, "n texts"]:
        """As `TextNetwork.similarities`."""
        clips = self.compared(torch.from_numpy(vectors).float().to(self.places.device)).cpu()
        cosines: ndarray = (clips @ self.read(texts).cpu().T).double().numpy()
        return cosines
