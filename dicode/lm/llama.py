"""Llama (Touvron et al. 2023), as `transformers` computes it and names its weights, which takes seconds to import."""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dicode.lm.config import DeepLMConfig
from dicode.shapes import Hidden

EPSILON = 1e-5  # of the norms
# Of every Llama 3.1 and 3.2 configuration: frequencies whose waves are longer than the context that was trained on are
# divided by `rope_factor`, those of a quarter of it and shorter stay, and between these both are mixed.
TRAINED_CONTEXT, LOW, HIGH = 8192, 1.0, 4.0

HeadStates = Float[Tensor, "b heads s e"]
AllStates = Float[Tensor, "b heads all e"]  # of cached positions too
Added = Float[Tensor, "#b 1 s all"]


class Surroundings(NamedTuple):
    """What all layers of a pass share."""

    waves: tuple[Float[Tensor, "s e"], Float[Tensor, "s e"]]  # of the positions' angles, see `rotated`
    added: Added | None  # to the logits of attention
    causal: bool  # in place of a mask, for which torch has faster kernels
    fused: bool  # by torch's own attention
    cache: "KeyValueCache | None"


class KeyValueCache:
    """Keys and values of the positions that have passed the transformer, a pair a layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[AllStates, AllStates]] = {}

    @property
    def length(self) -> int:
        """Positions in it."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def extended(self, layer: int, keys: HeadStates, values: HeadStates) -> tuple[AllStates, AllStates]:
        """All keys and values of a layer, after these joined them."""
        if layer in self.layers:
            before = self.layers[layer]
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        self.layers[layer] = keys, values
        return keys, values


class Llama(nn.Module):
    """The transformer without its output layer: embeddings in, hidden states after the last norm out."""

    frequencies: Tensor
    signs: Tensor

    def __init__(self, config: DeepLMConfig) -> None:
        super().__init__()
        body = config.body
        self.embed_tokens = nn.Embedding(config.vocab_size, body.width)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(body.depth))
        self.norm = RMSNorm(body.width)
        rates = rope_frequencies(body.width // body.heads, body.rope_base, body.rope_factor)
        signs = torch.cat([-torch.ones_like(rates), torch.ones_like(rates)])
        self.register_buffer("frequencies", rates.repeat(2).to(torch.get_default_device()), persistent=False)
        self.register_buffer("signs", signs.to(torch.get_default_device()), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def get_input_embeddings(self) -> nn.Embedding:
        """Of the vocabulary."""
        return self.embed_tokens

    def forward(
        self,
        embeddings: Hidden,
        cache: KeyValueCache | None = None,
        mask: Bool[Tensor, "*b s all"] | None = None,
        positions: Int[Tensor, "s"] | None = None,
        fused: bool = True,
    ) -> Hidden:
        """As `Backbone.forward`; `fused` takes torch's own attention."""
        rows, before = embeddings.shape[1], 0 if cache is None else cache.length
        number = torch.arange(before + rows, device=embeddings.device)
        places = (number[before:] if positions is None else positions).float()
        causal = mask is None and fused and before == 0 and rows > 1
        if mask is None and rows > 1 and not causal:
            mask = number[before:, None] >= number
        added = None if mask is None else added_to_logits(mask, computing_dtype(embeddings))
        angles = places[:, None] * self.frequencies
        waves = angles.cos(), angles.sin() * self.signs
        around = Surroundings(waves, added, causal, fused, cache)
        x = embeddings
        for layer in self.layers:
            x = layer(x, around)
        return self.norm(x)


class Layer(nn.Module):
    """Attention and a gated MLP, both residual, each after a norm."""

    def __init__(self, config: DeepLMConfig, number: int) -> None:
        super().__init__()
        width = config.body.width
        self.self_attn = Attention(config, number)
        self.mlp = GatedMLP(width, config.body.feed_forward or 3 * width)
        self.input_layernorm = RMSNorm(width)
        self.post_attention_layernorm = RMSNorm(width)

    def forward(self, x: Hidden, around: Surroundings) -> Hidden:
        x = x + self.self_attn(self.input_layernorm(x), around)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Of rotated queries and keys; several query heads may share a key/value head."""

    def __init__(self, config: DeepLMConfig, number: int) -> None:
        super().__init__()
        body = config.body
        self.number, self.dropout = number, body.dropout
        self.heads, self.shared = body.heads, body.key_value_heads or body.heads
        linear = partial(nn.Linear, bias=False)
        self.q_proj = linear(body.width, body.width)
        self.k_proj = linear(body.width, body.width // self.heads * self.shared)
        self.v_proj = linear(body.width, body.width // self.heads * self.shared)
        self.o_proj = linear(body.width, body.width)

    def forward(self, x: Hidden, around: Surroundings) -> Hidden:
        q, k, v = (
            rearrange(projected(x), "b s (heads e) -> b heads s e", heads=heads)
            for projected, heads in ((self.q_proj, self.heads), (self.k_proj, self.shared), (self.v_proj, self.shared))
        )
        q, k = rotated(torch.cat([q, k], dim=1), *around.waves).split((self.heads, self.shared), dim=1)
        if around.cache is not None:
            k, v = around.cache.extended(self.number, k, v)
        if self.shared < self.heads:
            k, v = (part.repeat_interleave(self.heads // self.shared, dim=1) for part in (k, v))
        added, dropout = around.added, self.dropout if self.training else 0.0
        if around.fused:
            values = F.scaled_dot_product_attention(q, k, v, added, dropout, around.causal)
        else:
            values = plain_attention(q, k, v, added, dropout)
        return self.o_proj(rearrange(values, "b heads s e -> b s (heads e)"))


class GatedMLP(nn.Module):
    """SiLU(gate) · up, projected down."""

    def __init__(self, width: int, between: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, between, bias=False)
        self.up_proj = nn.Linear(width, between, bias=False)
        self.down_proj = nn.Linear(between, width, bias=False)

    def forward(self, x: Hidden) -> Hidden:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / √mean(x²) times learned factors, in float32; the result has the type that layers compute in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Hidden) -> Hidden:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), EPSILON).to(computing_dtype(x))


def plain_attention(q: HeadStates, k: AllStates, v: AllStates, added: Added | None, dropout: float) -> HeadStates:
    """Softmax attention, operation by operation; `added` is added to its logits."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    logits = logits if added is None else logits + added
    return F.dropout(logits.softmax(-1, dtype=torch.float32).to(v.dtype), dropout, dropout > 0) @ v


def added_to_logits(mask: Bool[Tensor, "*b s all"], dtype: torch.dtype) -> Added:
    """0 where `mask` is True, elsewhere so low that nothing is attended.

    It is not −∞: a row that attends to nothing, of padding, must stay finite.
    """
    added = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return added[:, None] if added.ndim == 3 else added[None, None]


def computing_dtype(x: Tensor) -> torch.dtype:
    """The type that layers compute in: autocast's, or that of their input."""
    kind = x.device.type  # autocast does not know `meta`, on which sizes are counted
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


def rotated(x: HeadStates, cosines: Float[Tensor, "s e"], sines: Float[Tensor, "s e"]) -> HeadStates:
    """Pairs of numbers, i and i + e/2, turned by their position's angles (Su et al. 2021); first sines are negative."""
    return x * cosines.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * sines.to(x.dtype)


def rope_frequencies(width: int, base: float, factor: float) -> Float[Tensor, "half"]:
    """Radians a position of each pair of a head of this width."""
    rates = 1.0 / base ** (torch.arange(0, width, 2, device="cpu").float() / width)  # see `normal_start`
    if factor == 1.0:
        return rates
    turns = TRAINED_CONTEXT * rates / (2 * math.pi)  # in the context that was trained on
    kept = ((turns - LOW) / (HIGH - LOW)).clamp(0, 1)
    return (1 - kept) * rates / factor + kept * rates
