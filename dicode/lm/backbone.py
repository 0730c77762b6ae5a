"""The transformer between embeddings and hidden states: GPT-2 or Llama of `transformers`, built from configuration."""

from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from dicode.lm.presets import DeepLMConfig
from dicode.shapes import Hidden, TextIds


class Backbone(nn.Module):
    """A causal transformer over embeddings, with one text embedding and a key/value cache."""

    def __init__(self, config: DeepLMConfig) -> None:
        super().__init__()
        self.body: GPT2Model | LlamaModel = GPT2Model(_gpt2(config)) if config.body == "gpt2" else _llama_model(config)

    def embed_text(self, text_ids: TextIds) -> Hidden:
        """Look text ids up; the begin-of-image token is one of them."""
        return cast(nn.Embedding, self.body.get_input_embeddings())(text_ids)

    def new_cache(self) -> DynamicCache:
        """An empty key/value cache for `forward`."""
        return DynamicCache(config=self.body.config)

    def forward(
        self,
        embeddings: Hidden,
        cache: DynamicCache | None = None,
        mask: Bool[Tensor, "s all"] | None = None,
    ) -> Hidden:
        """Hidden states after the last norm. With a cache, `embeddings` continue what the cache has seen, and fill it.

        `mask` tells which position (row) sees which, cached ones included; left out, each sees all before it.

        Padding is attended to like any token: so does the published model, and the null prompt is all padding.
        """
        self._choose_attention(embeddings.device.type == "cpu" and torch.is_grad_enabled())
        added = None
        if mask is not None:  # as what is added to attention's logits, which every implementation takes
            added = torch.zeros(mask.shape, dtype=embeddings.dtype, device=embeddings.device)
            added = added.masked_fill(~mask, torch.finfo(embeddings.dtype).min)[None, None]
        output = self.body(
            inputs_embeds=embeddings, attention_mask=added, past_key_values=cache, use_cache=cache is not None
        )
        return output.last_hidden_state

    def _choose_attention(self, trains_on_cpu: bool) -> None:
        # Measured, bfloat16, 32 × 114 × 256: the backward of torch's fused CPU attention takes 6-8 times as long as
        # that of the plain one, and decides how long a training step takes. Everywhere else the fused one is faster.
        wanted = "eager" if trains_on_cpu else "sdpa"
        if self.body.config._attn_implementation != wanted:
            self.body.set_attn_implementation(wanted)


class Reading:
    """One sequence as it grows: the transformer reads what was added with a key/value cache, or all of it every time.

    `blockwise`: what was added at once sees all of itself (after the text, with which a reading begins).
    """

    def __init__(self, backbone: Backbone, text: Hidden, use_cache: bool, blockwise: bool) -> None:
        self.backbone, self.batch, self.blockwise = backbone, len(text), blockwise
        self.cache = backbone.new_cache() if use_cache else None
        self.unread = text
        self.blocks = torch.arange(text.shape[1])  # the block of every position, the number of its last one

    def add(self, embeddings: Hidden) -> None:
        """Append embeddings, to be read when something is asked for."""
        self.unread = torch.cat([self.unread, embeddings.to(self.unread.dtype)], dim=1)
        number = torch.full((embeddings.shape[1],), len(self.blocks) + embeddings.shape[1] - 1)
        self.blocks = torch.cat([self.blocks, number])

    def last(self, count: int) -> Hidden:
        """Hidden states of the last `count` positions, none of which may have been asked for before."""
        mask = None
        if self.blockwise:
            mask = (self.blocks[-self.unread.shape[1] :, None] >= self.blocks).to(self.unread.device)
        hidden = self.backbone(self.unread, self.cache, mask)
        if self.cache is not None:
            self.unread = self.unread[:, :0]
        return hidden[:, -count:]


def _gpt2(config: DeepLMConfig) -> GPT2Config:
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.positions,
        n_embd=config.width,
        n_layer=config.depth,
        n_head=config.heads,
        n_inner=config.feed_forward or 4 * config.width,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own "gelu_new" in one fused operation
        bos_token_id=None,
        eos_token_id=None,
    )


def _llama_model(config: DeepLMConfig) -> LlamaModel:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_factor > 1.0:  # the constants of every Llama 3.1 and 3.2 configuration
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return LlamaModel(
        LlamaConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=131_072 if config.rope_factor > 1.0 else config.positions,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads or config.heads,
            intermediate_size=config.feed_forward or 3 * config.width,
            rms_norm_eps=1e-5,
            rope_parameters=rope,
            attention_dropout=config.dropout,
            pad_token_id=None,  # a padding index would pin its embedding to zero; the null prompt is to be learned
            bos_token_id=None,
            eos_token_id=None,
        )
    )


BODY_SIZES = {
    "gpt2": (
        "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "layer_norm_epsilon", "activation_function",
        "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
    ),
    "llama": (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias",
    ),
}  # fmt: skip


def body_differences(ours: Any, theirs: Any, positions: int) -> list[str]:
    """What keeps the weights of one `transformers` configuration from another, each with both values."""
    if theirs.model_type != ours.model_type:
        return [f"model_type: expected {ours.model_type}, got {theirs.model_type}"]
    names = BODY_SIZES[ours.model_type]
    found = {name: (_body_size(ours, name), _body_size(theirs, name)) for name in names}
    problems = [f"{name}: expected {own}, got {other}" for name, (own, other) in found.items() if own != other]
    if theirs.vocab_size > ours.vocab_size:
        problems.append(f"vocab_size: expected at most {ours.vocab_size}, got {theirs.vocab_size}")
    if theirs.max_position_embeddings < positions:
        problems.append(f"max_position_embeddings: expected {positions} or more, got {theirs.max_position_embeddings}")
    return problems


def _body_size(config: Any, name: str) -> Any:
    value = getattr(config, name)
    if name == "n_inner" and value is None:
        return 4 * config.n_embd
    if name == "rope_parameters":
        return {key: part for key, part in value.items() if part is not None}
    return "gelu_pytorch_tanh" if value == "gelu_new" else value  # two codes of one function
