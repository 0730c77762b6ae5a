"""Low-rank adapters, and `dicode finetune` from a folder of clips to a model that generates."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from test_cli import run
from test_lm_deep_lm import PROMPTS, build
from test_tokenizer import DENOISERS, conditioning, tiny_tokenizer
from torch import Tensor, nn

from dicode.checkpoint import load_state, read_config
from dicode.cli.app import parse
from dicode.data.cache import FrameCache
from dicode.lm.deep_lm import DeepTokenLM
from dicode.pipeline import DiCoDe
from dicode.train import lora
from dicode.train.checkpoint import checkpoints
from dicode.train.lora import add_adapters, merged
from dicode.train.runs import LanguageRun, LoRAConfig
from dicode.train.tokenizer import TokenizerTraining

CONFIG = LoRAConfig(rank=3, alpha=6.0)
NETWORKS = ["hourglass", "change", "unet3d", "llama", "gpt2"]


def network(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A toy network in eval mode, and its output for fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    if kind in ("llama", "gpt2"):
        tokens = torch.randn(3, 2, 5, 7, generator=generator)
        return build(body=kind), lambda module: module(PROMPTS, tokens).hidden
    config = DENOISERS.get(kind) or dataclasses.replace(DENOISERS["hourglass"], predict_residual=True)
    denoiser = tiny_tokenizer(denoiser=config).denoiser
    noisy = torch.randn(2, 16, 5, 8, 8, generator=generator)
    return denoiser, lambda module: module(noisy, torch.tensor([300.0, 700.0]), conditioning(2))


def stir(module: nn.Module) -> None:
    """Give adapters an effect, as training would."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", NETWORKS)
def test_adapters_start_without_effect_and_merge_into_a_network_without_them(kind: str) -> None:
    module, output = network(kind)
    plain, before = copy.deepcopy(module), output(module).detach()
    add_adapters(module, CONFIG, seed=0)
    assert torch.equal(output(module), before)
    stir(module)
    after = output(module).detach()
    assert (after - before).abs().max() > 1e-3
    with torch.no_grad():  # where torch's encoder layers take a fused way of their own
        torch.testing.assert_close(output(module), after, rtol=1e-5, atol=1e-5)
    with merged(module):
        load_state(plain, module.state_dict(), "merged")  # strict: the network's own names and no others
    torch.testing.assert_close(output(plain).detach(), after, rtol=1e-5, atol=1e-5)
    assert any("parametrizations" in name for name in module.state_dict())


def test_every_layer_gets_an_adapter_and_nothing_else_trains() -> None:
    for kind in NETWORKS:
        module, output = network(kind)
        weights = {n for n, p in module.named_parameters() if n.endswith("weight") and p.ndim > 1}
        held = {name: p.clone() for name, p in module.named_parameters()}
        add_adapters(module, CONFIG, seed=0)
        trained = [n for n, p in module.named_parameters() if p.requires_grad]
        assert {n.replace("parametrizations.", "").rpartition(".0.")[0] for n in trained} == weights
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 0.1)
        for _ in range(2):
            output(module.train()).square().sum().backward()
            optimizer.step()
        for name, p in module.named_parameters():
            if not p.requires_grad:
                assert torch.equal(p, held[name.replace("parametrizations.", "").replace(".original", "")]), name


def test_merging_adds_the_scaled_product_to_targets_alone() -> None:
    module, _ = network("llama")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    add_adapters(module, dataclasses.replace(CONFIG, targets=("q_proj", "mlp.down_proj")), seed=0)
    stir(module)
    with merged(module):
        after = module.state_dict()
    assert after.keys() == before.keys()
    adapters = dict(module.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".", 4)[-1] for name in changed} == {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    for name in changed:
        layer = name.removesuffix(".weight")
        a, b = (adapters[f"{layer}.parametrizations.weight.0.{factor}"] for factor in "ab")
        torch.testing.assert_close(after[name], before[name] + 2.0 * b @ a)  # alpha 6 over rank 3


def test_dropout_leaves_parts_out_in_training_and_never_in_use() -> None:
    layer = nn.Linear(64, 8)
    add_adapters(layer, dataclasses.replace(CONFIG, dropout=0.5), seed=0)
    stir(layer)
    x = torch.randn(2, 64)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))
    with pytest.raises(ValueError, match=r"call \.eval\(\) first"), merged(layer):
        pass


def test_adapters_depend_on_the_seed_alone() -> None:
    made = []
    for seed in (0, 0, 1):
        layer = nn.Linear(5, 4)
        add_adapters(layer, CONFIG, seed)
        made.append(layer.parametrizations["weight"][0].a)  # type: ignore[index]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q_prj",)}, r"no layer 'q_prj' \(did you mean 'q_proj'\?\)"),
        ({"rank": -1}, "expected rank ≥ 1"),
        ({"dropout": 1.0}, "0 ≤ dropout < 1"),
    ],
)
def test_adapters_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_adapters(network("llama")[0], dataclasses.replace(CONFIG, **changes), seed=0)  # type: ignore[arg-type]


def test_a_recipe_takes_adapters_by_flag() -> None:
    for recipe in ("lm", "denoiser"):
        command = parse(["train", f"recipes/sprites.py:{recipe}", "--lora.rank", "8", "--lora.targets", "q_proj"])
        assert command.run.lora == LoRAConfig(rank=8, targets=("q_proj",))
        assert parse(["train", f"recipes/sprites.py:{recipe}"]).run.lora.rank == 0


def test_words_that_the_box_has_never_seen_are_encoded_whole() -> None:
    text = DeepTokenLM.from_pretrained("sprites").text
    assert text is not None
    said = "pick up the zürich gripper 🤖 カメラ"
    assert text.tokenizer.decode(text.tokenizer.encode(said).ids).strip() == said


def finetune(capsys: pytest.CaptureFixture[str], clips: Path, output: Path, *more: object) -> tuple[int, str, str]:
    options = ["--batch-size", 3, "--rank", 4, "--seed", 2, "--dtype", "float32"]
    return run(capsys, "finetune", clips, "-o", output, *options, *more)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, drawn_clips: Path) -> Path:
    """A folder with what the command leaves after 20 steps, `mine`, and its figures."""
    from dicode.cli.app import main

    folder = tmp_path_factory.mktemp("finetuned")
    options = ["--batch-size", "4", "--rank", "8", "--lr", "1e-2", "--steps", "20", "--json", str(folder / "mine.json")]
    argv = ["finetune", str(drawn_clips), "-o", str(folder / "mine"), "--model", str(tiny_model), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dicode", *argv])
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)  # of no extra
        assert main() == 0
    return folder


def test_one_command_makes_a_model_that_generates(capsys, tmp_path: Path, finetuned: Path, tiny_model: Path) -> None:
    model = finetuned / "mine"
    argv = ["generate", "a red square moves right", "--seconds", 2, "--model", model, "-o", tmp_path / "a.mp4"]
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    assert {path.name for path in model.iterdir()} == {
        "README.md", "config.json", "first_stage.safetensors", "lm.safetensors", "tokenizer.json",
        "tokenizer.safetensors",
    }  # fmt: skip
    assert read_config(model)["tokenizer"] == read_config(tiny_model)["tokenizer"]  # its sampling with it
    for name in ("first_stage", "tokenizer", "lm"):
        before, after = (load_file(folder / f"{name}.safetensors") for folder in (tiny_model, model))
        assert before.keys() == after.keys()
        moved = {key for key in before if not torch.equal(before[key].half(), after[key])}
        assert moved <= {key for key in before if name == "lm" or key.startswith("denoiser.")}
        assert bool(moved) is (name != "first_stage")


def test_losses_on_the_clips_fall_and_the_card_says_so(finetuned: Path) -> None:
    figures = json.loads((finetuned / "mine.json").read_text())
    values, card = figures["values"], (finetuned / "mine/README.md").read_text()
    for part, loss in (("lm", "training_loss"), ("denoiser", "denoising_loss")):
        before, after = (values[part][when][loss] for when in ("before", "after"))
        assert after < 0.9 * before, part
        assert f"| {part}: {loss.replace('_', ' ')} | {before:.4g} | {after:.4g} |" in card
    assert (figures["n"], values["clips"], values["lora"]["rank"]) == (1, 6, 8)
    assert "`tiny`, fine-tuned on 5 clips" in card and "--model mine" in card
    data = huggingface_hub.ModelCard(card).data
    assert (data.model_name, data.base_model) == ("mine", None)  # `tiny` has no id on the Hub
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        f"{part}: {name.replace('_', ' ')}": pytest.approx(value, rel=1e-3)
        for part in ("denoiser", "lm")
        for name, value in values[part]["after"].items()
        if name != "step"
    }


def test_a_run_that_was_stopped_ends_as_one_that_was_not(capsys, monkeypatch, tmp_path, tiny_model, drawn_clips):
    """Stopped by a signal within either part, then given again: the same weights, bit for bit."""
    options = ["--model", tiny_model, "--steps", 4, "--dropout", 0.2]
    assert finetune(capsys, drawn_clips, tmp_path / "whole", *options)[0] == 0
    from dicode.train.lm import LanguageTraining

    for stage in (TokenizerTraining, LanguageTraining):
        with monkeypatch.context() as patch:
            patch.setattr(stage, "loss", stopping_in_step(stage.loss, 2))
            code, out, _ = finetune(capsys, drawn_clips, tmp_path / "parts", *options)
        assert code == 75 and "stopped at step 2; the same command continues" in out
        assert not (tmp_path / "parts").exists()
    code, out, err = finetune(capsys, drawn_clips, tmp_path / "parts", *options)
    assert code == 0, err
    assert "continuing" in out and "may be deleted" in out
    assert f"dicode evaluate {tmp_path}/parts --cache {tmp_path}/parts.work/cache --quick" in out
    for name in ("tokenizer", "lm"):
        whole, parts = (load_file(tmp_path / run_ / f"{name}.safetensors") for run_ in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole), name


def stopping_in_step(loss: Callable, step: int) -> Callable:
    calls = []

    def stopping(*given: object) -> object:
        calls.append(given)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*given)

    return stopping


def test_one_part_leaves_the_other_as_it_was(capsys, tmp_path: Path, tiny_model: Path, drawn_clips: Path) -> None:
    clips = tmp_path / "clips"
    shutil.copytree(drawn_clips, clips)
    (clips / "captions.jsonl").unlink()  # video files alone, which have no captions
    shutil.copytree(clips / "videos", clips, dirs_exist_ok=True)
    shutil.rmtree(clips / "videos")
    code, _, err = finetune(capsys, clips, tmp_path / "mine", "--model", tiny_model, "--steps", 1)
    assert code == 2 and "none of 6 clips has a caption to learn from; --parts denoiser needs none" in err
    assert not (tmp_path / "mine.work").exists()
    argv = ["--model", tiny_model, "--parts", "denoiser", "--work-folder", tmp_path / "work", "--minutes"]
    code, _, err = finetune(capsys, clips, tmp_path / "mine", *argv, 0.001)
    assert code == 0, err
    plan = json.loads((tmp_path / "work/denoiser/plan.json").read_text())
    assert plan["minutes"] == 0.001 and checkpoints(tmp_path / "work/denoiser")[-1].name == f"step-{plan['steps']:08}"
    code, _, err = finetune(capsys, clips, tmp_path / "mine", *argv, 0.002)
    assert code == 2 and "fixed when it began with --minutes 0.001" in err
    assert not (tmp_path / "work/lm").exists()
    made, base = (DiCoDe.from_pretrained(folder) for folder in (tmp_path / "mine", tiny_model))
    theirs = dict(base.lm.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in made.lm.named_parameters())
    assert "lm:" not in (tmp_path / "mine/README.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--parts", "resampler"], "resampler"),
        (["--rank", "0"], "--rank: expected 1"),
        (["--parts"], "--parts: expected 1 to 2 values, got 0"),
        (["--model", "nowhere"], "no checkpoint at 'nowhere'"),
        (["-o", "MODEL"], "a model is there already"),
        (["--targets", "q_prj", "--parts", "lm"], "did you mean 'q_proj'?"),
    ],
)
def test_what_cannot_be_done_is_said(capsys, tmp_path, tiny_model, drawn_clips, argv, message):
    given = [str(tiny_model) if word == "MODEL" else word for word in argv]
    before = {path.name for path in tiny_model.parent.iterdir()}
    code, _, err = finetune(capsys, drawn_clips, tmp_path / "mine", "--model", tiny_model, *given)
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "mine").exists()
    assert {path.name for path in tiny_model.parent.iterdir()} == before


def test_a_working_folder_is_for_one_model_and_one_set_of_clips(capsys, tmp_path, finetuned, tiny_model, drawn_clips):
    shutil.copytree(finetuned, tmp_path / "copy")
    clips = tmp_path / "more"
    shutil.copytree(drawn_clips, clips)
    for changed, folder in (["clips", clips], ["loops", drawn_clips]):
        argv = ["--model", tiny_model, "--steps", 1] + ["--loops"] * (changed == "loops")
        code, _, err = finetune(capsys, folder, tmp_path / "copy/mine", *argv)
        assert code == 2
        assert f"mine.work was begun with other {changed}" in err


def test_a_repaired_file_is_taken_and_changed_ones_are_not_passed_over(
    capsys, monkeypatch, tmp_path: Path, tiny_model: Path, drawn_clips: Path
):
    clips, work = tmp_path / "clips", tmp_path / "mine.work"
    shutil.copytree(drawn_clips, clips)
    lines = (clips / "captions.jsonl").read_text().splitlines()
    (clips / "captions.jsonl").write_text("\n".join(lines[:2]))
    whole = (clips / "videos/0000.mp4").read_bytes()
    (clips / "videos/0000.mp4").write_bytes(b"")
    argv = [clips, tmp_path / "mine", "--model", tiny_model, "--steps", 1, "--parts", "lm"]
    code, _, err = finetune(capsys, *argv)
    assert code == 2 and "got 0 and 1; for validation is what says so in its line, else every 15th video" in err
    (clips / "videos/0000.mp4").write_bytes(whole)

    def training(part: str, run: object, folder: Path, minutes: float | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sessions.jsonl").touch()
        raise ValueError("training begins")

    monkeypatch.setattr("dicode.train.finetune.train_part", training)
    code, _, err = finetune(capsys, *argv)
    assert (code, err) == (2, "dicode: training begins\n")
    assert [video.file for video in FrameCache.load(work / "cache").videos] == ["videos/0000.mp4", "videos/0001.gif"]
    cached = (work / "cache/index.json").read_bytes()
    (clips / "captions.jsonl").write_text("\n".join([*lines[:1], lines[1][:-1] + ', "validation": true}']))
    code, _, err = finetune(capsys, *argv)
    assert code == 2 and f"begun with other clips (files, captions or splits): delete {work / 'lm'}" in err
    assert (work / "cache/index.json").read_bytes() == cached
    shutil.rmtree(work / "lm")
    code, _, err = finetune(capsys, *argv)
    assert code == 2 and "got 0 and 2" in err  # the changed line is obeyed
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    code, _, err = finetune(capsys, clips, tmp_path / "mine", "--model", tiny_model, "--work-folder", other)
    assert code == 2 and "expected a folder of this command's, or none" in err


def test_clips_that_leave_none_to_train_on_are_refused(capsys, tmp_path: Path, tiny_model: Path, drawn_clips: Path):
    first = tmp_path / "one"
    shutil.copytree(drawn_clips, first)
    line = (first / "captions.jsonl").read_text().splitlines()[0]
    (first / "captions.jsonl").write_text(line + "\n")
    code, _, err = finetune(capsys, first, tmp_path / "mine", "--model", tiny_model)
    assert code == 2 and "got 0 and 1" in err


def test_a_run_with_adapters_needs_a_model_to_adapt(tmp_path: Path) -> None:
    from dicode.train.stages import stage_of

    assert lora.LoRAConfig().rank == 0
    with pytest.raises(ValueError, match=r"lora: .*init"):
        stage_of(LanguageRun(lora=CONFIG))
