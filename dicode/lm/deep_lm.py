"""The language model over deep tokens: reads a prompt, writes key frames one after the other (arXiv 2412.04446)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig

from dicode.hub import (
    CheckpointError,
    cast_parameters,
    config_from_dict,
    config_to_dict,
    load_state,
    load_weights,
    read_config,
    resolve,
    save_weights,
    without_initialisation,
    write_config,
)
from dicode.lm.backbone import Backbone
from dicode.lm.heads import Head, MixtureHead, RegressionHead
from dicode.lm.sequence import BeginHidden, DeepTokenEmbedding, KeyFrameHidden, arrange, predicting
from dicode.lm.sizes import DeepLMConfig
from dicode.lm.text import TextTokenizer
from dicode.seeds import generator_for
from dicode.shapes import DeepTokens, KeyFrameMask, KeyFrameTokens, TextIds

__all__ = ["DeepLMConfig", "DeepLMOutput", "DeepTokenLM"]
WEIGHTS = "lm.safetensors"
SECTION = "lm"  # of config.json


@dataclass(frozen=True)
class DeepLMOutput:
    """A training step's loss and the values it was made of."""

    loss: Float[Tensor, ""]  # mean over the tokens of real key frames, float32
    keyframe_loss: Float[Tensor, "b k"]  # mean over a key frame's tokens; 0 where the mask is False
    hidden: KeyFrameHidden  # what the head saw for each deep token


class DeepTokenLM(nn.Module):
    """A causal transformer that predicts the next deep token's distribution from the text and the tokens so far."""

    def __init__(self, config: DeepLMConfig, text: TextTokenizer | None = None) -> None:
        super().__init__()
        if config.keyframe_limit < 1:
            raise ValueError(
                f"{config.positions} positions and {config.max_keyframes} key frames hold no key frame of "
                f"{config.tokens_per_keyframe} tokens after {config.text_length} text tokens"
            )
        if not 0 <= config.input_noise <= 1:
            raise ValueError(f"input_noise: expected a share of noise, 0 to 1, got {config.input_noise}")
        self.config, self.text = config, text
        self.backbone = Backbone(config)
        self.embedding = DeepTokenEmbedding(
            config.token_width, config.width, config.max_keyframes, config.tokens_per_keyframe
        )
        self.head: nn.Module = (
            MixtureHead(config.width, config.token_width, config.components, config.token_variance)
            if config.head == "mixture"
            else RegressionHead(config.width, config.token_width)
        )
        self._initialise()

    def _initialise(self) -> None:
        """Normal of deviation 0.02 and zero biases, as published; the body initialises itself the same way."""
        for module in (*self.embedding.modules(), *self.head.modules()):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.embedding.keyframe, std=0.02)
        nn.init.trunc_normal_(self.embedding.place, std=0.02)

    def forward(
        self,
        text_ids: TextIds,
        tokens: DeepTokens,
        keyframe_mask: KeyFrameMask | None = None,
        generator: torch.Generator | None = None,
    ) -> DeepLMOutput:
        """The loss of every deep token given the text and all deep tokens before it.

        `keyframe_mask` is True where a key frame is real; padding comes after the last real one, where causality
        keeps it from every prediction. In training mode the tokens read (not the targets) are mixed with Gaussian
        noise (CAM, arXiv 2411.18447), whose share is drawn for each sample from 0 … `input_noise` with a density that
        rises linearly: what it reads is seldom exact, as in use, and where little of it is left the caption must say
        the rest. `generator` draws it (default: torch's own).
        """
        self._check(text_ids, tokens, tokens.shape[1])
        read = _noised(tokens, self.config.input_noise, generator) if self.training else tokens
        sequence = arrange(self.backbone.embed_text(text_ids), self._begin(len(text_ids)), self.embedding(read))
        hidden = predicting(self.backbone(sequence), self.config.text_length, self.config.tokens_per_keyframe)
        keyframe_loss = self._head.loss(hidden, tokens).mean(-1)
        if keyframe_mask is None:
            return DeepLMOutput(keyframe_loss.mean(), keyframe_loss, hidden)
        keyframe_loss = torch.where(keyframe_mask, keyframe_loss, 0.0)
        return DeepLMOutput(keyframe_loss.sum() / keyframe_mask.sum().clamp(min=1), keyframe_loss, hidden)

    def generate(
        self,
        prompt_ids: TextIds,
        num_keyframes: int,
        *,
        prefix: DeepTokens | None = None,
        seed: int = 0,
        sample_indices: Sequence[int] | None = None,
        guidance: float = 1.0,
        variance_scale: float = 1.0,
        temperature: float = 1.0,
        null_ids: TextIds | None = None,
        use_cache: bool = True,
    ) -> Iterator[KeyFrameTokens]:
        """Write `num_keyframes` new key frames after the prompt and `prefix`, one at a time and only when asked for.

        The prefix is read, not yielded. To change the prompt on the way, call again with everything so far as the
        prefix. A sample depends on (seed, its entry of `sample_indices`, key frame index) only; the default indices
        are 0, 1, …. `guidance` 1 is the plain conditional; other values run the null prompt (default: all padding)
        beside it. `variance_scale` 0 writes each token's mean, without chance; `temperature` sharpens the choice
        between the mixture's components, down to 0, the likeliest. `use_cache=False` reads the whole sequence again for
        every token.

        Raises at the call, before anything is generated: `ValueError` when the key frames do not fit (see
        `DeepLMConfig.keyframe_limit`), when shapes do not match, or in training mode.
        """
        start = 0 if prefix is None else prefix.shape[1]
        if self.training:
            raise ValueError("generate() in training mode would drop out activations: call .eval() first")
        if num_keyframes < 1:
            raise ValueError(f"num_keyframes: expected at least 1, got {num_keyframes}")
        self._check(prompt_ids, prefix, start + num_keyframes)
        indices = range(len(prompt_ids)) if sample_indices is None else sample_indices
        if len(indices) != len(prompt_ids):
            raise ValueError(f"sample_indices: expected {len(prompt_ids)}, one a prompt, got {len(indices)}")
        if variance_scale < 0:
            raise ValueError(f"variance_scale: expected 0 or more, got {variance_scale}")
        if temperature < 0:
            raise ValueError(f"temperature: expected 0 or more, got {temperature}")
        if null_ids is None:
            null_ids = torch.full_like(prompt_ids, self.config.pad_id)
        if null_ids.shape != prompt_ids.shape:
            raise ValueError(f"null_ids: expected shape {tuple(prompt_ids.shape)}, got {tuple(null_ids.shape)}")
        repeats = 1 if guidance == 1.0 else 2
        return self._generate(
            prompt_ids if repeats == 1 else torch.cat([prompt_ids, null_ids]),
            range(start, start + num_keyframes),
            None if prefix is None else prefix.repeat(repeats, 1, 1, 1),
            seed,
            indices,
            guidance,
            variance_scale,
            temperature,
            self.backbone.new_cache() if use_cache else None,
        )

    @torch.no_grad()
    def _generate(
        self,
        text_ids: TextIds,
        keyframes: range,
        prefix: DeepTokens | None,
        seed: int,
        indices: Sequence[int],
        guidance: float,
        variance_scale: float,
        temperature: float,
        cache: Any,
    ) -> Iterator[KeyFrameTokens]:
        b, repeats = len(indices), len(text_ids) // len(indices)  # repeats: 2 where the null prompt runs beside
        begin = self._begin(len(text_ids))
        unread = self.backbone.embed_text(text_ids)
        if prefix is not None:
            unread = arrange(unread, begin, self.embedding(prefix))
        for keyframe in keyframes:
            generators = [generator_for(seed, "deep tokens", index, keyframe) for index in indices]
            unread = torch.cat([unread, begin], dim=1)
            tokens: list[Tensor] = []
            for place in range(self.config.tokens_per_keyframe):
                hidden = self.backbone(unread, cache)[:, -1]
                token = self._head.sample(
                    hidden[:b],
                    generators,
                    variance_scale=variance_scale,
                    temperature=temperature,
                    null_hidden=hidden[b:] if repeats == 2 else None,
                    guidance=guidance,
                )
                tokens.append(token)
                embedded = self.embedding(token[:, None, None].repeat(repeats, 1, 1, 1), keyframe, place)[:, 0]
                unread = embedded if cache is not None else torch.cat([unread, embedded.to(unread.dtype)], dim=1)
            yield torch.stack(tokens, dim=1)

    @property
    def _head(self) -> Head:
        return cast(Head, self.head)

    def _begin(self, batch: int) -> BeginHidden:
        device = self.embedding.keyframe.device
        return self.backbone.embed_text(torch.full((batch, 1), self.config.begin_id, device=device))

    def _check(self, text_ids: TextIds, tokens: DeepTokens | None, num_keyframes: int) -> None:
        config = self.config
        if text_ids.shape[1] != config.text_length:
            raise ValueError(f"text ids: expected {config.text_length} a text, got {text_ids.shape[1]}")
        expected = (len(text_ids), config.tokens_per_keyframe, config.token_width)
        if tokens is not None and (found := (len(tokens), *tokens.shape[2:])) != expected:
            raise ValueError(f"deep tokens: expected (b, n, d) = {expected}, got {found}")
        if num_keyframes > config.keyframe_limit:
            raise ValueError(
                f"{num_keyframes} key frames asked for, this model holds {config.keyframe_limit} "
                f"(max_keyframes {config.max_keyframes}, positions {config.positions}): ask for fewer"
            )

    def load_body(self, folder: Path) -> None:
        """Take the weights of a GPT-2 or Llama that `transformers` saved; text entries it lacks get its entries' mean.

        Raises `CheckpointError` that names every size in which it differs, and where tensors are missing or not ours.
        """
        body, what = self.backbone.body, {"local_files_only": True}
        try:
            theirs = AutoConfig.from_pretrained(folder, **what)
            if problems := body_differences(body.config, theirs, self.config.positions):
                raise CheckpointError(f"{folder} holds another network: {'; '.join(problems)}")
            held, report = type(body).from_pretrained(folder, use_safetensors=True, output_loading_info=True, **what)
        except (OSError, RuntimeError, ValueError) as error:
            raise error if isinstance(error, CheckpointError) else CheckpointError(f"{folder}: {error}") from error
        unused = report["unexpected_keys"] - {"lm_head.weight"}  # writes words, where ours writes deep tokens
        if problems := sorted(report["missing_keys"] | unused):
            raise CheckpointError(f"{folder}: tensors missing or unknown: {', '.join(problems[:8])}")
        entries = held.get_input_embeddings().weight.detach().float()
        further = entries.mean(0).expand(self.config.vocab_size - len(entries), -1)
        held.get_input_embeddings().weight = nn.Parameter(torch.cat([entries, further]))
        load_state(body, held.state_dict(), str(folder))

    def save_part(self, folder: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Write weights and text tokenizer into a checkpoint folder; returns this part's section of `config.json`."""
        if self.text is None:
            raise ValueError("a checkpoint needs the text tokenizer too: set DeepTokenLM.text before saving")
        save_weights(self, folder / WEIGHTS, dtype)
        self.text.save(folder)
        return config_to_dict(self.config)

    @classmethod
    def load_part(cls, folder: Path, section: dict[str, Any], dtype: torch.dtype | None = None) -> "DeepTokenLM":
        """Build the model of a section of `config.json`, fill it, strictly, from the folder; ready for use (eval)."""
        text = TextTokenizer.load(folder)
        config = config_from_dict(DeepLMConfig, section, SECTION)
        if (text.pad_id, text.begin_id) != (config.pad_id, config.begin_id) or text.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{folder}: text tokenizer (vocabulary {text.vocab_size}, pad {text.pad_id}, begin {text.begin_id}) "
                f"is not the model's ({config.vocab_size}, {config.pad_id}, {config.begin_id})"
            )
        with without_initialisation():
            model = cls(config, text)
        cast_parameters(model, dtype)
        load_weights(model, folder / WEIGHTS)
        return model.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write this part of a checkpoint folder, leaving other parts of its `config.json` as they are."""
        folder = Path(folder)
        others = read_config(folder) if (folder / "config.json").exists() else {}
        write_config(folder, {**others, SECTION: self.save_part(folder, dtype)})

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "DeepTokenLM":
        """The language model of what `DiCoDe.from_pretrained` takes, with parameters of `dtype` (default: float32)."""
        folder = resolve(name_or_folder, revision)
        config = read_config(folder)
        if SECTION not in config:
            raise CheckpointError(f"{folder}/config.json: no section {SECTION!r}; it has {sorted(config)}")
        return cls.load_part(folder, config[SECTION], dtype)


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


def _noised(tokens: DeepTokens, strength: float, generator: torch.Generator | None) -> DeepTokens:
    if strength == 0.0:
        return tokens
    device = tokens.device if generator is None else generator.device
    share = strength * torch.rand(len(tokens), 1, 1, 1, generator=generator, device=device).sqrt()
    noise = torch.randn(tokens.shape, generator=generator, device=device)
    share, noise = share.to(tokens), noise.to(tokens)
    return (1 - share) * tokens + share * noise
