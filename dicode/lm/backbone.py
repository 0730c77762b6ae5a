"""The transformer between embeddings and hidden states: GPT-2 or Llama of `transformers`, built from configuration."""

from typing import cast

import torch
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from dicode.lm.sizes import DeepLMConfig
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

    def forward(self, embeddings: Hidden, cache: DynamicCache | None = None) -> Hidden:
        """Hidden states after the last norm. With a cache, `embeddings` continue what the cache has seen, and fill it.

        Padding is attended to like any token: so does the published model, and the null prompt is all padding.
        """
        self._choose_attention(embeddings.device.type == "cpu" and torch.is_grad_enabled())
        output = self.body(inputs_embeds=embeddings, past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state

    def _choose_attention(self, trains_on_cpu: bool) -> None:
        # Measured, bfloat16, 32 × 114 × 256: the backward of torch's fused CPU attention takes 6-8 times as long as
        # that of the plain one, and decides how long a training step takes. Everywhere else the fused one is faster.
        wanted = "eager" if trains_on_cpu else "sdpa"
        if self.body.config._attn_implementation != wanted:
            self.body.set_attn_implementation(wanted)


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
