"""Flow maps: jumps between Gaussians as the closed form has them; they begin as the denoiser they are made from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tokenizer import conditioning
from torch import Tensor, nn
from toy_runs import runs, write_cache

from dicode.seeds import generator_for
from dicode.tokenizer.config import SamplingConfig, TokenizerConfig
from dicode.tokenizer.denoiser import build_denoiser, sample
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.flow_map import drawn_times, flow_map_loss, fused
from dicode.train.runs import LinearCodeRun, TokenizerRun
from dicode.train.stages import run_recipe, stage_of
from dicode.train.tokenizer import TokenizerTraining

MEAN, DEVIATION = 1.5, 0.4  # of the clips; noise is standard normal


def mapped(config: TokenizerConfig) -> TokenizerConfig:
    return dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, flow_map=True))


def test_times_are_in_order_and_in_their_shares() -> None:
    t, r = drawn_times(4000, generator_for(0))
    assert (t >= r).all() and (r >= 0).all() and (t < 1).all()
    assert (t == r).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (r == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert t[t == r].median() == pytest.approx(0.5, abs=0.03)  # as plain flow matching draws them


class Jumps(nn.Module):
    """A mean velocity from (x, t, r)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self.layers(torch.stack([x.flatten(), t, r], dim=1)).view(x.shape)


def exact(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The flow between N(MEAN, DEVIATION²) at 0 and N(0, 1) at 1: a distance from the mean stays, in deviations."""
    deviations = [((1 - own) ** 2 * DEVIATION**2 + own**2).sqrt() for own in (t, r)]
    return (1 - r) * MEAN + deviations[1] / deviations[0] * (x - (1 - t) * MEAN)


def test_jumps_between_gaussians_are_those_of_the_closed_form() -> None:
    torch.manual_seed(0)
    network, generator, steps = Jumps(), generator_for(0), 1500
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        clips, noise = torch.randn(2, 512, 1, 1, 1, 1, generator=generator)
        t, r = drawn_times(512, generator)
        loss, _ = flow_map_loss(network, unguided, MEAN + DEVIATION * clips, noise, t, r)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    noise = torch.linspace(-2, 2, 41).view(-1, 1, 1, 1, 1)
    expected = exact(noise.flatten(), torch.ones(41), torch.zeros(41))

    def predict(x: Tensor, timestep: Tensor, until: Tensor) -> Tensor:
        return network(x, timestep / 1000, until / 1000)

    with torch.no_grad():
        for count in (1, 2, 4, 8):
            found = sample("flow", SamplingConfig(steps=count), predict, noise).flatten()
            assert (found - expected).square().mean() < 1e-2, count


def unguided(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return torch.zeros_like(x)


def test_guidance_is_part_of_every_velocity() -> None:
    """A constant that is added to all velocities is that much more to regress on, jumps or not."""
    clips, noise = torch.randn(2, 64, 1, 1, 1, 1, generator=generator_for(0))
    for t, r in ((torch.full((64,), 0.6), torch.full((64,), 0.6)), (torch.full((64,), 0.6), torch.full((64,), 0.2))):
        values = []
        for added in (0.0, 2.0):
            shifted = lambda x, t, r, added=added: torch.full_like(x, added)  # noqa: E731
            loss, _ = flow_map_loss(lambda x, t, r, own=added: torch.full_like(x, own), shifted, clips, noise, t, r)
            values.append(loss.item())
        assert values[0] == pytest.approx(values[1])


def test_guidance_that_is_learnt_settles_where_sampling_adds_it() -> None:
    """Its target is made by the network itself: what each step adds must not grow with what the last one added."""
    velocity, null = torch.randn(2, 4, 1, 1, 1, 1, generator=generator_for(0))
    own = velocity
    for _ in range(80):
        own = velocity + fused(own, null, 2.5)
    torch.testing.assert_close(own, null + 2.5 * (velocity - null))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "residual"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser of four steps, and a flow map of four more made from it."""
    folder = tmp_path_factory.mktemp("map")
    write_cache(folder / "cache")
    for name, run in runs(folder).items():
        if name != "lm":
            run_recipe(residual(run) if request.param else run, folder / name, {})
    run_recipe(map_run(folder, request.param), folder / "map", {})
    return folder


def residual(run: Any) -> Any:
    if not isinstance(run, LinearCodeRun | TokenizerRun):
        return run
    denoiser = dataclasses.replace(run.model.denoiser, predict_residual=True)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, denoiser=denoiser))


def map_run(folder: Path, change: bool, **changes: object) -> TokenizerRun:
    run = runs(folder)["denoiser"]
    run = residual(run) if change else run
    run = dataclasses.replace(run, init=str(folder / "denoiser/best"), model=mapped(run.model))
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]


def guided(run: TokenizerRun, guidance: float) -> TokenizerRun:
    denoiser = dataclasses.replace(run.model.denoiser, fused_guidance=guidance)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, denoiser=denoiser))


@torch.no_grad()
def test_few_jumps_are_compared_with_many(root: Path) -> None:
    """The measure that picks a flow map: nothing where jumps of any length agree, and more the less they do."""
    stage = stage_of(map_run(root, VideoTokenizer.from_pretrained(root / "map/best").config.denoiser.predict_residual))
    assert isinstance(stage, TokenizerTraining) and stage.best == "-jump_gap"
    assert stage.validate()[0]["jump_gap"] > 0
    clips, own = torch.zeros(2, 16, 5, 8, 8), stage.module
    gaps = []
    for share in (0.0, 1.0, 2.0):
        own.velocity = lambda _, x, t, r, share=share: torch.ones_like(x) + share * (t / 1000).view(-1, 1, 1, 1, 1)  # type: ignore[method-assign]
        gaps.append(stage.jump_gap(clips, conditioning(2)).item())
    assert gaps[0] == pytest.approx(0, abs=1e-10)
    # Euler's sums of t over n equal steps down from 1 are (1 + 1/n) / 2
    assert gaps[1] == pytest.approx(((1 / 2 - 1 / 16) / 2) ** 2, rel=1e-4) and gaps[2] == pytest.approx(4 * gaps[1])


@torch.no_grad()
def test_a_flow_map_begins_as_its_denoiser(root: Path) -> None:
    before = VideoTokenizer.from_pretrained(root / "denoiser/best")
    stage = stage_of(guided(map_run(root, before.config.denoiser.predict_residual), 2.5))
    assert isinstance(stage, TokenizerTraining)
    now, told, noisy = stage.module.eval(), conditioning(2), torch.randn(2, 16, 5, 8, 8)
    t = torch.tensor([300.0, 900.0])
    torch.testing.assert_close(now.velocity(told, noisy, t, t), before.velocity(told, noisy, t, t))
    assert before.velocity(told, noisy, t, t).any()
    same = torch.equal(now.velocity(told, noisy, t, t / 2), now.velocity(told, noisy, t, t))
    assert not same, "where a jump ends must matter"


@torch.no_grad()
def test_a_trained_one_is_saved_with_its_kind_and_renders_in_one_step(root: Path) -> None:
    model = VideoTokenizer.from_pretrained(root / "map/best")
    assert model.config.denoiser.flow_map
    tokens = torch.randn(1, 2, 4, 6)
    calls = []
    model.denoiser.register_forward_hook(lambda module, given, found: calls.append([float(x[0]) for x in given[1::2]]))
    sampling = dataclasses.replace(model.config.sampling, steps=1)
    frames = torch.cat([*model.decode(tokens, sampling=sampling)], dim=1)
    assert frames.shape == (1, 16, 32, 32, 3) and calls == [[1000.0, 0.0]]


def test_what_a_flow_map_cannot_be_is_an_error(root: Path) -> None:
    run = map_run(root, False)
    with pytest.raises(ValueError, match="flow_map: expected 'hourglass' or 'wan', and 'flow'"):
        build_denoiser(dataclasses.replace(run.model, objective="epsilon"))
    with pytest.raises(ValueError, match="fused_guidance: for a flow map"):
        build_denoiser(guided(runs(root)["denoiser"], 2.0).model)


def test_fused_guidance_moves_the_target_where_key_frames_are_given(root: Path) -> None:
    stage = stage_of(map_run(root, VideoTokenizer.from_pretrained(root / "map/best").config.denoiser.predict_residual))
    assert isinstance(stage, TokenizerTraining)
    nn.init.normal_(next(p for n, p in stage.module.denoiser.named_parameters() if n.endswith("out.weight")))
    clips, noise = torch.randn(2, 4, 16, 5, 8, 8, generator=generator_for(0))
    losses = []
    for guidance, kept in ((1.0, 1.0), (3.0, 1.0), (3.0, 0.0)):
        stage.run = guided(stage.run, guidance)
        told = dataclasses.replace(conditioning(4), keys_mask=torch.full((4,), kept))
        losses.append(stage.jumping_loss(clips, noise, told, generator_for(1)).item())
    stage.run = guided(stage.run, 1.0)
    told = dataclasses.replace(conditioning(4), keys_mask=torch.zeros(4))
    assert losses[0] != losses[1] and losses[2] == stage.jumping_loss(clips, noise, told, generator_for(1)).item()
