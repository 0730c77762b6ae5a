"""The transformer between embeddings and hidden states: GPT-2 or Llama of `transformers`, built from configuration."""

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from dicode.checkpoint import load_state
from dicode.config import CheckpointError
from dicode.lm.presets import DeepLMConfig
from dicode.shapes import Hidden, TextIds


class Backbone(nn.Module):
    """A causal transformer over embeddings, with one text embedding and a key/value cache."""

    def __init__(self, config: DeepLMConfig) -> None:
        super().__init__()
        self.positions = config.positions
        self.body = GPT2Model(_gpt2(config)) if config.body.kind == "gpt2" else LlamaModel(_llama(config))

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
        """Hidden states after the last norm. With a cache, `embeddings` continue the cached sequence, and join it.

        `mask` is True where a position (row) attends to another, cached ones included; the default is causal.
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

    def load_pretrained(self, folder: Path) -> None:
        """Load the weights of a GPT-2 or Llama that `transformers` saved; text entries it lacks get its entries' mean.

        Raises `CheckpointError` that names every size in which it differs, and where tensors are missing or unknown.
        """
        what = {"local_files_only": True}
        try:
            theirs = AutoConfig.from_pretrained(folder, **what)
            if problems := body_differences(self.body.config, theirs, self.positions):
                raise CheckpointError(f"{folder} holds another network: {'; '.join(problems)}")
            loaded, report = type(self.body).from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **what
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise error if isinstance(error, CheckpointError) else CheckpointError(f"{folder}: {error}") from error
        unused = report["unexpected_keys"] - {"lm_head.weight"}  # predicts words, where ours predicts deep tokens
        if problems := sorted(report["missing_keys"] | unused):
            raise CheckpointError(f"{folder}: tensors missing or unknown: {', '.join(problems[:8])}")
        entries = loaded.get_input_embeddings().weight.detach().float()
        further = entries.mean(0).expand(self.body.config.vocab_size - len(entries), -1)
        loaded.get_input_embeddings().weight = nn.Parameter(torch.cat([entries, further]))
        load_state(self.body, loaded.state_dict(), str(folder))


class CachedSequence:
    """A sequence as it grows: appended positions pass the transformer once, with a key/value cache or without.

    `blockwise`: what is appended at once attends to all of itself (after the text, with which a sequence begins).
    """

    def __init__(self, backbone: Backbone, text: Hidden, use_cache: bool, blockwise: bool) -> None:
        self.backbone, self.batch, self.blockwise = backbone, len(text), blockwise
        self.cache = backbone.new_cache() if use_cache else None
        self.waiting = text  # positions that are not in the cache yet
        self.blocks = torch.arange(text.shape[1])  # the block of every position, the number of its last one

    def append(self, embeddings: Hidden) -> None:
        """Append embeddings, computed when `last` is called."""
        self.waiting = torch.cat([self.waiting, embeddings.to(self.waiting.dtype)], dim=1)
        number = torch.full((embeddings.shape[1],), len(self.blocks) + embeddings.shape[1] - 1)
        self.blocks = torch.cat([self.blocks, number])

    def last(self, count: int) -> Hidden:
        """Hidden states of the last `count` positions; call it once for each position."""
        mask = None
        if self.blockwise:
            mask = (self.blocks[-self.waiting.shape[1] :, None] >= self.blocks).to(self.waiting.device)
        hidden = self.backbone(self.waiting, self.cache, mask)
        if self.cache is not None:
            self.waiting = self.waiting[:, :0]
        return hidden[:, -count:]


def _gpt2(config: DeepLMConfig) -> GPT2Config:
    body = config.body
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.positions,
        n_embd=body.width,
        n_layer=body.depth,
        n_head=body.heads,
        n_inner=body.feed_forward or 4 * body.width,
        resid_pdrop=body.dropout,
        embd_pdrop=body.dropout,
        attn_pdrop=body.dropout,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own "gelu_new" in one fused operation
        bos_token_id=None,
        eos_token_id=None,
    )


def _llama(config: DeepLMConfig) -> LlamaConfig:
    body = config.body
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": body.rope_base}
    if body.rope_factor > 1.0:  # the constants of every Llama 3.1 and 3.2 configuration
        rope |= {
            "rope_type": "llama3",
            "factor": body.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return LlamaConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=131_072 if body.rope_factor > 1.0 else config.positions,
        hidden_size=body.width,
        num_hidden_layers=body.depth,
        num_attention_heads=body.heads,
        num_key_value_heads=body.key_value_heads or body.heads,
        intermediate_size=body.feed_forward or 3 * body.width,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        attention_dropout=body.dropout,
        pad_token_id=None,  # a padding index would pin its embedding to zero; the null prompt is to be learned
        bos_token_id=None,
        eos_token_id=None,
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
