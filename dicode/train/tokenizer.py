"""Stage 1: the denoiser, with the published arrangement the resampler too, on clips of cached first-stage latents.

An image encoder that reads pixels gets them from the cached frames. Clips of archives, and those of a first stage that
codes clips as one, are encoded as they are trained on.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import starmap
from pathlib import Path
from statistics import median

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dicode.checkpoint.saving import write_config
from dicode.data.archive_index import ArchivedVideos, is_archive_index
from dicode.data.cache import FrameCache
from dicode.data.columns import CachedVideo, Videos
from dicode.device import autocast, pick_device
from dicode.seeds import generator_for
from dicode.tokenizer.config import SamplingConfig
from dicode.tokenizer.denoiser import ClipConditioning, ResidualDenoiser, cross_faded, noised, sample
from dicode.tokenizer.motion import limited
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.begin import check_places, load_first_stage, start_from, take_denoiser
from dicode.train.cached import at_once, first_stage_latents, frames_to_pixels, splits, trained_part
from dicode.train.flow_map import drawn_times, flow_map_loss, fused
from dicode.train.lora import add_adapters, merged, train_whole
from dicode.train.places import ClipPlaces
from dicode.train.runs import VALIDATION_CLIPS, TokenizerRun
from dicode.train.streamed import StreamedClips, check_buckets

DROP_CONTEXT = 0.5  # probability of a clip without context, as the first of a video has none
MEASURED_CLIPS = 512  # from which a residual denoiser's deviation is fitted
FEW, MANY = 2, 16  # jumps that are compared in validation
WHOLE_MOTION = 0.5  # probability of a clip with all its motion tokens; others get any number of the first ones


def check(run: TokenizerRun) -> None:
    """Raise `ValueError` where a run asks for what its model lacks."""
    if run.frame_strides is not None:
        least, most = run.frame_strides
        if run.model.denoiser.kind != "unet3d" or not 1 <= least <= most:
            found = f"{run.frame_strides} for {run.model.denoiser.kind!r}"
            raise ValueError(f"frame_strides: expected two numbers from 1 on, for a denoiser 'unet3d', got {found}")
    if run.loop.compile:
        raise ValueError("loop.compile: compiled denoisers give NaN (docs/log.md); it is for language models alone")
    if run.trains == "motion" and (run.lora.rank or not run.model.expects_motion):
        raise ValueError("trains: 'motion' needs model.motion, no resampler, and no adapters")
    if run.trains == "code" and (run.lora.rank or run.model.code is None):
        raise ValueError("trains: 'code' needs model.code, and no adapters")
    check_buckets(run)


def freeze(module: VideoTokenizer, run: TokenizerRun) -> None:
    """Leave gradients to what a run trains; under adapters to nothing else."""
    if run.lora.rank or run.trains != "all":
        module.requires_grad_(False)
    if run.trains == "denoiser" and not run.lora.rank:
        module.denoiser.requires_grad_(True)
    if run.trains == "code":
        module.code.requires_grad_(True)
    if run.trains == "motion":
        module.motion_encoder.requires_grad_(True)
        module.motion_decoder.requires_grad_(True)


class TokenizerTraining:
    """The `Stage` of a `TokenizerRun`."""

    def __init__(self, run: TokenizerRun):
        check(run)
        self.run, self.places = run, ClipPlaces(run)
        self.tail = self.head + run.model.tail_frame  # where among the rows of `clip_rows` its tail key frame lies
        denoising = "-jump_gap" if run.model.denoiser.flow_map else "-denoising_loss"
        self.best = {"code": "-code_loss", "motion": "-motion_loss"}.get(run.trains, denoising)
        torch.manual_seed(run.loop.seed)
        self.module = module = VideoTokenizer(run.model)
        load_first_stage(module, Path(run.init))
        start_from(module, run)
        if run.trains == "denoiser" and run.model.expects_motion and trained_part(Path(run.init)) == "code":
            raise ValueError(
                f"trains 'denoiser': motion encoder and decoder are not trained in {run.init}; train them first, "
                "with trains 'motion', and name that run in init"
            )
        if run.init_denoiser:
            take_denoiser(module, Path(run.init_denoiser))
        if run.model.denoiser.kind == "wan":
            check_places(module.denoiser, run.init_denoiser or run.init)
        freeze(module, run)
        if run.lora.rank:
            add_adapters(module.denoiser, run.lora, run.loop.seed)
            train_whole(module, run.lora.whole)
        module.to(pick_device(run.loop.device))
        self.streamed: StreamedClips | None = None
        if is_archive_index(run.cache):
            shards = ArchivedVideos.load(run.cache)
            self.streamed = StreamedClips(run, shards, self._lasting("training", shards.subset(validation=False)))
            self.videos, held_out = self.streamed.videos, self._lasting("validation", shards.subset(validation=True))
        else:
            cache, self.cache, validation = splits(run.cache)
            if self.whole and tuple(cache.frames.shape[1:3]) != run.model.frame_shape:  # else latents have its size
                found = f"{run.cache} holds {cache.frames.shape[1]}x{cache.frames.shape[2]}"
                raise ValueError(f"size: the model's frames are {'x'.join(map(str, run.model.frame_shape))}, {found}")
            self.videos, held_out = self._lasting("training", self.cache), self._lasting("validation", validation)
            if run.stream.buckets:
                raise ValueError(f"stream.buckets: for an index of archives; {run.cache} holds frames of one size")
            if not self.whole:
                self.latents = first_stage_latents(module, cache, run.loop.precision, run.mirror)
        self.validated = held_out.spread(VALIDATION_CLIPS)
        # measured anew under adapters: denoising loss 0.337 → 0.499 on `droid`, before any step
        if isinstance(module.denoiser, ResidualDenoiser) and run.trains in ("all", "denoiser") and not run.lora.rank:
            self.measure_deviation(module.denoiser)

    @property
    def head(self) -> int:
        """As `ClipPlaces.head`."""
        return ClipPlaces(self.run).head

    @property
    def whole(self) -> bool:
        """As `ClipPlaces.whole`."""
        return ClipPlaces(self.run).whole

    @torch.no_grad()
    def measure_deviation(self, denoiser: ResidualDenoiser) -> None:
        """Fit it on training clips; what is expected of them is that of their own latents and motion."""
        clips, expected = [], []
        for batch in self.fixed(self.videos.spread(MEASURED_CLIPS)):
            own = self.inputs(batch)[0][:, self.head :]
            motion = self.module.motion_of(own) if self.run.model.motion else own.new_zeros(len(own), 0, 1)
            clips.append(own[:, :-1])
            expected.append(self.module.expected(own[:, [0, -1]], motion))
        denoiser.fit_deviation(torch.cat(clips), torch.cat(expected))

    def _lasting(self, split: str, cache: FrameCache | ArchivedVideos) -> Videos:
        """Videos of a split to take clips from. Raises `ValueError` where there are none."""
        # a shorter one would teach that nothing moves
        videos, clip_s = cache.columns.lasting(self.run.model.clip_s), self.run.model.clip_s
        if not videos:
            raise ValueError(f"{self.run.cache}: none of its {split} videos lasts {clip_s:g} s, as a clip does")
        if self.run.trains == "code":
            return videos  # of frames, not of clips
        held = median(video.count / video.period_s for video in videos.spread(MEASURED_CLIPS)) * clip_s
        if held < 2:
            raise ValueError(
                f"{self.run.cache}: its {split} videos hold {held:.2g} frames a clip; cache all frames "
                "(--key-frames-only is for language models)"
            )
        return videos

    def num_samples(self) -> int:
        return len(self.videos)

    def by_size(self, indices: Tensor) -> Tensor:
        return indices  # all are of one size

    def bucket_sizes(self) -> list[int]:
        return self.streamed.sizes if self.streamed else [len(self.videos)]

    def batches(self, jobs: Iterator[tuple[Tensor, torch.Generator]]) -> Iterator[dict[str, Tensor]]:
        return self.streamed.batches(jobs) if self.streamed else starmap(self.batch, jobs)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if self.streamed:
            return self.streamed.batch(indices, generator)
        places, mirrored = self.places.drawn(self.videos, indices, generator)
        rows = torch.stack([self.clip_rows(*place) for place in places])
        return {
            **self.of_rows(rows, mirrored),
            # False where nothing was recorded before the clip
            "has_context": torch.tensor([self.places.has_context(*place) for place in places]),
            "frame_stride": torch.tensor([stride for *_, stride in places], dtype=torch.float32),
        }

    def fixed(self, videos: Videos) -> Iterator[dict[str, Tensor]]:
        """Batches of the first clip of each video, of the model's own rate and size; only loops have context."""
        at_most = at_once(32, self.run.model.size)
        if self.streamed:
            yield from self.streamed.fixed(videos, at_most)
            return
        for part in torch.arange(len(videos)).split(at_most):
            own = [videos[n] for n in part.tolist()]
            rows = torch.stack([self.clip_rows(video, 0.0) for video in own])
            loops = torch.tensor([video.loops for video in own])
            yield {**self.of_rows(rows, torch.zeros(len(rows), dtype=torch.long)), "has_context": loops}

    def clip_rows(self, video: CachedVideo, start: float, stride: int | None = None) -> Tensor:
        """Cache rows of context frames, the frames of a clip, and its tail key frame where it lies after them.

        The clip begins at `start`, 0…1 of where it may: anywhere in a loop, elsewhere where it still lasts to its end.
        """
        count = self.head + self.run.model.clip_span
        first_s, fps = self.places.first_s(video, start, stride), self.places.fps_of(stride)
        return self.cache.clip_rows(video, first_s, count, fps)

    def of_rows(self, rows: Tensor, mirrored: Tensor) -> dict[str, Tensor]:
        """Cached latents and key frames of clips, or of whole clips the frames; mirrored where `mirrored` is 1."""
        if self.whole:
            frames = self.cache.frames[rows]
            flips = mirrored[:, None, None, None, None] == 1
            return {"frames": torch.where(flips, frames.flip(-2), frames)}
        keys, both = torch.cat([rows[:, self.head], rows[:, self.tail]]), mirrored.repeat(2)
        source = self.latents[keys, both].float() if self.run.model.resampler is None else self.pixels_of(keys, both)
        return {"clips": self.latents[rows, mirrored[:, None]].float(), "keys": source}

    @torch.no_grad()
    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents of clips, and what tokens of their head and tail key frames are computed from, on the device."""
        device = self.module.device
        if "frames" not in batch:
            return batch["clips"].to(device), batch["keys"].to(device)
        pixels = frames_to_pixels(batch["frames"].to(device, non_blocking=True))
        keys = rearrange(pixels[:, [self.head, self.tail]], "b two c h w -> (two b) c h w")
        with autocast(device, self.run.loop.precision):
            if self.whole:
                return self.module.first_stage.encode_clips(pixels), self.module.source_of(keys)
            images = pixels.flatten(0, 1)
            parts = images.split(at_once(128, math.isqrt(images.shape[-2] * images.shape[-1])))
            latents = torch.cat([self.module.first_stage.encode(part) for part in parts])
        clips = latents.unflatten(0, pixels.shape[:2])
        if self.run.model.resampler is not None:
            return clips, keys
        return clips, rearrange(clips[:, [self.head, self.tail]], "b two c h w -> (two b) c h w")

    def pixels_of(self, rows: Tensor, mirrored: Tensor) -> Tensor:
        """Pixels `b 3 h w` of cached frames."""
        pixels = frames_to_pixels(self.cache.frames[rows])
        return torch.where(mirrored[:, None, None, None] == 1, pixels.flip(-1), pixels)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        # in eval mode what is not trained: the loop puts everything in training mode
        self.module.first_stage.eval()
        if self.run.model.resampler is not None:
            self.module.encoder.eval()
        clips, keys = self.inputs(batch)
        replaced = {"replaced": batch["replaced"]} if "replaced" in batch else {}
        tokens = self.module.tokens_of(keys)
        level = self.run.token_noise * torch.rand(len(tokens), 1, 1, generator=generator)
        tokens = tokens + (level * torch.randn(tokens.shape, generator=generator)).to(tokens)
        if self.run.trains == "code":
            loss = functional.mse_loss(self.module.key_latents(tokens), keys)
            return loss, {"code_loss": loss.detach(), **replaced}
        key_frames = pairs(tokens), pairs(self.module.key_latents(tokens))
        condition, losses = self.training_condition(*key_frames, clips, batch, generator), {}
        if self.run.model.motion:
            motion, kept = self.noisy_motion(clips, generator), condition.keys_mask[:, None, None]
            condition = replace(condition, motion=motion * kept)
            if self.run.model.expects_motion:
                expected = self.module.expected(key_frames[1], motion)
                condition = replace(condition, expected=expected.detach() * kept[..., None, None])
                if self.run.trains != "denoiser":
                    losses["motion_loss"] = functional.mse_loss(expected, self.within(clips))
        if self.run.trains != "motion":
            losses["denoising_loss"] = self.denoising_loss(self.within(clips), condition, generator)
        scalars = {name: loss.detach() for name, loss in losses.items()}
        return torch.stack([*losses.values()]).sum(), {**scalars, **replaced}

    def weight(self, batch: dict[str, Tensor]) -> float:
        return 1.0

    def training_condition(
        self, tokens: Tensor, key_latents: Tensor, clips: Tensor, batch: dict[str, Tensor], generator: torch.Generator
    ) -> ClipConditioning:
        """Conditioning on tokens `b 2 n d` and key latents, at random without them, or without context."""
        kept = (torch.rand(len(clips), generator=generator) >= self.run.drop_tokens).to(tokens.device)
        read = (torch.rand(len(clips), generator=generator) >= DROP_CONTEXT) & batch["has_context"]
        key_latents = key_latents * kept[:, None, None, None, None]
        return ClipConditioning(
            tokens=torch.where(kept[:, None, None, None], tokens, self.module.null_tokens()),
            motion=tokens.new_zeros(len(tokens), self.run.model.motion_tokens, tokens.shape[-1]),
            key_latents=key_latents,
            expected=cross_faded(key_latents, self.run.model.latent_frames),
            keys_mask=kept.to(tokens),
            context=clips[:, : self.run.model.denoiser.context_frames],
            context_mask=read.to(tokens),
            frame_stride=batch["frame_stride"].to(clips),
        )

    def noisy_motion(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        """Motion tokens of clips, of many the first ones alone: nested dropout (arXiv 1402.0915)."""
        motion = self.module.motion_of(clips[:, self.head :])
        drawn, most = torch.rand(2, len(clips), generator=generator), motion.shape[1]
        count = torch.where(drawn[0] < WHOLE_MOTION, most, (drawn[1] * (most + 1)).long())
        level = self.run.token_noise * torch.rand(len(clips), 1, 1, generator=generator)
        return limited(motion + (level * torch.randn(motion.shape, generator=generator)).to(motion), count)

    def within(self, clips: Tensor) -> Tensor:
        """The clips themselves, without the frames before and after them."""
        return clips[:, self.head : self.head + self.run.model.latent_frames]

    def denoising_loss(self, clips: Tensor, condition: ClipConditioning, generator: torch.Generator) -> Tensor:
        """Mean squared error of the denoiser's prediction at random times; hidden context is zeroed by its mask."""
        condition = replace(condition, context=condition.context * condition.context_mask[:, None, None, None, None])
        noise = torch.randn(clips.shape, generator=generator).to(clips)
        if self.run.model.denoiser.flow_map:
            return self.jumping_loss(clips, noise, condition, generator)
        shift = self.run.model.denoiser.time_shift
        noisy, timestep, target = noised(self.run.model.objective, clips, noise, generator, shift)
        predicted = self.module.denoiser(noisy, timestep, condition)
        return functional.mse_loss(self.with_given(predicted, target, condition), target)

    def with_given(self, predicted: Tensor, target: Tensor, condition: ClipConditioning) -> Tensor:
        """A prediction with the target in place of a first latent that is given: it has no loss, and no gradient."""
        if not (self.whole and self.run.model.denoiser.context_frames):
            return predicted
        given = condition.context_mask[:, None, None, None, None] == 1
        return torch.cat([torch.where(given, target[:, :1], predicted[:, :1]), predicted[:, 1:]], dim=1)

    def jumping_loss(
        self, clips: Tensor, noise: Tensor, condition: ClipConditioning, generator: torch.Generator
    ) -> Tensor:
        """The loss of a flow map; in validation that of its velocities alone: `jump_gap` is of its jumps.

        It compares with a denoiser's only where no guidance is fused: the target contains that of the network itself.
        """

        def u(x: Tensor, t: Tensor, r: Tensor, condition: ClipConditioning = condition) -> Tensor:
            velocity = (noise - clips).repeat(len(x) // len(clips), 1, 1, 1, 1)
            return self.with_given(self.module.velocity(condition, x, t * 1000, r * 1000), velocity, condition)

        def guide(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            if (guidance := self.run.model.denoiser.fused_guidance) == 1.0:
                return torch.zeros_like(x)
            both = condition.with_null(self.module.null_tokens())
            conditional, null = u(x.repeat(2, 1, 1, 1, 1), t.repeat(2), r.repeat(2), both).chunk(2)
            added = fused(conditional, null, guidance)
            return added * condition.keys_mask[:, None, None, None, None]

        t, r = (own.to(clips) for own in drawn_times(len(clips), generator, self.run.model.denoiser.time_shift))
        loss, plain = flow_map_loss(u, guide, clips, noise, t, r)
        return loss if self.module.training else plain

    def validate(self) -> tuple[dict[str, float], Image.Image]:
        """Losses with fixed noise; a sheet of real and rendered frames, and of key frames between them.

        Rendered by the denoiser; the expected clips where the motion encoder and decoder are trained alone.
        """
        module, device = self.module, self.module.device
        generator, replaced = generator_for(0, "validation"), 0.0
        losses: dict[str, list[Tensor]] = defaultdict(list)
        count, found, shown = len(self.validated), 0, []
        drawn = range(0, count, max(1, count // 8))[:8]
        for batch in self.fixed(self.validated):
            clips, keys = self.inputs(batch)
            own = [n - found for n in drawn if found <= n < found + len(clips)]
            shown.append((clips[own], pairs(keys)[own]))
            found += len(clips)
            context = clips[:, : self.run.model.denoiser.context_frames]
            condition = module.conditioning(self.blocks(keys, clips), context)
            loops = batch["has_context"].to(device)  # others begin at frame 0
            condition = replace(condition, context_mask=condition.context_mask * loops)
            replaced += float(batch.get("replaced", 0.0))
            if self.run.trains == "code":
                losses["code_loss"].append(functional.mse_loss(condition.key_latents[:, 0], clips[:, self.head]))
            if self.run.trains != "code" and self.run.model.expects_motion:
                losses["motion_loss"].append(functional.mse_loss(condition.expected, self.within(clips)))
            if self.run.trains in ("all", "denoiser"):
                losses["denoising_loss"].append(self.denoising_loss(self.within(clips), condition, generator))
                if self.run.model.denoiser.flow_map and not losses["jump_gap"]:  # of one batch: it takes 18 passes
                    losses["jump_gap"].append(self.jump_gap(self.within(clips), condition))
        metrics = {name: torch.stack(parts).mean().item() for name, parts in losses.items()}
        metrics |= {"replaced": replaced} if replaced else {}
        return metrics, self.sheet(*map(torch.cat, zip(*shown, strict=True)))

    def jump_gap(self, clips: Tensor, condition: ClipConditioning) -> Tensor:
        """Mean squared error of latents from a few jumps of a flow map against many, from the same noise."""
        noise = torch.randn(clips.shape, generator=generator_for(0, "jumps")).to(clips)
        predict, shift = partial(self.module.velocity, condition), self.run.model.denoiser.time_shift
        few, many = (sample("flow", SamplingConfig(steps=own), predict, noise, shift=shift) for own in (FEW, MANY))
        return functional.mse_loss(self.with_given(few, many, condition), many)

    def blocks(self, keys: Tensor, clips: Tensor) -> Tensor:
        """Tokens of the head and tail key frames of clips, those of motion included: `b 2 n d`."""
        motion = self.module.motion_of(clips[:, self.head :])[:, None] if self.run.model.motion else None
        return self.module.with_motion(pairs(self.module.tokens_of(keys)), motion)

    def sheet(self, latents: Tensor, keys: Tensor) -> Image.Image:
        """Strips of each clip: frames through the first stage, the head key frame through tokens, and rendered."""
        module, clips = self.module, self.within(latents)
        pair = self.blocks(rearrange(keys, "b two ... -> (two b) ..."), latents)
        columns = [module.frames_of(clips)[:, ::3] if self.whole else module.frames_of(clips[:, ::3])]
        if self.run.model.has_key_latents:
            columns.append(module.frames_of(module.key_latents(pair[:, 0])[:, None]))
        if self.run.trains == "code":
            return strips_of(columns)
        if self.run.trains == "motion":
            columns.append(module.frames_of(module.conditioning(pair).expected[:, ::3]))
        else:
            columns.append(next(module.decode(pair, seed=0))[:, ::3])
        return strips_of(columns)

    def export(self, folder: Path) -> None:
        with merged(self.module):
            write_config(folder, {"tokenizer": self.module.save_pretrained(folder)})


def strips_of(columns: Sequence[Tensor]) -> Image.Image:
    """Frames `b f h w c` side by side, a clip a row."""
    strips = [rearrange(column.cpu(), "b f h w c -> (b h) (f w) c") for column in columns]
    return Image.fromarray(torch.cat(strips, dim=1).numpy())


def pairs(heads_then_tails: Tensor) -> Tensor:
    """`(2 b) …` → `b 2 …`, as `ClipConditioning` has them."""
    return rearrange(heads_then_tails, "(two b) ... -> b two ...", two=2)
