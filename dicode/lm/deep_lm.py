"""The language model over deep tokens: from a prompt to key frames, one after the other (arXiv 2412.04446)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dicode.checkpoint import load_model, read_section, resolve
from dicode.checkpoint.saving import save_weights
from dicode.config import CheckpointError, check_ranges, config_to_dict
from dicode.lm.backbone import (
    Backbone,
    BeginHidden,
    CachedSequence,
    DeepTokenEmbedding,
    KeyFrameHidden,
    without_padding,
)
from dicode.lm.config import DeepLMConfig
from dicode.lm.heads import HEADS, Head
from dicode.lm.text import FILE, TextTokenizer
from dicode.seeds import SeedPlan, generator_for, seed_of_clip
from dicode.shapes import DeepTokens, KeyFrameMask, KeyFrameTokens, TextIds
from dicode.tokenizer.config import SamplingConfig

WEIGHTS = "lm.safetensors"
DEFAULT_SAMPLING = SamplingConfig()


@dataclass(frozen=True)
class DeepLMOutput:
    """A training step's loss and the values it is computed from."""

    loss: Float[Tensor, ""]  # mean over the tokens of real key frames, float32
    keyframe_loss: Float[Tensor, "b k"]  # mean over a key frame's tokens; 0 where the mask is False
    hidden: KeyFrameHidden  # the head's input for each deep token


@dataclass(frozen=True)
class Goal:
    """A key frame given beforehand that generation ends on."""

    tokens: KeyFrameTokens | None  # None: those of key frame 0, which is still to be generated
    keyframe: int


class DeepTokenLM(nn.Module):
    """A causal transformer that predicts the next deep token's distribution from the text and the tokens so far."""

    def __init__(self, config: DeepLMConfig, text: TextTokenizer | None = None) -> None:
        super().__init__()
        check_ranges(config)
        if config.keyframe_limit < 1:
            raise ValueError(
                f"{config.positions} positions and {config.max_keyframes} key frames hold no key frame of "
                f"{config.tokens_per_keyframe} tokens after {config.text_length} text tokens"
            )
        if config.residual_anchor and not config.predict_residual:
            raise ValueError("residual_anchor: sets what a residual is added to; set predict_residual as well")
        self.config, self.text = config, text
        self.backbone = Backbone(config)
        self.embedding = DeepTokenEmbedding(config)
        self.head: nn.Module = HEADS[config.head.kind](config)
        # normal of deviation 0.02 and zero biases, as published; the body initialises itself the same way
        head = [] if getattr(self.head, "initialises_itself", False) else self.head.modules()
        for module in (*self.embedding.modules(), *head):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for learned in (self.embedding.keyframe, self.embedding.place, self.embedding.goal):
            if learned is not None:
                nn.init.trunc_normal_(learned, std=0.02)

    def forward(
        self,
        text_ids: TextIds,
        tokens: DeepTokens,
        keyframe_mask: KeyFrameMask | None = None,
        generator: torch.Generator | None = None,
        goal: bool = False,
        first_keyframe: int = 0,
    ) -> DeepLMOutput:
        """The loss of every deep token given the text and all deep tokens before it.

        `keyframe_mask` is True where a key frame is real; padding comes after the last real one, where causality
        keeps it from every prediction. The first entry may be False too: that key frame is an input without a loss.
        With `goal` the last key frame is an input from the second one on, and has no loss of its own. Key frames are
        embedded as number `first_keyframe` and following.

        In training mode the input tokens (not the targets) are mixed with Gaussian noise (CAM, arXiv 2411.18447), whose
        share is drawn for each sample from 0 … `input_noise` with a density that rises linearly. `generator` draws it
        (default: torch's own). Raises `ValueError` for a goal that does not fit the model or the mask.
        """
        config, k = self.config, tokens.shape[1]
        self._check(text_ids, tokens, first_keyframe + k, goal)
        if goal and (k < 3 or (keyframe_mask is not None and not keyframe_mask[:, 1:].all())):
            raise ValueError(f"goal: expected 3 key frames or more, all of them real, got {k}")
        inputs = _noised(tokens, config.input_noise, generator) if self.training else tokens
        blocks = self.embedding(inputs, first_keyframe)
        if goal:
            last = self.embedding.of_goal(inputs[:, -1], first_keyframe + k - 1)
            blocks = torch.cat([blocks[:, :1], last, blocks[:, 1:-1]], dim=1)
            tokens = tokens[:, :-1]
            keyframe_mask = None if keyframe_mask is None else keyframe_mask[:, :-1]
        hidden = self._hidden(text_ids, blocks)
        if goal:  # of these two blocks one predicts the goal (token order), or what the other does better (keyframe)
            hidden = torch.cat([hidden[:, :1], hidden[:, 2:]], dim=1)
        groups = rearrange(hidden, "b k (g p) width -> b k g p width", p=self.tokens_per_step)
        targets = _residuals(tokens, config.residual_anchor) if config.predict_residual else tokens
        targets = rearrange(targets, "b k (g p) d -> b k g p d", p=self.tokens_per_step)
        keyframe_loss = cast(Head, self.head).loss(groups, targets, generator).mean(-1)
        if keyframe_mask is None:
            return DeepLMOutput(keyframe_loss.mean(), keyframe_loss, hidden)
        keyframe_loss = torch.where(keyframe_mask, keyframe_loss, 0.0)
        return DeepLMOutput(keyframe_loss.sum() / keyframe_mask.sum().clamp(min=1), keyframe_loss, hidden)

    def _hidden(self, text_ids: TextIds, blocks: KeyFrameHidden) -> KeyFrameHidden:
        """The hidden states that predict each block."""
        text, begin = self.backbone.embed_text(text_ids), self._begin(len(text_ids))
        length, k, mask = text.shape[1], blocks.shape[1], None
        if self.config.order == "token":
            begins = begin.unsqueeze(1).expand(-1, k, -1, -1)
            blocks = torch.cat([begins, blocks.to(begins.dtype)], dim=2)
        else:
            blocks = torch.cat([self.embedding.start(begin), blocks[:, :-1]], dim=1)
            number = torch.arange(k, device=text.device).repeat_interleave(blocks.shape[2]) + length
            group = torch.cat([torch.arange(length, device=text.device), number])
            mask = group[:, None] >= group  # text is causal, a block is not
        sequence = torch.cat([text, rearrange(blocks.to(text.dtype), "b k n width -> b (k n) width")], dim=1)
        positions = torch.arange(sequence.shape[1], device=text.device)
        if (attended := self._attended(text_ids)) is not None:
            mask = without_padding(mask, attended, len(positions), len(positions))
            positions[length:] += self.config.text_length - length
        hidden = self.backbone(sequence, mask=mask, positions=positions)[:, length:]
        hidden = rearrange(hidden, "b (k n) width -> b k n width", k=k)
        return hidden[:, :, :-1] if self.config.order == "token" else hidden

    def _attended(self, text_ids: TextIds) -> Bool[Tensor, "b length"] | None:
        """Which positions of texts are no padding, where that is masked."""
        return None if self.config.attend_padding else text_ids != self.config.pad_id

    @property
    def tokens_per_step(self) -> int:
        """Tokens that are predicted at once."""
        return self.config.tokens_per_keyframe if self.config.order == "keyframe" else 1

    def generate(
        self,
        prompt_ids: TextIds,
        num_keyframes: int,
        *,
        prefix: DeepTokens | None = None,
        goal: KeyFrameTokens | Literal["first"] | None = None,
        goal_keyframe: int | None = None,
        seed: int | SeedPlan = 0,
        sample_indices: Sequence[int] | None = None,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
    ) -> Iterator[KeyFrameTokens]:
        """Yield `num_keyframes` new key frames after the prompt and `prefix`, each generated only when asked for.

        To change the prompt on the way, call again with everything so far as the prefix. A sample depends on (seed, its
        entry of `sample_indices`, key frame index) only; the default indices are 0, 1, ….

        `goal` is the key frame that the video ends on: key frame `goal_keyframe` (default: the last one asked for) is
        yielded as given, and those before it lead there (needs `end_frame_conditioning`); "first" ends on key frame 0,
        a loop. `sampling.context_key_frames` limits the sequence, the key frame being generated included: beyond it
        text and the later half are computed anew as if the video began there, for any length.

        Raises at the call, before anything is generated: `ValueError` when the key frames do not fit (see
        `DeepLMConfig.keyframe_limit`), when shapes do not match, or in training mode.
        """
        if self.training:
            raise ValueError("generate() in training mode would drop out activations: call .eval() first")
        if num_keyframes < 1:
            raise ValueError(f"num_keyframes: expected at least 1, got {num_keyframes}")
        start = 0 if prefix is None else prefix.shape[1]
        last, window = start + num_keyframes - 1, sampling.context_key_frames
        target = None if goal is None else self._goal(goal, last, goal_keyframe, len(prompt_ids))
        beside = target is not None and target.keyframe > 1  # else nothing lies between the first key frame and it
        most = self.config.most_keyframes(beside)
        if window and not 2 <= window <= most:
            raise ValueError(f"context_key_frames: expected 2 to {most}, or 0, got {window}")
        self._check(prompt_ids, prefix, min(last + 1, window) if window else last + 1, beside)
        indices = range(len(prompt_ids)) if sample_indices is None else sample_indices
        if len(indices) != len(prompt_ids):
            raise ValueError(f"sample_indices: expected {len(prompt_ids)}, one a prompt, got {len(indices)}")
        missing = self.config.text_length - prompt_ids.shape[1]  # where padding was left out
        prompt_ids = nn.functional.pad(prompt_ids, (0, missing), value=self.config.pad_id)
        if sampling.guidance != 1.0:
            prompt_ids = torch.cat([prompt_ids, torch.full_like(prompt_ids, self.config.pad_id)])
        written = [] if prefix is None else list(prefix.unbind(1))
        keyframes = range(start, start + num_keyframes)
        return self._generate(prompt_ids, keyframes, written, target, seed, indices, sampling)

    def _goal(self, goal: KeyFrameTokens | Literal["first"], last: int, keyframe: int | None, batch: int) -> Goal:
        found = Goal(None if isinstance(goal, str) else goal, last if keyframe is None else keyframe)
        expected = (batch, self.config.tokens_per_keyframe, self.config.token_width)
        if found.tokens is not None and tuple(found.tokens.shape) != expected:
            raise ValueError(f"goal: expected shape (b, n, d) = {expected}, got {tuple(found.tokens.shape)}")
        if found.keyframe < max(1, last):
            raise ValueError(f"goal_keyframe: expected {max(1, last)} or later, got {found.keyframe}")
        return found

    @torch.no_grad()
    def _generate(
        self,
        text_ids: TextIds,
        keyframes: range,
        written: list[Tensor],
        goal: Goal | None,
        seed: int | SeedPlan,
        indices: Sequence[int],
        sampling: SamplingConfig,
    ) -> Iterator[KeyFrameTokens]:
        # `written` are the key frames of the transformer's sequence, the first of them being number `first`
        sequence: CachedSequence | None = None
        first, scale = 0, sampling.first_variance_scale
        first_sampling = sampling if scale is None else replace(sampling, variance_scale=scale)
        if goal and goal.tokens is None and written:
            goal = replace(goal, tokens=written[0])
        for keyframe in keyframes:
            start = _window_start(keyframe, sampling.context_key_frames)
            if sequence is None or start > first:
                written, first = written[start - first :], start
                text = self.backbone.embed_text(text_ids)
                sequence = CachedSequence(self.backbone, text, self.config.order, self._attended(text_ids))
                if self.config.order == "keyframe":
                    sequence.append(self.embedding.start(self._begin(len(text_ids)))[:, 0])
                for number, tokens in enumerate(written):
                    self._append(sequence, self.embedding(self._repeated(tokens[:, None], sequence), number))
                    if number == 0:
                        self._append_goal(sequence, goal, first)
            if goal and keyframe == goal.keyframe:
                assert goal.tokens is not None, "key frame 0 comes before the goal"
                yield goal.tokens.to(self.embedding.keyframe.device)
                return
            clip_seed = seed_of_clip(seed, max(0, keyframe - 1))  # a clip needs its tail; the first one its head too
            generators = [generator_for(clip_seed, "deep tokens", index, keyframe) for index in indices]
            tokens = self._next_keyframe(sequence, written, generators, sampling if keyframe else first_sampling)
            if goal and keyframe == 0:
                goal = goal if goal.tokens is not None else replace(goal, tokens=tokens)
                self._append_goal(sequence, goal, first)
            written.append(tokens)
            yield tokens

    def _append_goal(self, sequence: CachedSequence, goal: Goal | None, first: int) -> None:
        """Append the goal's block, unless it is the very next key frame."""
        if goal is None or goal.keyframe <= first + 1:
            return
        assert goal.tokens is not None
        tokens = self._repeated(goal.tokens.to(self.embedding.keyframe.device), sequence)
        self._append(sequence, self.embedding.of_goal(tokens, goal.keyframe - first))

    def _append(self, sequence: CachedSequence, block: KeyFrameHidden) -> None:
        if self.config.order == "token":
            sequence.append(self._begin(sequence.batch))
        sequence.append(block[:, 0])

    def _repeated(self, tokens: Tensor, sequence: CachedSequence) -> Tensor:
        """Twice the batch where the null prompt runs beside."""
        return tokens.repeat(sequence.batch // len(tokens), *[1] * (tokens.ndim - 1))

    def _next_keyframe(
        self,
        sequence: CachedSequence,
        written: Sequence[Tensor],
        generators: Sequence[torch.Generator],
        sampling: SamplingConfig,
    ) -> KeyFrameTokens:
        """Draw the tokens `b n d` of the key frame after `written`, together or one by one, and append them."""
        b, drawn = len(generators), []
        if self.config.order == "token":
            sequence.append(self._begin(sequence.batch))
        for place in range(0, self.config.tokens_per_keyframe, self.tokens_per_step):
            hidden = sequence.last(self.tokens_per_step)
            null_hidden = None if sequence.batch == b else hidden[b:]
            tokens = cast(Head, self.head).sample(hidden[:b], generators, sampling, null_hidden)
            if written and self.config.predict_residual:
                last, first = (written[i][:, place : place + self.tokens_per_step].to(tokens) for i in (-1, 0))
                tokens = torch.lerp(last, first, self.config.residual_anchor) + tokens
            block = self.embedding(self._repeated(tokens[:, None], sequence), len(written), place)
            sequence.append(block[:, 0])
            drawn.append(tokens)
        return torch.cat(drawn, dim=1)

    def _begin(self, batch: int) -> BeginHidden:
        device = self.embedding.keyframe.device
        return self.backbone.embed_text(torch.full((batch, 1), self.config.begin_id, device=device))

    def _check(self, text_ids: TextIds, tokens: DeepTokens | None, num_keyframes: int, goal: bool = False) -> None:
        config = self.config
        length = text_ids.shape[1]
        if length != config.text_length if config.attend_padding else not 0 < length <= config.text_length:
            raise ValueError(f"text ids: expected {config.text_length} a text, got {length}")
        expected = (len(text_ids), config.tokens_per_keyframe, config.token_width)
        if tokens is not None and (found := (len(tokens), *tokens.shape[2:])) != expected:
            raise ValueError(f"deep tokens: expected (b, n, d) = {expected}, got {found}")
        if goal and not config.end_frame_conditioning:
            raise ValueError("goal: expected a model trained with `end_frame_conditioning`; leave the end frame out")
        if num_keyframes > config.most_keyframes(goal):
            raise ValueError(
                f"{num_keyframes} key frames asked for, this model holds {config.most_keyframes(goal)} "
                f"(max_keyframes {config.max_keyframes}, positions {config.positions}): ask for fewer, or set "
                "context_key_frames"
            )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Write weights and text tokenizer into a checkpoint folder; returns what belongs under "lm" in its config."""
        if self.text is None:
            raise ValueError("a checkpoint needs the text tokenizer too: set DeepTokenLM.text before saving")
        folder = Path(folder)
        self.text.save(folder)
        save_weights(self, folder / WEIGHTS, dtype, beside=folder / FILE)
        return config_to_dict(self.config)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "DeepTokenLM":
        """Load the language model of what `DiCoDe.from_pretrained` takes: strict, in eval mode, as `dtype`."""
        folder = resolve(name_or_folder, revision)
        config, text = read_section(folder, "lm", DeepLMConfig), TextTokenizer.load(folder)
        if (text.pad_id, text.begin_id) != (config.pad_id, config.begin_id) or text.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{folder}: text tokenizer (vocabulary {text.vocab_size}, pad {text.pad_id}, begin {text.begin_id}) "
                f"is not the model's ({config.vocab_size}, {config.pad_id}, {config.begin_id})"
            )
        return load_model(folder, lambda: cls(config, text), lambda model: {WEIGHTS: model}, dtype)


def _window_start(keyframe: int, context_key_frames: int) -> int:
    """The first key frame of the sequence that this one is generated from. Only these two decide: prefixes do not."""
    if context_key_frames == 0 or keyframe < context_key_frames:
        return 0
    jump = max(1, context_key_frames // 2)
    return -(-(keyframe + 1 - context_key_frames) // jump) * jump


def _residuals(tokens: DeepTokens, anchor: float) -> DeepTokens:
    """Each key frame less a mean of the last and, by `anchor`, the first one; the first is whole."""
    return torch.cat([tokens[:, :1], tokens[:, 1:] - torch.lerp(tokens[:, :-1], tokens[:, :1], anchor)], dim=1)


def _noised(tokens: DeepTokens, strength: float, generator: torch.Generator | None) -> DeepTokens:
    if strength == 0.0:
        return tokens
    device = tokens.device if generator is None else generator.device
    share = strength * torch.rand(len(tokens), 1, 1, 1, generator=generator, device=device).sqrt()
    noise = torch.randn(tokens.shape, generator=generator, device=device)
    share, noise = share.to(tokens), noise.to(tokens)
    return (1 - share) * tokens + share * noise
