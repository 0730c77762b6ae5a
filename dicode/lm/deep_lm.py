"""The language model over deep tokens: reads a prompt, writes key frames one after the other (arXiv 2412.04446)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig

from dicode.checkpoint import load_model, load_state, read_config, read_section, resolve, save_weights, write_config
from dicode.config import CheckpointError, config_to_dict
from dicode.lm.backbone import Backbone, Reading, body_differences
from dicode.lm.flow_head import FlowHead
from dicode.lm.heads import Head, MixtureHead, RegressionHead, TokenSampling
from dicode.lm.presets import DeepLMConfig
from dicode.lm.sequence import BeginHidden, DeepTokenEmbedding, KeyFrameHidden, appended, arrange, predicting, sees
from dicode.lm.text import FILE, TextTokenizer
from dicode.seeds import SeedPlan, generator_for, seed_of_clip
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
        for name in ("input_noise", "residual_anchor"):
            if not 0 <= getattr(config, name) <= 1:
                raise ValueError(f"{name}: expected a share, 0 to 1, got {getattr(config, name)}")
        if config.residual_anchor and not config.predict_residual:
            raise ValueError("residual_anchor: says what a change is counted from; set predict_residual as well")
        self.config, self.text = config, text
        self.backbone = Backbone(config)
        self.embedding = DeepTokenEmbedding(
            config.token_width,
            config.width,
            config.max_keyframes,
            config.tokens_per_keyframe,
            config.end_frame_conditioning,
        )
        self.head: nn.Module = _build_head(config)
        self._initialise()

    def _initialise(self) -> None:
        """Normal of deviation 0.02 and zero biases, as published; the body initialises itself the same way."""
        head = [] if isinstance(self.head, FlowHead) else self.head.modules()  # a flow's is in place already
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
        read: DeepTokens | None = None,
    ) -> DeepLMOutput:
        """The loss of every deep token given the text and all deep tokens before it.

        `keyframe_mask` is True where a key frame is real; padding comes after the last real one, where causality
        keeps it from every prediction. The first one may be False too, where it is only to be read. With `goal` the
        last key frame is known from the second on, and has no loss of its own. In training mode the tokens read (not
        the targets) are mixed with Gaussian noise (CAM, arXiv 2411.18447), whose share is drawn for each sample from
        0 … `input_noise` with a density that rises linearly: what it reads is seldom exact, as in use, and where little
        of it is left the caption must say the rest.
        `generator` draws it (default: torch's own).

        `read` is what the model goes on from where that is not the truth: key frames with errors, of the shape of
        `tokens`, are read as they are, without noise, and changes counted from them, so that a change mends what is
        wrong with the one before.

        Raises `ValueError` for a goal that the model cannot read, or that is not there or not ahead, and for `read` of
        another shape.
        """
        config, k = self.config, tokens.shape[1]
        self._check(text_ids, tokens, k, goal)
        if goal and (k < 3 or (keyframe_mask is not None and not keyframe_mask[:, 1:].all())):
            raise ValueError(f"goal: expected 3 key frames or more, all of them real, got {k}")
        start = tokens if read is None else read
        if start.shape != tokens.shape:
            raise ValueError(f"read: expected {tuple(tokens.shape)}, as tokens, got {tuple(start.shape)}")
        seen = _noised(tokens, config.input_noise, generator) if self.training and read is None else start
        blocks = self.embedding(seen)
        if goal:
            known = self.embedding.of_goal(seen[:, -1], k - 1)
            blocks = torch.cat([blocks[:, :1], known, blocks[:, 1:-1]], dim=1)
            tokens, start = tokens[:, :-1], start[:, :-1]
            keyframe_mask = None if keyframe_mask is None else keyframe_mask[:, :-1]
        hidden = self._hidden(text_ids, blocks)
        if goal:  # of these two blocks one predicts the goal (token order), or what the other does better (keyframe)
            hidden = torch.cat([hidden[:, :1], hidden[:, 2:]], dim=1)
        groups = rearrange(hidden, "b k (g p) width -> b k g p width", p=self.tokens_per_step)
        written = _changes(tokens, start, config.residual_anchor) if config.predict_residual else tokens
        targets = rearrange(written, "b k (g p) d -> b k g p d", p=self.tokens_per_step)
        keyframe_loss = self._head.loss(groups, targets, generator).mean(-1)
        if keyframe_mask is None:
            return DeepLMOutput(keyframe_loss.mean(), keyframe_loss, hidden)
        keyframe_loss = torch.where(keyframe_mask, keyframe_loss, 0.0)
        return DeepLMOutput(keyframe_loss.sum() / keyframe_mask.sum().clamp(min=1), keyframe_loss, hidden)

    def _hidden(self, text_ids: TextIds, blocks: KeyFrameHidden) -> KeyFrameHidden:
        """The hidden states that predict each block."""
        text, begin = self.backbone.embed_text(text_ids), self._begin(len(text_ids))
        length, n = self.config.text_length, self.config.tokens_per_keyframe
        if self.config.order == "token":
            return predicting(self.backbone(arrange(text, begin, blocks)), length, n)
        sequence = appended(text, torch.cat([self.embedding.start(begin), blocks[:, :-1]], dim=1))
        hidden = self.backbone(sequence, mask=sees(length, blocks.shape[1], n, sequence.device))
        return rearrange(hidden[:, length:], "b (k n) width -> b k n width", n=n)

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
        guidance: float = 1.0,
        variance_scale: float = 1.0,
        first_variance_scale: float | None = None,
        temperature: float = 1.0,
        flow_steps: int = 8,
        context_key_frames: int = 0,
        null_ids: TextIds | None = None,
        use_cache: bool = True,
    ) -> Iterator[KeyFrameTokens]:
        """Write `num_keyframes` new key frames after the prompt and `prefix`, one at a time and only when asked for.

        The prefix is read, not yielded. To change the prompt on the way, call again with everything so far as the
        prefix. A sample depends on (seed, its entry of `sample_indices`, key frame index) only; the default indices
        are 0, 1, …. `guidance` 1 is the plain conditional; other values run the null prompt (default: all padding)
        beside it. `variance_scale`, `temperature` and `flow_steps`: see `TokenSampling`. `first_variance_scale` is for
        key frame 0 (default: as for all), to draw surely what is asked for and yet leave to chance what happens.

        `goal` is what the video comes to: key frame `goal_keyframe` (default: the last one asked for) is yielded as
        given, and those before it lead there (needs `end_frame_conditioning`); "first": back to key frame 0, a loop.
        `context_key_frames`: how many key frames the sequence holds at most, with the one written: beyond it text and
        the later half are read anew as if the video began there, for any length; 0 keeps all. `use_cache=False` reads
        the whole sequence again for every token.

        Raises at the call, before anything is generated: `ValueError` when the key frames do not fit (see
        `DeepLMConfig.keyframe_limit`), when shapes do not match, or in training mode.
        """
        start = 0 if prefix is None else prefix.shape[1]
        if self.training:
            raise ValueError("generate() in training mode would drop out activations: call .eval() first")
        if num_keyframes < 1:
            raise ValueError(f"num_keyframes: expected at least 1, got {num_keyframes}")
        last = start + num_keyframes - 1
        aim = None
        if goal is not None:
            aim = _Goal(None if isinstance(goal, str) else goal, last if goal_keyframe is None else goal_keyframe)
            expected = (len(prompt_ids), self.config.tokens_per_keyframe, self.config.token_width)
            if aim.tokens is not None and tuple(aim.tokens.shape) != expected:
                raise ValueError(f"goal: expected shape (b, n, d) = {expected}, got {tuple(aim.tokens.shape)}")
            if aim.keyframe < max(1, last):
                raise ValueError(f"goal_keyframe: expected {max(1, last)} or later, got {aim.keyframe}")
        leads = aim is not None and aim.keyframe > 1  # else nothing is written between the first key frame and it
        if context_key_frames and not 2 <= context_key_frames <= self.config.most_keyframes(leads):
            raise ValueError(
                f"context_key_frames: expected 2 to {self.config.most_keyframes(leads)}, or 0, got {context_key_frames}"
            )
        self._check(prompt_ids, prefix, min(last + 1, context_key_frames) if context_key_frames else last + 1, leads)
        indices = range(len(prompt_ids)) if sample_indices is None else sample_indices
        if len(indices) != len(prompt_ids):
            raise ValueError(f"sample_indices: expected {len(prompt_ids)}, one a prompt, got {len(indices)}")
        if null_ids is None:
            null_ids = torch.full_like(prompt_ids, self.config.pad_id)
        if null_ids.shape != prompt_ids.shape:
            raise ValueError(f"null_ids: expected shape {tuple(prompt_ids.shape)}, got {tuple(null_ids.shape)}")
        sampling = TokenSampling(guidance, variance_scale, temperature, flow_steps)
        first_scale = variance_scale if first_variance_scale is None else first_variance_scale
        return self._generate(
            prompt_ids if guidance == 1.0 else torch.cat([prompt_ids, null_ids]),
            range(start, start + num_keyframes),
            [] if prefix is None else list(prefix.unbind(1)),
            aim,
            seed,
            indices,
            sampling,
            replace(sampling, variance_scale=first_scale),
            context_key_frames,
            use_cache,
        )

    @torch.no_grad()
    def _generate(
        self,
        text_ids: TextIds,
        keyframes: range,
        written: list[Tensor],
        goal: "_Goal | None",
        seed: int | SeedPlan,
        indices: Sequence[int],
        sampling: TokenSampling,
        first_sampling: TokenSampling,
        context_key_frames: int,
        use_cache: bool,
    ) -> Iterator[KeyFrameTokens]:
        # `written` are the key frames that the transformer reads, the first of them being number `first`
        reading: Reading | None = None
        first = 0
        if goal and goal.tokens is None and written:
            goal = _Goal(written[0], goal.keyframe)
        for keyframe in keyframes:
            start = _window_start(keyframe, context_key_frames)
            if reading is None or start > first:
                written, first = written[start - first :], start
                reading = self._begin_reading(text_ids, use_cache)
                for number, tokens in enumerate(written):
                    self._read(reading, tokens, number)
                    if number == 0 and goal and goal.keyframe > first + 1:
                        self._read_goal(reading, goal, first)
            if goal and keyframe == goal.keyframe:
                assert goal.tokens is not None, "key frame 0 is written before the goal is reached"
                yield goal.tokens.to(self.embedding.keyframe.device)
                return
            clip_seed = seed_of_clip(seed, max(0, keyframe - 1))  # a clip needs its tail; the first one its head too
            generators = [generator_for(clip_seed, "deep tokens", index, keyframe) for index in indices]
            tokens = self._write(reading, written, generators, sampling if keyframe else first_sampling)
            if goal and keyframe == first:
                goal = goal if goal.tokens is not None else _Goal(tokens, goal.keyframe)
                if goal.keyframe > first + 1:
                    self._read_goal(reading, goal, first)
            written.append(tokens)
            yield tokens

    def _begin_reading(self, text_ids: TextIds, use_cache: bool) -> Reading:
        blockwise = self.config.order == "keyframe"
        reading = Reading(self.backbone, self.backbone.embed_text(text_ids), use_cache, blockwise)
        if blockwise:
            reading.add(self.embedding.start(self._begin(len(text_ids)))[:, 0])
        return reading

    def _read(self, reading: Reading, tokens: KeyFrameTokens, number: int) -> None:
        """Let the transformer read a key frame's tokens `b n d`, its `number` counted from the first that is read."""
        repeats = reading.batch // len(tokens)  # 2 where the null prompt runs beside
        self._read_block(reading, self.embedding(tokens[:, None].repeat(repeats, 1, 1, 1), number))

    def _read_goal(self, reading: Reading, goal: "_Goal", first: int) -> None:
        assert goal.tokens is not None
        tokens = goal.tokens.to(self.embedding.keyframe.device)
        repeats = reading.batch // len(tokens)
        self._read_block(reading, self.embedding.of_goal(tokens.repeat(repeats, 1, 1), goal.keyframe - first))

    def _read_block(self, reading: Reading, block: KeyFrameHidden) -> None:
        if self.config.order == "token":
            reading.add(self._begin(reading.batch))
        reading.add(block[:, 0])

    def _write(
        self,
        reading: Reading,
        written: Sequence[Tensor],
        generators: Sequence[torch.Generator],
        sampling: TokenSampling,
    ) -> KeyFrameTokens:
        """Draw the tokens `b n d` of the key frame after `written`, together or one after the other, and read them."""
        b, tokens = len(generators), torch.empty(0)
        adds = bool(written) and self.config.predict_residual
        if self.config.order == "token":
            reading.add(self._begin(reading.batch))
        for place in range(0, self.config.tokens_per_keyframe, self.tokens_per_step):
            hidden = reading.last(self.tokens_per_step)
            null_hidden = None if reading.batch == b else hidden[b:]
            drawn = self._head.sample(hidden[:b], generators, sampling, null_hidden)
            if adds:
                last, first = (written[i][:, place : place + self.tokens_per_step].to(drawn) for i in (-1, 0))
                drawn = torch.lerp(last, first, self.config.residual_anchor) + drawn
            block = drawn[:, None].repeat(reading.batch // b, 1, 1, 1)
            reading.add(self.embedding(block, len(written), place)[:, 0])
            tokens = drawn if place == 0 else torch.cat([tokens, drawn], dim=1)
        return tokens

    @property
    def _head(self) -> Head:
        return cast(Head, self.head)

    def _begin(self, batch: int) -> BeginHidden:
        device = self.embedding.keyframe.device
        return self.backbone.embed_text(torch.full((batch, 1), self.config.begin_id, device=device))

    def _check(self, text_ids: TextIds, tokens: DeepTokens | None, num_keyframes: int, goal: bool = False) -> None:
        config = self.config
        if text_ids.shape[1] != config.text_length:
            raise ValueError(f"text ids: expected {config.text_length} a text, got {text_ids.shape[1]}")
        expected = (len(text_ids), config.tokens_per_keyframe, config.token_width)
        if tokens is not None and (found := (len(tokens), *tokens.shape[2:])) != expected:
            raise ValueError(f"deep tokens: expected (b, n, d) = {expected}, got {found}")
        if goal and not config.end_frame_conditioning:
            raise ValueError(
                "goal: this model was trained without one (`end_frame_conditioning`), and cannot end where it is told"
            )
        if num_keyframes > config.most_keyframes(goal):
            raise ValueError(
                f"{num_keyframes} key frames asked for, this model holds {config.most_keyframes(goal)} "
                f"(max_keyframes {config.max_keyframes}, positions {config.positions}): ask for fewer, or name a window"
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
        self.text.save(folder)
        save_weights(self, folder / WEIGHTS, dtype, beside=folder / FILE)
        return config_to_dict(self.config)

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
        config, text = read_section(folder, SECTION, DeepLMConfig), TextTokenizer.load(folder)
        if (text.pad_id, text.begin_id) != (config.pad_id, config.begin_id) or text.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{folder}: text tokenizer (vocabulary {text.vocab_size}, pad {text.pad_id}, begin {text.begin_id}) "
                f"is not the model's ({config.vocab_size}, {config.pad_id}, {config.begin_id})"
            )
        return load_model(folder, lambda: cls(config, text), lambda model: {WEIGHTS: model}, dtype)


@dataclass(frozen=True)
class _Goal:
    tokens: KeyFrameTokens | None  # None: those of key frame 0, not yet written
    keyframe: int


def _build_head(config: DeepLMConfig) -> nn.Module:
    width, d = config.width, config.token_width
    if config.head == "regression":
        return RegressionHead(width, d)
    if config.head == "flow":
        places = config.tokens_per_keyframe if config.order == "keyframe" else 1
        return FlowHead(width, d, places, config.flow_width, config.flow_depth)
    return MixtureHead(width, d, config.components if config.head == "mixture" else 1, config.token_variance)


def _window_start(keyframe: int, context_key_frames: int) -> int:
    """The first key frame that is read when this one is written. Only these two decide, so prefixes change nothing."""
    if context_key_frames == 0 or keyframe < context_key_frames:
        return 0
    jump = max(1, context_key_frames // 2)
    return -(-(keyframe + 1 - context_key_frames) // jump) * jump


def _changes(tokens: DeepTokens, read: DeepTokens, first_share: float) -> DeepTokens:
    """What each key frame adds to a mean of the last and, by `first_share`, the first one read; the first is whole."""
    return torch.cat([tokens[:, :1], tokens[:, 1:] - torch.lerp(read[:, :-1], read[:, :1], first_share)], dim=1)


def _noised(tokens: DeepTokens, strength: float, generator: torch.Generator | None) -> DeepTokens:
    if strength == 0.0:
        return tokens
    device = tokens.device if generator is None else generator.device
    share = strength * torch.rand(len(tokens), 1, 1, 1, generator=generator, device=device).sqrt()
    noise = torch.randn(tokens.shape, generator=generator, device=device)
    share, noise = share.to(tokens), noise.to(tokens)
    return (1 - share) * tokens + share * noise
