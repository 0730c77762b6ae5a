"""What needs `transformers`: GPT-2, and weights of a GPT-2 or Llama that it saved, to start a language model from."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from dicode.checkpoint import load_state
from dicode.config import CheckpointError
from dicode.lm.backbone import Backbone
from dicode.lm.config import DeepLMConfig
from dicode.lm.llama import EPSILON, HIGH, LOW, TRAINED_CONTEXT, added_to_logits
from dicode.shapes import Hidden

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


def new_gpt2(config: DeepLMConfig) -> GPT2Model:
    """With random weights."""
    return GPT2Model(gpt2_config(config))


def gpt2_hidden(
    body: GPT2Model,
    embeddings: Hidden,
    cache: DynamicCache | None,
    mask: Bool[Tensor, "*b s all"] | None,
    positions: Int[Tensor, "s"] | None,
    fused: bool,
) -> Hidden:
    """As `Llama.forward`."""
    wanted = "sdpa" if fused else "eager"
    if body.config._attn_implementation != wanted:
        body.set_attn_implementation(wanted)
    return body(
        inputs_embeds=embeddings,
        attention_mask=None if mask is None else added_to_logits(mask, embeddings.dtype),
        position_ids=None if positions is None else positions[None],
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def load_pretrained(backbone: Backbone, folder: Path) -> None:
    """Load the weights of a GPT-2 or Llama that `transformers` saved; text entries it lacks get its entries' mean.

    Raises `CheckpointError` that names every size in which it differs, and where tensors are missing or unknown.
    """
    config, own_only = backbone.config, {"local_files_only": True}
    network = GPT2Model if config.body.kind == "gpt2" else LlamaModel
    try:
        theirs = AutoConfig.from_pretrained(folder, **own_only)
        if problems := body_differences(config, theirs):
            raise CheckpointError(f"{folder} holds another network: {'; '.join(problems)}")
        loaded, report = network.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **own_only)
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    unused = report["unexpected_keys"] - {"lm_head.weight"}  # predicts words, where ours predicts deep tokens
    if problems := sorted(report["missing_keys"] | unused):
        raise CheckpointError(f"{folder}: tensors missing or unknown: {', '.join(problems[:8])}")
    entries = loaded.get_input_embeddings().weight.detach().float()
    further = entries.mean(0).expand(config.vocab_size - len(entries), -1)
    loaded.get_input_embeddings().weight = nn.Parameter(torch.cat([entries, further]))
    load_state(backbone.body, loaded.state_dict(), str(folder))


def body_differences(config: DeepLMConfig, theirs: Any) -> list[str]:
    """What keeps the weights of a `transformers` configuration from a model of ours, each with both values."""
    ours: Any = gpt2_config(config) if config.body.kind == "gpt2" else llama_config(config)
    if theirs.model_type != ours.model_type:
        return [f"model_type: expected {ours.model_type}, got {theirs.model_type}"]
    names = BODY_SIZES[ours.model_type]
    found = {name: (_body_size(ours, name), _body_size(theirs, name)) for name in names}
    problems = [f"{name}: expected {own}, got {other}" for name, (own, other) in found.items() if own != other]
    if theirs.vocab_size > ours.vocab_size:
        problems.append(f"vocab_size: expected at most {ours.vocab_size}, got {theirs.vocab_size}")
    if (most := theirs.max_position_embeddings) < config.positions:
        problems.append(f"max_position_embeddings: expected {config.positions} or more, got {most}")
    return problems


def _body_size(config: Any, name: str) -> Any:
    value = getattr(config, name)
    if name == "n_inner" and value is None:
        return 4 * config.n_embd
    if name == "rope_parameters":
        return {key: part for key, part in value.items() if part is not None}
    return "gelu_pytorch_tanh" if value == "gelu_new" else value  # two codes of one function


def gpt2_config(config: DeepLMConfig) -> GPT2Config:
    """As the library describes it."""
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


def llama_config(config: DeepLMConfig) -> LlamaConfig:
    """As the library describes the network of `dicode.lm.llama`."""
    body = config.body
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": body.rope_base}
    if body.rope_factor > 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": body.rope_factor,
            "low_freq_factor": LOW,
            "high_freq_factor": HIGH,
            "original_max_position_embeddings": TRAINED_CONTEXT,
        }
    return LlamaConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=131_072 if body.rope_factor > 1.0 else config.positions,
        hidden_size=body.width,
        num_hidden_layers=body.depth,
        num_attention_heads=body.heads,
        num_key_value_heads=body.key_value_heads or body.heads,
        intermediate_size=body.feed_forward or 3 * body.width,
        rms_norm_eps=EPSILON,
        rope_parameters=rope,
        attention_dropout=body.dropout,
        pad_token_id=None,  # a padding index would pin its embedding to zero; the null prompt is to be learned
        bos_token_id=None,
        eos_token_id=None,
    )
