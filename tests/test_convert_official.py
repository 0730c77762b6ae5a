"""Published weights become a folder of ours: every tensor, every wrapping, and an error for whatever does not fit."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from published import (
    IMAGE_HEADS,
    TEXT_DEPTH,
    TEXT_LENGTH,
    OpenClip,
    assert_near,
    published_tokenizer,
    reference_config,
    reference_lm_config,
    values_of,
    vectors_of,
    weights_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel

from dicode.checkpoint import read_config
from dicode.cli.app import main
from dicode.config import CheckpointError
from dicode.convert.files import read_weights, write_tensors
from dicode.convert.names import clip_state
from dicode.convert.official import convert_dynamicrafter, convert_official, null_text
from dicode.convert.priors import convert_clip, convert_vae, diffusers_first_stage
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.heads import MixtureHead
from dicode.lm.text import TextTokenizer
from dicode.tokenizer.config import EncoderConfig, SamplingConfig
from dicode.tokenizer.library import ClipEncoder, resized
from dicode.tokenizer.presets import TOKENIZERS
from dicode.tokenizer.video_tokenizer import VideoTokenizer


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return published_tokenizer()


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary in GPT-2's form, small enough for the reference language model: 34 + 1 + 66 entries."""
    folder = tmp_path_factory.mktemp("gpt2")
    letters = "abcdefghijklmnopqrstuvwxyzĠ.,!?'-:"
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def saved(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


WRAPPINGS = {
    "plain": lambda state: state,
    "deepspeed": lambda state: {"module": state, "dp_world_size": 4},
    "lightning": lambda state: {"state_dict": state, "epoch": 3},
    "prefixed": lambda state: {f"_forward_module.module.{name}": value for name, value in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_of_the_tokenizer_gives_the_same_folder(
    published: dict[str, Tensor], tmp_path: Path, wrapping: str
) -> None:
    config = reference_config()
    convert_official(tmp_path / "plain", saved(published, tmp_path / "plain.bin"), config=config)
    convert_official(tmp_path / "out", saved(WRAPPINGS[wrapping](published), tmp_path / "w.bin"), config=config)
    for file in ("tokenizer.safetensors", "first_stage.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_converted_tokenizer_gives_the_published_outputs(published: dict[str, Tensor], tmp_path: Path) -> None:
    report = convert_official(tmp_path / "out", saved(published, tmp_path / "t.bin"), config=reference_config())
    tokenizer = VideoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.token_hash() == json.loads((tmp_path / "out" / "config.json").read_text())["deep_tokens"]
    r, v = vectors_of("resampler"), vectors_of("vae")
    with torch.no_grad():
        assert_near(tokenizer.resampler(r["features"]), r["tokens"])
        assert_near(tokenizer.first_stage.encode(v["pixels"]), v["latent_mode"] * 0.18215)
        assert_near(tokenizer.first_stage.decode(v["latent_mode"] * 0.18215), v["decoded"])
    held = tokenizer.denoiser.state_dict()
    assert sum(value.numel() for name, value in held.items() if name != "null_text") == sum(
        value.numel() for value in weights_of("unet").values()
    )
    assert "noise schedule" in report.text() and "text half" in report.text()
    assert "objective is v_prediction" in report.text()


def test_converted_tokenizer_shows_each_shared_frame_once(published: dict[str, Tensor], tmp_path: Path) -> None:
    convert_official(tmp_path / "out", saved(published, tmp_path / "t.bin"), config=reference_config())
    tokenizer = VideoTokenizer.from_pretrained(tmp_path / "out")
    frames = torch.randint(256, (1, 7, 32, 32, 3), dtype=torch.uint8)
    tokens = tokenizer.encode(frames)
    assert tokens.shape == (1, 3, 4, 32)  # frames 0, 3 and 6
    clips = list(tokenizer.decode(tokens, sampling=tokenizer.config.sampling.changed(steps=1)))
    assert [clip.shape[1] for clip in clips] == [4, 3]
    assert tokenizer.config.num_clips(7) == 2 and tokenizer.config.num_clips(8) == 3


def test_guidance_steers_away_from_a_mid_grey_image(published: dict[str, Tensor], tmp_path: Path) -> None:
    convert_official(tmp_path / "out", saved(published, tmp_path / "t.bin"), config=reference_config())
    tokenizer = VideoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        grey = tokenizer.tokens_of(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(tokenizer.null_tokens(), grey)
    between = [tokenizer.encode(torch.full((1, 2, 32, 32, 3), level, dtype=torch.uint8))[:, 0] for level in (127, 128)]
    assert max(((level - grey).norm() / grey.norm()).item() for level in between) < 0.05  # no uint8 is 127.5
    pair = torch.stack([grey, grey], dim=1)
    own = tokenizer.config.sampling
    plain, guided = (
        next(tokenizer.decode(pair, sampling=own.changed(steps=2, decoder_guidance=g))) for g in (1.0, 7.5)
    )
    assert (plain.int() - guided.int()).abs().max() <= 1  # away from itself is nowhere


def test_pictures_of_other_sizes_are_blurred_before_they_shrink_as_kornia_does() -> None:
    """The numbers are those of kornia 0.7.3, `resize(…, (3, 3), "bicubic", align_corners=True, antialias=True)`."""
    picture = torch.arange(108.0).view(1, 1, 9, 12).mul(0.7).sin()
    expected = [0.2488898, -0.1897430, 0.2580490, 0.0167765, -0.0150155, 0.0233409, -0.1791420, 0.1273170, -0.1610117]
    torch.testing.assert_close(resized(picture, 3).flatten(), torch.tensor(expected), rtol=0, atol=1e-6)


def test_image_tower_reads_what_the_public_preprocessing_makes() -> None:
    """kornia's resize and CLIP's mean and deviation, at the published sizes; the tower here only hands its input on.

    The repository has the lower right quarter of the vectors, where an error of scale is largest; no pixel there
    depends on one outside. DICODE_REFERENCE may name a folder that has all.
    """
    values, vectors = values_of("preprocess"), vectors_of("preprocess")
    config = EncoderConfig(width=8, depth=1, heads=1, size=values["size"])
    encoder = ClipEncoder(config)
    del encoder.tower
    encoder.tower = lambda pixels: types.SimpleNamespace(last_hidden_state=pixels.flatten(2).mT)  # type: ignore[assignment]
    pixels = torch.zeros(1, 3, 256, 256)
    held, expected = vectors["pixels"], vectors["image_tower_input"]
    pixels[..., -held.shape[2] :, -held.shape[3] :] = held
    read = encoder(pixels).mT.unflatten(2, (values["size"], values["size"]))
    assert_near(read[..., -expected.shape[2] :, -expected.shape[3] :], expected, 1e-6)
    assert TOKENIZERS["paper_tokenizer_256"].denoiser.frame_stride == values["frame_stride"] == 6


def test_null_text_is_what_open_clip_says_of_nothing(published: dict[str, Tensor]) -> None:
    text = {
        name.removeprefix("cond_stage_model.model."): value
        for name, value in published.items()
        if name.startswith("cond_stage_model.") and not name.endswith("attn_mask")
    }
    clip = OpenClip(40, 32)
    clip.load_state_dict({**clip.state_dict(), **text})
    ids = torch.tensor([[49_406, 49_407] + [0] * (TEXT_LENGTH - 2)])
    tower = {n.removeprefix("text_model."): t for n, t in clip_state(text).items() if n.startswith("text_model.")}
    with torch.no_grad():
        expected = clip.eval().text_features(ids, TEXT_DEPTH - 1)
    torch.testing.assert_close(null_text(tower), expected, rtol=1e-5, atol=1e-5)


def test_image_tower_sees_what_open_clip_sees(published: dict[str, Tensor], tmp_path: Path) -> None:
    convert_official(tmp_path / "out", saved(published, tmp_path / "t.bin"), config=reference_config())
    encoder = VideoTokenizer.from_pretrained(tmp_path / "out").encoder
    clip = OpenClip(40, 32).eval()
    image = {n.removeprefix("embedder.model."): t for n, t in published.items() if ".visual." in n}
    clip.load_state_dict({**clip.state_dict(), **image})
    pixels = torch.rand(2, 3, 28, 28) * 2 - 1
    with torch.no_grad():
        normalised = ((pixels + 1) / 2 - encoder.mean) / encoder.deviation
        torch.testing.assert_close(encoder(pixels), clip.visual(normalised), rtol=1e-4, atol=1e-5)


def test_towers_may_come_from_another_file(published: dict[str, Tensor], tmp_path: Path) -> None:
    config = reference_config()
    convert_official(tmp_path / "whole", saved(published, tmp_path / "t.bin"), config=config)
    without = {n: t for n, t in published.items() if not n.startswith(("embedder.", "cond_stage_model."))}
    clip = {n.removeprefix("embedder.model."): t for n, t in published.items() if ".visual." in n}
    clip |= {n.removeprefix("cond_stage_model.model."): t for n, t in published.items() if n.startswith("cond_stage")}
    bare = saved(without, tmp_path / "bare.bin")
    with pytest.raises(CheckpointError, match="--clip"):
        convert_official(tmp_path / "none", bare, config=config)
    convert_official(tmp_path / "other", bare, clip=saved(clip, tmp_path / "clip.bin"), config=config)
    name = "tokenizer.safetensors"
    assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    changed = {**clip, "visual.ln_pre.weight": clip["visual.ln_pre.weight"] + 1}
    with pytest.raises(CheckpointError, match="different towers"):
        convert_official(tmp_path / "no", tmp_path / "t.bin", clip=saved(changed, tmp_path / "c.bin"), config=config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"model.diffusion_model.strange.weight": torch.zeros(2)}), "strange"),
        (lambda s: s.update({"something.else": torch.zeros(2)}), "something.else"),
        (lambda s: s.pop("image_proj_model.proj_in.bias"), "missing resampler.proj_in.bias"),
        (lambda s: s.update({"image_proj_model.proj_in.bias": torch.zeros(2)}), r"expected shape \(48,\), got \(2,\)"),
        (lambda s: s.pop("first_stage_model.post_quant_conv.bias"), "post_quant_conv.bias"),
    ],
)
def test_missing_and_unknown_tensors_stop_the_conversion(
    published: dict[str, Tensor], tmp_path: Path, change: Any, message: str
) -> None:
    state = dict(published)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert_official(tmp_path / "out", saved(state, tmp_path / "t.bin"), config=reference_config())
    assert not (tmp_path / "out").exists()


def test_pickles_that_hold_code_are_refused(tmp_path: Path) -> None:
    path = saved({"x": Path("harmless")}, tmp_path / "code.bin")
    with pytest.raises(CheckpointError, match="plain tensors"):
        read_weights(path)
    (tmp_path / "cut.bin").write_bytes(saved({"x": torch.zeros(500)}, tmp_path / "x.bin").read_bytes()[:900])
    with pytest.raises(CheckpointError, match=r"cut\.bin"):
        read_weights(tmp_path / "cut.bin")
    (tmp_path / "text.bin").write_bytes(b"\x80\x02X\x02\x00\x00\x00\xf0\xff.")  # text that is no UTF-8
    with pytest.raises(CheckpointError, match=r"text\.bin: not a torch file of plain tensors$"):
        read_weights(tmp_path / "text.bin")


@pytest.mark.parametrize("prefix", ["", "llm_agent.", "module.llm_agent."])
def test_converted_language_model_gives_the_published_outputs(
    published: dict[str, Tensor], gpt2_folder: Path, tmp_path: Path, prefix: str
) -> None:
    weights = {**weights_of("lm"), **{f"pre_input_resampler.{n}": t for n, t in weights_of("resampler").items()}}
    weights["llm.transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    path = saved({f"{prefix}{name}": value for name, value in weights.items()}, tmp_path / "lm.bin")
    report = convert_official(
        tmp_path / "out",
        saved(published, tmp_path / "t.bin"),
        path,
        vocabulary=TextTokenizer.gpt2(gpt2_folder),
        config=reference_config(),
        lm_config=reference_lm_config(),
    )
    assert "equal to the first" in report.text()
    model = DeepTokenLM.from_pretrained(tmp_path / "out")
    assert (model.config.pad_id, model.config.begin_id) == (34, 36)
    values, v = values_of("lm"), vectors_of("lm")
    model.config = dataclasses.replace(model.config, pad_id=values["pad_id"], begin_id=values["boi_id"])
    with torch.no_grad():
        output = model(v["text_ids"], v["deep_tokens"])
        assert isinstance(model.head, MixtureHead)
        torch.testing.assert_close(model.head.mlp(output.hidden), v["head_output"], rtol=1e-5, atol=1e-5)
    sampling = SamplingConfig(guidance=2.0, variance_scale=0.0)
    key_frames = list(model.generate(v["text_ids"], v["generated_cfg2"].shape[1], sampling=sampling))
    torch.testing.assert_close(torch.stack(key_frames, dim=1), v["generated_cfg2"], rtol=1e-5, atol=1e-5)


def test_language_model_of_another_tokenizer_is_refused(
    published: dict[str, Tensor], gpt2_folder: Path, tmp_path: Path
) -> None:
    other = {f"pre_input_resampler.{n}": t + 1 for n, t in weights_of("resampler").items()}
    path = saved({**weights_of("lm"), **other}, tmp_path / "lm.bin")
    vocabulary = TextTokenizer.gpt2(gpt2_folder)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        convert_official(
            tmp_path / "out",
            saved(published, tmp_path / "t.bin"),
            path,
            vocabulary=vocabulary,
            config=reference_config(),
            lm_config=reference_lm_config(),
        )
    with pytest.raises(CheckpointError, match="no preset of a language model has width 32 and depth 2"):
        convert_official(tmp_path / "out", lm=saved(weights_of("lm"), tmp_path / "l.bin"), vocabulary=vocabulary)
    scaled = saved({**weights_of("lm"), "pre_normalizer": torch.full((1, 4, 1), 2.0)}, tmp_path / "s.bin")
    with pytest.raises(CheckpointError, match="scales deep tokens"):
        convert_official(tmp_path / "out", lm=scaled, vocabulary=vocabulary, lm_config=reference_lm_config())


def test_parts_converted_one_after_the_other_make_one_folder(
    published: dict[str, Tensor], gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_official(tmp_path / "out", saved(published, tmp_path / "t.bin"), config=reference_config())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from t.bin" in card and "noise schedule" in card
    path = saved(weights_of("lm"), tmp_path / "lm.bin")
    vocabulary = TextTokenizer.gpt2(gpt2_folder)
    convert_official(tmp_path / "out", lm=path, vocabulary=vocabulary, lm_config=reference_lm_config())
    assert read_config(tmp_path / "out").keys() == {"tokenizer", "lm", "deep_tokens"}
    assert (tmp_path / "out" / "README.md").read_text() == card
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("dicode.convert.official.write_config", None)
    with pytest.raises(TypeError):  # after the weights
        convert_official(tmp_path / "out", lm=path, vocabulary=vocabulary, lm_config=reference_lm_config())
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    with pytest.raises(TypeError):
        convert_dynamicrafter(
            saved(published, tmp_path / "d.bin"), tmp_path / "other", config=reference_config(), objective="epsilon"
        )
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_dir() and "gpt2" not in file.name) == ["out"]
    VideoTokenizer.from_pretrained(tmp_path / "out")
    DeepTokenLM.from_pretrained(tmp_path / "out")


def test_prompt_that_says_nothing_or_key_frames_that_do_not_fit_are_errors(gpt2_folder: Path, tmp_path: Path) -> None:
    """The public demo ignores its prompt and delivers fewer key frames than asked, both in silence."""
    path = saved(weights_of("lm"), tmp_path / "lm.bin")
    vocabulary = TextTokenizer.gpt2(gpt2_folder)
    convert_official(tmp_path / "out", lm=path, vocabulary=vocabulary, lm_config=reference_lm_config())
    model = DeepTokenLM.from_pretrained(tmp_path / "out")
    ids = vocabulary.encode(["a dog", "no cat"], model.config.text_length)
    first, second = next(model.generate(ids, 1, sampling=SamplingConfig(variance_scale=0.0)))
    assert not torch.allclose(first, second, atol=1e-3)
    with pytest.raises(ValueError, match="ask for fewer"):
        model.generate(ids, model.config.keyframe_limit + 1)
    weights = load_file(tmp_path / "out" / "lm.safetensors")
    del weights["backbone.body.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "out" / "lm.safetensors")
    with pytest.raises(CheckpointError, match=r"missing backbone\.body\.h\.1\.mlp\.c_fc\.weight"):
        DeepTokenLM.from_pretrained(tmp_path / "out")


def test_clip_goes_to_transformers_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicode.convert.official.CLIP_HEAD_WIDTH", {"vision": 40 // IMAGE_HEADS, "text": 32})
    clip = OpenClip(40, 32).eval()
    state = {name: value.detach() for name, value in clip.state_dict().items()}
    convert_clip(saved(state, tmp_path / "clip.bin"), tmp_path / "transformers")
    model = CLIPModel.from_pretrained(tmp_path / "transformers").eval()
    ids, pixels = torch.randint(49_408, (2, TEXT_LENGTH)), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        seen = model.vision_model(pixels).last_hidden_state
        torch.testing.assert_close(seen, clip.visual(pixels), rtol=1e-4, atol=1e-5)
        read = model.text_model(ids).last_hidden_state
        torch.testing.assert_close(read, clip.text_features(ids), rtol=1e-4, atol=1e-5)
        pooled = clip.visual.ln_post(clip.visual(pixels)[:, 0]) @ clip.visual.proj
        torch.testing.assert_close(model.get_image_features(pixels).pooler_output, pooled, rtol=1e-4, atol=1e-4)
    convert_clip(tmp_path / "transformers", tmp_path / "back")
    back = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_dynamicrafter_starts_a_tokenizer(published: dict[str, Tensor], tmp_path: Path) -> None:
    """It reads image latents too, has queries for every frame, and a fixed scale of the image attention."""
    state = {n: t for n, t in published.items() if not n.endswith("attn2.alpha")}
    first, queries = "model.diffusion_model.input_blocks.0.0.weight", "image_proj_model.latents"
    state[first] = torch.cat([state[first], torch.randn(32, 4, 3, 3)], dim=1)
    state[queries] = torch.cat([state[queries], torch.randn(1, 12, 48)], dim=1)
    path = saved({"state_dict": state}, tmp_path / "model.ckpt")
    report = convert_dynamicrafter(path, tmp_path / "out", config=reference_config())
    tokenizer = VideoTokenizer.from_pretrained(tmp_path / "out")
    assert "given image" in report.text() and "later frames" in report.text()
    assert torch.equal(tokenizer.denoiser.unet.conv_in.weight, published[first].float())
    assert torch.equal(tokenizer.resampler.latents, published[queries].float())
    assert tokenizer.config.objective == "epsilon" and "objective is epsilon" in report.text()
    assert tokenizer.config.sampling.guidance_rescale == 0.0
    alphas = [t for n, t in tokenizer.denoiser.state_dict().items() if n.endswith("alpha")]
    assert alphas and not any(alphas)


def test_dynamicrafter_keeps_what_it_predicts_and_on_which_schedule(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    """The betas are those of the public code: rescaled to zero terminal SNR for 512 and 1024, whose latents shrink."""
    rescaled = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=True).betas
    state = {**published, "betas": rescaled, "scale_arr": torch.linspace(1, 0.7, 1000)}
    path = saved(state, tmp_path / "512.ckpt")
    report = convert_dynamicrafter(path, tmp_path / "512", config=reference_config())
    held = VideoTokenizer.from_pretrained(tmp_path / "512").config
    assert held.objective == "v_prediction" and held.sampling.guidance_rescale == 0.7
    for note in ("objective is v_prediction", "dynamic rescale", "residual blocks drop out 0.1"):
        assert note in report.text()
    del state["betas"]
    path = saved(state, tmp_path / "bare.ckpt")
    with pytest.raises(CheckpointError, match=r"expected 'betas'.*--objective epsilon for DynamiCrafter-256"):
        convert_dynamicrafter(path, tmp_path / "no", config=reference_config())
    convert_dynamicrafter(path, tmp_path / "named", config=reference_config(), objective="epsilon")
    assert VideoTokenizer.from_pretrained(tmp_path / "named").config.objective == "epsilon"


def test_compvis_autoencoder_becomes_a_diffusers_folder(published: dict[str, Tensor], tmp_path: Path) -> None:
    report = convert_vae(saved({"state_dict": published}, tmp_path / "sd.ckpt"), tmp_path / "vae")
    stage = diffusers_first_stage(tmp_path / "vae").eval()
    v = vectors_of("vae")
    with torch.no_grad():
        decoded = stage.decode(v["latent_mode"] * 0.18215)
    assert_near(decoded, v["decoded"])
    assert sum(report.used.values()) == sum(value.numel() for value in weights_of("vae").values())


def test_streamed_file_reads_like_any_other(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 5).T, "latent_x": torch.randn(4), "n": torch.tensor(7), "s": torch.tensor(0.5)}
    write_tensors(tmp_path / "x.safetensors", state, torch.bfloat16, ("latent_",))
    back = load_file(tmp_path / "x.safetensors")
    assert [back[n].dtype for n in state] == [torch.bfloat16, torch.float32, torch.int64, torch.bfloat16]
    assert torch.equal(back["a"], state["a"].bfloat16()) and torch.equal(back["latent_x"], state["latent_x"])
    assert back["n"] == 7 and back["s"] == 0.5


def test_conversion_holds_less_than_half_as_much_again_as_its_file(tmp_path: Path) -> None:
    """Peak memory above that of the imports, of a 256 MiB file."""
    torch.save({f"w{i}": torch.zeros(8 * 2**20) for i in range(8)}, tmp_path / "big.bin")
    code = """
import resource, sys, torch
from pathlib import Path
from dicode.convert.files import read_weights, write_tensors
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder, before = Path(sys.argv[1]), peak()
write_tensors(folder / "out.safetensors", read_weights(folder / "big.bin"), torch.float16)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5 * (tmp_path / "big.bin").stat().st_size


def test_command_tells_what_became_of_every_tensor(
    published: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(published, tmp_path / "t.bin")
    assert main(["convert", "vae", str(path), "-o", str(tmp_path / "vae")]) == 0
    out = capsys.readouterr().out
    assert "autoencoder" in out and "other parts of the file" in out
    assert main(["convert", "official", "--tokenizer", str(path), "-o", str(tmp_path / "no")]) == 2
    assert "do not fit" in capsys.readouterr().err  # not of the published size
    assert main(["convert", "official", "--lm", str(path), "--vocabulary", str(tmp_path), "-o", "x"]) == 2
    assert "vocab.json" in capsys.readouterr().err
