"""Weights of a GPT-2 or Llama that `transformers` saved, to start a language model from."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from dicode.checkpoint import load_state
from dicode.config import CheckpointError
from dicode.lm.backbone import Backbone

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


def load_pretrained(backbone: Backbone, folder: Path) -> None:
    """Load the weights of a GPT-2 or Llama that `transformers` saved; text entries it lacks get its entries' mean.

    Raises `CheckpointError` that names every size in which it differs, and where tensors are missing or unknown.
    """
    body, own_only = backbone.body, {"local_files_only": True}
    try:
        theirs = AutoConfig.from_pretrained(folder, **own_only)
        if problems := body_differences(body.config, theirs, backbone.positions):
            raise CheckpointError(f"{folder} holds another network: {'; '.join(problems)}")
        loaded, report = type(body).from_pretrained(folder, use_safetensors=True, output_loading_info=True, **own_only)
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    unused = report["unexpected_keys"] - {"lm_head.weight"}  # predicts words, where ours predicts deep tokens
    if problems := sorted(report["missing_keys"] | unused):
        raise CheckpointError(f"{folder}: tensors missing or unknown: {', '.join(problems[:8])}")
    entries = loaded.get_input_embeddings().weight.detach().float()
    further = entries.mean(0).expand(body.config.vocab_size - len(entries), -1)
    loaded.get_input_embeddings().weight = nn.Parameter(torch.cat([entries, further]))
    load_state(body, loaded.state_dict(), str(folder))


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
