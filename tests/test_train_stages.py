"""Training: resume is exact, runs are reproducible, and the whole path from clips to a generated video works."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_runs import PLAIN_CAPTIONS, SIZE, assert_same_checkpoint, loop, runs, train_in_parts, variants, write_cache

from dicode.checkpoint import read_config
from dicode.config import CheckpointError
from dicode.data.cache import FrameCache
from dicode.lm.deep_lm import DeepTokenLM
from dicode.pipeline import DiCoDe
from dicode.seeds import generator_for
from dicode.tokenizer.denoiser import ResidualDenoiser
from dicode.tokenizer.encoder import DECODER
from dicode.tokenizer.video_tokenizer import TokenizerParts, VideoTokenizer
from dicode.train.augment import augmented_caption
from dicode.train.chain import assemble, last_of
from dicode.train.first_stage import FirstStageTraining
from dicode.train.lm import LanguageTraining
from dicode.train.loop import NonFiniteLossError, train
from dicode.train.optim import Muon, make_optimizers
from dicode.train.order import sample_indices
from dicode.train.runs import AugmentConfig, FirstStageRun, OptimConfig
from dicode.train.stages import run_recipe, stage_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache and one short run of each stage, as its recipes would leave it."""
    root = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    write_cache(root / "cache")
    for name, run in runs(root).items():
        run_recipe(run, root / name, {"name": name})
    return root


def test_a_run_does_not_go_on_with_another_optimizer(trained: Path, tmp_path: Path) -> None:
    run = variants(trained)["muon"]
    run_recipe(dataclasses.replace(run, loop=dataclasses.replace(run.loop, optim=loop(2).optim)), tmp_path, {})
    with pytest.raises(CheckpointError, match=r"written with another optimizer; .*optimizer/exp_avg/"):
        run_recipe(run, tmp_path, {})


def test_muon_moves_the_weights_of_linear_layers_alone() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    adamw, muon = make_optimizers(module, OptimConfig(optimizer="muon"))
    assert isinstance(muon, Muon) and muon.param_groups[0]["params"] == [module[1].weight]
    assert len(adamw.param_groups[0]["params"]) == 4
    assert len(make_optimizers(module, OptimConfig())) == 1


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_rendered_frames_are_those_that_decode_shows_beside_the_real_ones(trained: Path, tmp_path: Path) -> None:
    run = variants(trained)["rendered"]
    assert isinstance(run, FirstStageRun)
    shutil.copytree(trained / "cache", tmp_path / "cache")
    run = dataclasses.replace(run, cache=str(tmp_path / "cache"), rendered_guidance=1.5, rendered_motion_scale=1.3)
    stage = FirstStageTraining(run)
    assert stage.rendered is not None and stage.tokenizer is not None
    cache = FrameCache.load(run.cache).subset(validation=False)
    rows = torch.stack([cache.clip_rows(video, 0.0, 17, 8.0) for video in cache.videos])
    assert torch.equal(stage.rendered.rows, rows[:, 1:16].flatten())
    tokens = stage.tokenizer.encode(cache.frames[rows[:3]])
    sampling = stage.tokenizer.config.sampling.changed(decoder_guidance=1.5, motion_scale=1.3)
    shown = next(stage.tokenizer.decode(tokens, seed=0, sampling=sampling))
    latents = stage.rendered.latents.float().unflatten(0, (-1, 15))[:3]
    assert (stage.tokenizer.frames_of(latents).int() - shown[:, 1:].int()).abs().max() <= 1  # kept as float16
    batch = stage.batch(torch.arange(4), generator_for(0))
    assert len(batch["pixels"]) == 4 and len(batch["rendered"]) == 2
    kept = sorted(Path(run.cache).glob("rendered-*.safetensors"))  # of training and of validation clips
    written = [file.stat().st_mtime_ns for file in kept]
    FirstStageTraining(run)
    assert len(kept) == 2 and [file.stat().st_mtime_ns for file in kept] == written
    tuned = shutil.copytree(str(run.tokenizer), tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    config["tokenizer"]["sampling"]["steps"] = 1
    (tuned / "config.json").write_text(json.dumps(config))
    FirstStageTraining(dataclasses.replace(run, tokenizer=str(tuned)))
    assert len(list(Path(run.cache).glob("rendered-*.safetensors"))) == 4  # the same weights, sampled otherwise
    with pytest.raises(ValueError, match="rendered_share: expected 0…1, and a tokenizer that renders"):
        FirstStageTraining(dataclasses.replace(run, tokenizer=None))


@pytest.mark.parametrize(
    "stage",
    [
        "first_stage",
        "kl",
        "perceptual",
        "rendered",
        "adversarial",
        "denoiser",
        "change",
        "lm",
        "muon",
        "flow",
    ],
)
def test_resume_is_bit_exact(trained: Path, tmp_path: Path, stage: str) -> None:
    """Three steps, a stop, then the rest: same weights, EMA, buffers, optimizer and losses as in one go."""
    run = {**runs(trained), **variants(trained)}[stage]
    optim = dataclasses.replace(loop(6).optim, optimizer=run.loop.optim.optimizer)
    whole = dataclasses.replace(run, loop=dataclasses.replace(loop(6), optim=optim, evaluate_every=6))
    run_recipe(whole, tmp_path / "whole", {})
    train_in_parts(whole, tmp_path / "parts")
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts", step=6)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")  # step 3 was done, lost, and done again


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGTERM")
def test_sigterm_leaves_a_checkpoint_and_the_same_command_continues(trained: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from dicode.tokenizer.config import FirstStageConfig\n"
        "from dicode.train.first_stage import FirstStageRun\n"
        "from dicode.train.loop import LoopConfig\n"
        "from dicode.train.optim import OptimConfig\n"
        "def tiny():\n"
        "    model = FirstStageConfig('tiny', (8, 8, 8), 5, (1, 1, 1), (1, 1, 1))\n"
        "    loop = LoopConfig(log_every=1, evaluate_every=10**6, checkpoint_every=10**6,\n"
        "                      optim=OptimConfig(steps=10**6, batch_size=4))\n"
        f"    return FirstStageRun(cache={str(trained / 'cache')!r}, model=model, loop=loop)\n"
    )
    command = [sys.executable, "-m", "dicode", "train", f"{recipe}:tiny", "--run-folder", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("train 3:"):
                break
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
    assert process.returncode == 75
    (checkpoint,) = (tmp_path / "run").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert step >= 3 and f"stopped at step {step}; the same command continues" in said
    more = subprocess.run(
        [*command, "--loop.optim.steps", str(step + 2)], check=True, capture_output=True, text=True
    ).stdout
    assert f"continuing {tmp_path / 'run'} from step {step}" in more and f"train {step + 2}:" in more


def test_every_sample_comes_once_an_epoch_whatever_the_batch_size() -> None:
    epoch = torch.cat([sample_indices(10, 3, seed=1, step=step) for step in range(10)])
    for e in range(3):
        assert sorted(epoch[10 * e : 10 * e + 10].tolist()) == list(range(10))
    other = torch.cat([sample_indices(10, 5, seed=1, step=step) for step in range(6)])
    assert torch.equal(epoch, other)
    assert not torch.equal(epoch[:10], epoch[10:20])


def test_learning_rate_warms_up_stays_and_decays_to_nothing() -> None:
    optim = OptimConfig(steps=100, lr=1.0, warmup_steps=10, decay_fraction=0.2)
    assert [optim.lr_at(s) for s in (0, 9, 50, 79)] == pytest.approx([0.1, 1, 1, 1])
    assert [optim.lr_at(s) for s in (90, 99)] == pytest.approx([0.5, 0.05])


def test_a_non_finite_loss_stops_the_run_and_names_the_step(trained: Path, tmp_path: Path) -> None:
    run = runs(trained)["denoiser"]
    stage = stage_of(run)
    original = stage.loss

    def loss(batch: object, generator: torch.Generator) -> object:
        value, scalars = original(batch, generator)
        return value * (math.nan if len(stage_calls) == 2 else 1), scalars

    stage_calls: list[int] = []
    stage.batch, before = (lambda i, g: (stage_calls.append(1), before(i, g))[1]), stage.batch  # type: ignore[method-assign]
    stage.loss = loss  # type: ignore[method-assign, assignment]
    with pytest.raises(NonFiniteLossError, match=r"step 1.*denoiser"):
        train(stage, run.loop, tmp_path, {})
    assert not list(tmp_path.glob("step-*"))


def test_a_denoiser_leaves_the_linear_code_as_it_is(trained: Path) -> None:
    before, after = (load_file(trained / run / "best/tokenizer.safetensors") for run in ("linear_code", "denoiser"))
    for name in before:
        assert torch.equal(before[name], after[name]) is not name.startswith("denoiser."), name


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_a_frozen_encoder_keeps_latents_while_the_decoder_learns(trained: Path, tmp_path: Path, kind: str) -> None:
    run = runs(trained)["first_stage"] if kind == "tiny" else variants(trained)["kl"]
    run_recipe(run, tmp_path / "before", {})
    run_recipe(
        dataclasses.replace(run, init=str(tmp_path / "before/best"), freeze_encoder=True), tmp_path / "after", {}
    )
    files = (tmp_path / f"{name}/best/first_stage.safetensors" for name in ("before", "after"))
    before, after = (load_file(file) for file in files)
    for name in before:
        assert torch.equal(before[name], after[name]) is not name.startswith(DECODER), name


def test_of_weights_that_validate_alike_the_later_are_kept(trained: Path, tmp_path: Path) -> None:
    stage = stage_of(runs(trained)["first_stage"])
    _, sheet = stage.validate()
    scores = iter([{"psnr_db": 2.0}, {"psnr_db": 2.0}, {"psnr_db": 1.0}])
    stage.validate = lambda: (next(scores), sheet)  # type: ignore[method-assign]
    assert train(stage, loop(12), tmp_path, {}) == {"psnr_db": 2.0, "step": 8.0}


def test_a_run_goes_on_when_its_best_weights_are_chosen_by_another_figure(trained: Path, tmp_path: Path) -> None:
    first, second = (stage_of(runs(trained)["first_stage"]) for _ in range(2))
    _, sheet = first.validate()
    first.validate = lambda: ({"psnr_db": 2.0}, sheet)  # type: ignore[method-assign]
    second.validate, second.best = lambda: ({"frechet": 3.0}, sheet), "-frechet"  # type: ignore[method-assign]
    train(first, loop(4), tmp_path, {})
    assert train(second, loop(8), tmp_path, {}) == {"frechet": 3.0, "step": 8.0}


def test_nothing_is_frozen_that_was_never_trained(trained: Path) -> None:
    with pytest.raises(ValueError, match="freeze_encoder: name the trained"):
        stage_of(dataclasses.replace(runs(trained)["first_stage"], freeze_encoder=True))


def test_another_denoiser_takes_over_all_but_the_denoiser(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = stage_of(variants(trained)["change"])  # starts from a run whose denoiser predicts the clip itself
    assert "another denoiser" in capsys.readouterr().out
    held = load_file(trained / "linear_code/best/tokenizer.safetensors")
    for name, value in TokenizerParts(stage.module).state_dict().items():
        assert name.startswith("denoiser.") or torch.equal(value, held[name]), name


def test_a_denoiser_begins_with_that_of_another_model(trained: Path) -> None:
    run = runs(trained)["denoiser"]
    stage = stage_of(dataclasses.replace(run, init_denoiser=str(trained / "denoiser/best")))
    assert isinstance(stage.module, VideoTokenizer)
    theirs = load_file(trained / "denoiser/best/tokenizer.safetensors")
    for name, value in stage.module.denoiser.state_dict().items():
        assert torch.equal(value, theirs[f"denoiser.{name}"]), name
    with pytest.raises(CheckpointError, match="does not fit"):
        stage_of(dataclasses.replace(variants(trained)["change"], init_denoiser=str(trained / "denoiser/best")))


def test_assembling_takes_a_later_decoder_and_refuses_what_does_not_fit(trained: Path, tmp_path: Path) -> None:
    tokenizer, lm = trained / "denoiser/best", trained / "lm/best"
    run_recipe(variants(trained)["perceptual"], tmp_path / "later", {})
    model = assemble(tokenizer, lm, tmp_path / "model", tmp_path / "later/best", steps=3)
    own = VideoTokenizer.from_pretrained(tokenizer).config.sampling
    assert own.steps == 2 and model.sampling == dataclasses.replace(own, steps=3)  # all else as it was
    held = load_file(tmp_path / "later/best/first_stage.safetensors")
    for name, value in model.tokenizer.first_stage.state_dict().items():
        torch.testing.assert_close(value, held[name], rtol=1e-3, atol=1e-3)  # float16
    assert (last_of(tokenizer), last_of(lm)) == (trained / "denoiser/last", trained / "lm/last")
    held = load_file(trained / "lm/last/lm.safetensors")
    assert held.keys() == load_file(lm / "lm.safetensors").keys()
    with pytest.raises(CheckpointError, match="--last: expected RUN/best with RUN/last beside it"):
        last_of(trained / "denoiser")
    run_recipe(dataclasses.replace(runs(trained)["first_stage"], loop=loop(5)), tmp_path / "other", {})
    with pytest.raises(CheckpointError, match="the deep tokens would change"):
        assemble(tokenizer, lm, tmp_path / "wrong", tmp_path / "other/best")
    write_cache(tmp_path / "cache", 12)
    code = dataclasses.replace(runs(trained)["linear_code"], cache=str(tmp_path / "cache"))
    run_recipe(code, tmp_path / "linear_code", {})
    with pytest.raises(CheckpointError, match="was trained on the deep tokens"):
        assemble(tmp_path / "linear_code/best", lm, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_recipe_changed_on_the_way_is_kept_beside_the_first(trained: Path, tmp_path: Path) -> None:
    run = runs(trained)["first_stage"]
    run_recipe(run, tmp_path, {})
    run_recipe(dataclasses.replace(run, loop=loop(6)), tmp_path, {})
    steps = [json.loads((tmp_path / name).read_text())["loop"]["optim"]["steps"]
             for name in ("recipe.json", "recipe-from-step-00000004.json")]  # fmt: skip
    assert steps == [4, 6]


def test_a_denoiser_of_changes_measures_their_deviation_before_it_trains(trained: Path, tmp_path: Path) -> None:
    run = runs(trained)["denoiser"]
    denoiser = dataclasses.replace(run.model.denoiser, predict_residual=True)
    run_recipe(dataclasses.replace(run, model=dataclasses.replace(run.model, denoiser=denoiser)), tmp_path, {})
    tokenizer = VideoTokenizer.from_pretrained(tmp_path / "best")
    assert isinstance(tokenizer.denoiser, ResidualDenoiser)
    assert tokenizer.denoiser.deviation[0] == pytest.approx(0.2)  # the head itself
    assert tokenizer.denoiser.deviation[1:].min() > 0.2


def test_words_of_other_captions_stand_in_a_share_of_the_captions(trained: Path) -> None:
    run = dataclasses.replace(
        runs(trained)["lm"], augment=AugmentConfig(**{**PLAIN_CAPTIONS, "word_swaps": 0.5, "swapped_words": 0.4})
    )
    stage = stage_of(run)
    assert isinstance(stage, LanguageTraining)
    video = stage.cache.videos[0]
    own, anyone = video.captions[0].split(), {word for v in stage.cache.videos for word in v.captions[0].split()}
    texts = [augmented_caption(video.captions, run.augment, stage.words, generator_for(i)).split() for i in range(400)]
    changed = [text for text in texts if text != own]
    assert all(len(text) == len(own) and set(text) <= anyone for text in texts)
    assert 120 <= len(changed) <= 240
    places = [sum(a != b for a, b in zip(text, own, strict=True)) for text in texts]
    assert sum(places) / len(own) / 400 == pytest.approx(0.5 * 0.4, abs=0.06)  # fewer by the words drawn again
    plain = AugmentConfig(**PLAIN_CAPTIONS)  # type: ignore[arg-type]
    unchanged = {augmented_caption(video.captions, plain, stage.words, generator_for(i)) for i in range(50)}
    assert unchanged == {video.captions[0]}


def test_longer_samples_are_trained_at_the_share_asked_for(trained: Path) -> None:
    stage = stage_of(runs(trained)["lm"])
    lengths = [
        stage.batch(torch.tensor([0, 1]), torch.Generator().manual_seed(i))["tokens"].shape[1] for i in range(60)
    ]
    assert set(lengths) == {3, 5}
    assert 15 <= lengths.count(5) <= 45


def test_trained_stages_make_one_model_that_generates(trained: Path, tmp_path: Path) -> None:
    """Train → assemble → save → load → generate, lazily and exactly as long as asked."""
    tokenizer = VideoTokenizer.from_pretrained(trained / "denoiser/best")
    model = DiCoDe(tokenizer, DeepTokenLM.from_pretrained(trained / "lm/best"))
    model.save_pretrained(tmp_path, torch.bfloat16)
    assert set(read_config(tmp_path)) == {"tokenizer", "lm", "deep_tokens"}
    model = DiCoDe.from_pretrained(tmp_path)
    clips = list(model.generate("a red square moves right", seconds=5.0, seed=3))
    assert [clip.shape for clip in clips] == [(16, SIZE, SIZE, 3), (16, SIZE, SIZE, 3), (8, SIZE, SIZE, 3)]
    again = list(model.generate("a red square moves right", seconds=5.0, seed=3))
    assert all((a == b).all() for a, b in zip(clips, again, strict=True))
    other = next(model.generate("a red square moves right", seconds=5.0, seed=4))
    assert (other != clips[0]).any()


def test_more_seconds_than_the_model_holds_is_an_error_before_anything_is_made(trained: Path) -> None:
    tokenizer = VideoTokenizer.from_pretrained(trained / "denoiser/best")
    model = DiCoDe(tokenizer, DeepTokenLM.from_pretrained(trained / "lm/best"))
    with pytest.raises(ValueError, match="key frames asked for"):
        model.generate("a red square", seconds=60.0)
    with pytest.raises(ValueError, match="prompt"):
        model.generate("  ", seconds=2.0)
    with pytest.raises(ValueError, match="unknown options"):
        model.generate("a red square", guidnace=2.0)
