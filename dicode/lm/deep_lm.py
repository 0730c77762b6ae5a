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

    loss: Float[Tensor, ""]  # mean over real key frames, float32
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
                f"{config.block_tokens} tokens after {config.text_length} text tokens"
            )
        if config.motion_tokens and config.order == "keyframe" and config.head.kind in ("mixture", "gaussian"):
            raise ValueError(  # the first block's motion is always 0: a variance without bound
                f"motion_tokens: in keyframe order expected a head 'flow' or 'regression', got {config.head.kind!r}"
            )
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
        number `first_keyframe` and following, in place and embedding.

        Of motion tokens the first key frame has none: zeros, without a loss in `token` order. There, `tokens` may lack
        any last ones of each block. A goal's are predicted, since the video ends with them.

        In training mode the input tokens (not the targets) are mixed with Gaussian noise (CAM, arXiv 2411.18447), whose
        share is drawn for each sample from 0 … `input_noise` with a density that rises linearly. `generator` draws it
        (default: torch's own). Raises `ValueError` for a goal that does not fit the model or the mask.
        """
        config, k = self.config, tokens.shape[1]
        has_motion = tokens.shape[2] > config.tokens_per_keyframe
        self._check(text_ids, tokens, first_keyframe + k, goal)
        least = config.nearest_goal + 1
        if goal and (k < least or (keyframe_mask is not None and not keyframe_mask[:, 1:].all())):
            raise ValueError(f"goal: expected {least} key frames or more, all of them real, got {k}")
        inputs = _noised(tokens, config.input_noise, generator) if self.training else tokens
        tokens, inputs = self._motionless(tokens, 0), self._motionless(inputs, 0)
        blocks = self.embedding(inputs, first_keyframe)
        if goal:
            last = self.embedding.of_goal(self._motionless(inputs, -1)[:, -1], first_keyframe + k - 1)
            blocks = torch.cat([blocks[:, :1], last, blocks[:, 1:]], dim=1)
            if not has_motion:
                blocks, tokens = blocks[:, :-1], tokens[:, :-1]
                keyframe_mask = None if keyframe_mask is None else keyframe_mask[:, :-1]
        hidden = self._hidden(text_ids, blocks, first_keyframe)
        if goal:  # of these two blocks one predicts the goal (token order), or what the other does better (keyframe)
            hidden = torch.cat([hidden[:, :1], hidden[:, 2:]], dim=1)
        groups = rearrange(hidden, "b k (g p) width -> b k g p width", p=self.tokens_per_step)
        targets = self._residuals(tokens)
        targets = rearrange(targets, "b k (g p) d -> b k g p d", p=self.tokens_per_step)
        losses = cast(Head, self.head).loss(groups, targets, generator)
        if has_motion and config.order == "token":
            weight = self._weights(losses.shape[1:], goal).to(losses)
            keyframe_loss = (losses * weight).sum(-1) / weight.sum(-1)
        else:
            keyframe_loss = losses.mean(-1)
        if keyframe_mask is None:
            return DeepLMOutput(keyframe_loss.mean(), keyframe_loss, hidden)
        keyframe_loss = torch.where(keyframe_mask, keyframe_loss, 0.0)
        return DeepLMOutput(keyframe_loss.sum() / keyframe_mask.sum().clamp(min=1), keyframe_loss, hidden)

    def _whole(self, tokens: Tensor) -> Tensor:
        """Blocks `… n d` of all tokens, zeros for motion tokens that they lack."""
        return nn.functional.pad(tokens, (0, 0, 0, self.config.block_tokens - tokens.shape[-2]))

    def _motionless(self, tokens: DeepTokens, keyframe: int) -> DeepTokens:
        """Zeros for the motion tokens of one key frame."""
        if tokens.shape[2] == self.config.tokens_per_keyframe:
            return tokens
        tokens = tokens.clone()
        tokens[:, keyframe, self.config.tokens_per_keyframe :] = 0
        return tokens

    def _weights(self, shape: torch.Size, goal: bool) -> Float[Tensor, "k n"]:
        """1 for tokens with a loss: all but the first key frame's motion, and what is given of a goal."""
        weight, own = torch.ones(shape), self.config.tokens_per_keyframe
        weight[0, own:] = 0
        if goal:
            weight[-1, :own] = 0
        return weight

    def _residuals(self, tokens: DeepTokens) -> DeepTokens:
        """Each key frame less a mean of the last and, by `residual_anchor`, the first one; the first is whole."""
        if self.config.residual_anchor is None:
            return tokens
        own = tokens[:, :, : self.config.tokens_per_keyframe]
        less = torch.lerp(own[:, :-1], own[:, :1], self.config.residual_anchor)
        own = torch.cat([own[:, :1], own[:, 1:] - less], dim=1)
        return torch.cat([own, tokens[:, :, own.shape[2] :]], dim=2)

    def _hidden(self, text_ids: TextIds, blocks: KeyFrameHidden, first_keyframe: int = 0) -> KeyFrameHidden:
        """The hidden states that predict each block, the first of which is that of key frame `first_keyframe`."""
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
        positions[length:] += first_keyframe * (sequence.shape[1] - length) // k
        if first_keyframe and mask is None:  # without one, GPT-2 takes a leap of positions for a new sequence's start
            mask = positions[:, None] >= positions
        hidden = self.backbone(sequence, mask=mask, positions=positions)[:, length:]
        hidden = rearrange(hidden, "b (k n) width -> b k n width", k=k)
        return hidden[:, :, :-1] if self.config.order == "token" else hidden

    def _attended(self, text_ids: TextIds) -> Bool[Tensor, "b length"] | None:
        """Which positions of texts are no padding, where that is masked."""
        return None if self.config.attend_padding else text_ids != self.config.pad_id

    @property
    def tokens_per_step(self) -> int:
        """Tokens that are predicted at once."""
        return self.config.block_tokens if self.config.order == "keyframe" else 1

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
        yielded as given, but for its motion tokens, and those before it lead there (needs `end_frame_conditioning`);
        "first" ends on key frame 0, a loop. `sampling.context_key_frames` limits the sequence, the key frame being
        generated included: beyond it text and the later half are computed anew as if the video began there, for any
        length. In `token` order no more motion tokens than `sampling.motion_tokens` are written; zeros follow.

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
        beside = target is not None and target.keyframe >= self.config.nearest_goal
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
        written = [] if prefix is None else [*self._whole(prefix).unbind(1)]
        keyframes = range(start, start + num_keyframes)
        return self._generate(prompt_ids, keyframes, written, target, seed, indices, sampling)

    def _goal(self, goal: KeyFrameTokens | Literal["first"], last: int, keyframe: int | None, batch: int) -> Goal:
        found = Goal(None if isinstance(goal, str) else goal, last if keyframe is None else keyframe)
        expected = (batch, self.config.block_tokens, self.config.token_width)
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
                    tokens = tokens[:, None, : self._length(sampling)]
                    tokens = tokens if number else self._motionless(tokens, 0)
                    self._append(sequence, self.embedding(self._repeated(tokens, sequence), number))
                    if number == 0:
                        self._append_goal(sequence, goal, first, sampling)
            given = goal.tokens if goal and keyframe == goal.keyframe else None
            clip_seed = seed_of_clip(seed, max(0, keyframe - 1))  # a clip needs its tail; the first one its head too
            generators = [generator_for(clip_seed, "deep tokens", index, keyframe) for index in indices]
            own = sampling if keyframe else first_sampling
            tokens = self._next_keyframe(sequence, written, generators, own, given)
            if goal and keyframe == 0:
                goal = goal if goal.tokens is not None else replace(goal, tokens=tokens)
                self._append_goal(sequence, goal, first, sampling)
            written.append(tokens)
            yield tokens

    def _length(self, sampling: SamplingConfig) -> int:
        """Tokens of a block of the sequence."""
        motion, most = self.config.motion_tokens, sampling.motion_tokens
        if most is None or self.config.order == "keyframe":
            return self.config.block_tokens
        return self.config.tokens_per_keyframe + min(motion, most)

    def _append_goal(self, sequence: CachedSequence, goal: Goal | None, first: int, sampling: SamplingConfig) -> None:
        """Append the goal's block, unless it is too near to be a condition."""
        if goal is None or goal.keyframe < first + self.config.nearest_goal:
            return
        assert goal.tokens is not None
        tokens = self._motionless(goal.tokens[:, None].to(self.embedding.keyframe.device), 0)[:, 0]
        tokens = self._repeated(tokens[:, : self._length(sampling)], sequence)
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
        given: KeyFrameTokens | None = None,
    ) -> KeyFrameTokens:
        """Draw the tokens `b n d` of the key frame after `written`, together or one by one, and append them.

        The key frame's own may be `given`; the first one has no motion.
        """
        b, drawn, config = len(generators), [], self.config
        own, length, device = config.tokens_per_keyframe, self._length(sampling), self.embedding.keyframe.device
        begin, end = 0 if given is None else own, length if written else own  # of what is drawn
        fixed = torch.zeros(b, length, config.token_width, device=device)
        if given is not None:
            fixed[:, :own] = given[:, :own]
        if config.order == "token":
            sequence.append(self._begin(sequence.batch))
        for place in range(0, length, self.tokens_per_step):
            here = slice(place, place + self.tokens_per_step)
            tokens = fixed[:, here]
            if begin < here.stop and place < end:
                hidden = sequence.last(self.tokens_per_step)
                null_hidden = None if sequence.batch == b else hidden[b:]
                tokens = cast(Head, self.head).sample(hidden[:b], generators, sampling, null_hidden)
                if written and config.residual_anchor is not None:
                    last, first = (written[i][:, here].to(tokens) for i in (-1, 0))
                    less = torch.lerp(last, first, config.residual_anchor)
                    less[:, max(0, own - place) :] = 0  # motion is whole
                    tokens = less + tokens
                if config.order == "keyframe":
                    tokens[:, :begin], tokens[:, end:] = fixed[:, :begin], fixed[:, end:]
            block = self.embedding(self._repeated(tokens[:, None], sequence), len(written), place)
            sequence.append(block[:, 0])
            drawn.append(tokens)
        return self._whole(torch.cat(drawn, dim=1))

    def _begin(self, batch: int) -> BeginHidden:
        device = self.embedding.keyframe.device
        return self.backbone.embed_text(torch.full((batch, 1), self.config.begin_id, device=device))

    def _check(self, text_ids: TextIds, tokens: DeepTokens | None, num_keyframes: int, goal: bool = False) -> None:
        config = self.config
        length = text_ids.shape[1]
        if length != config.text_length if config.attend_padding else not 0 < length <= config.text_length:
            raise ValueError(f"text ids: expected {config.text_length} a text, got {length}")
        expected = (len(text_ids), config.block_tokens, config.token_width)
        if tokens is not None and (found := (len(tokens), *tokens.shape[2:])) != expected:
            without = config.order == "token" and config.tokens_per_keyframe <= found[1] < expected[1]
            if not without or found[::2] != expected[::2]:
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


def _noised(tokens: DeepTokens, strength: float, generator: torch.Generator | None) -> DeepTokens:
    if strength == 0.0:
        return tokens
    device = tokens.device if generator is None else generator.device
    share = strength * torch.rand(len(tokens), 1, 1, 1, generator=generator, device=device).sqrt()
    noise = torch.randn(tokens.shape, generator=generator, device=device)
    share, noise = share.to(tokens), noise.to(tokens)
    return (1 - share) * tokens + share * noise
