"""`dicode convert wan`: a tiny folder of diffusers computes what diffusers computes, and everything else stops."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from einops import rearrange
from safetensors.torch import load_file, save_file
from test_wan import given
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    UMT5Config,
    UMT5EncoderModel,
)

from dicode.cli.app import main
from dicode.config import CheckpointError
from dicode.convert.wan import convert_wan
from dicode.tokenizer.library import resized
from dicode.tokenizer.video_tokenizer import VideoTokenizer

SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2, "text_dim": 8}
VAE = {"base_dim": 4, "z_dim": 5, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]}


def write_wan(folder: Path, shard: str = "5GB", vae: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A pipeline of random weights, as `save_pretrained` writes one."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(in_channels=5, out_channels=5, **{**SIZES, **changes})
    transformer.save_pretrained(folder / "transformer", max_shard_size=shard)
    statistics = {"latents_mean": [0.1 * i for i in range(5)], "latents_std": [1 + 0.1 * i for i in range(5)]}
    AutoencoderKLWan(**{**VAE, **statistics, **(vae or {})}).save_pretrained(folder / "vae")
    config = UMT5Config(
        vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder / "tokenizer"
    )
    index = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


VAE_22 = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 6}


@pytest.mark.parametrize(("shard", "vae"), [("5GB", {}), ("20KB", {}), ("5GB", VAE_22)])
def test_the_converted_model_computes_what_the_pipelines_parts_do(
    tmp_path: Path, shard: str, vae: dict[str, Any]
) -> None:
    source = write_wan(tmp_path / "wan", shard, vae)
    assert (len(list((source / "transformer").glob("*.safetensors"))) > 1) == (shard == "20KB")
    flags = ["-o", tmp_path / "out", "--size", "32", "--clip-frames", "17", "--dtype", "float32"]
    assert main(["convert", "wan", *map(str, [source, *flags])]) == 0
    made = VideoTokenizer.from_pretrained(tmp_path / "out")
    config = made.config
    assert (config.clip_frames, config.tail_frame, config.fps, config.latent_frames) == (17, 16, 8.0, 5)
    transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(source / "transformer"))
    state = {n: t for file in (source / "transformer").glob("*.safetensors") for n, t in load_file(file).items()}
    transformer.load_state_dict(state)
    library = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(source / "vae")).eval()
    library.load_state_dict(load_file(source / "vae/diffusion_pytorch_model.safetensors"))
    text = made.denoiser.null_text
    assert text.shape == (1, 512, 8) and text[0, 0].any() and not text[0, 1:].any()
    noisy, t = torch.randn(2, 5, 5, *2 * [config.latent_size]), torch.tensor([900.0, 20.0])
    context = torch.zeros(2, 1, *noisy.shape[2:])
    condition = given(tokens=torch.randn(2, 2, 16, 64), context=context, context_mask=torch.zeros(2))
    with torch.no_grad():
        expected = transformer(noisy.transpose(1, 2), t, text.expand(2, -1, -1), return_dict=False)[0]
        torch.testing.assert_close(made.denoiser(noisy, t, condition), expected.transpose(1, 2), rtol=0, atol=1e-5)
        alone = dataclasses.replace(config.denoiser, context_frames=0)  # one time for all positions, not one each
        made.denoiser.config = dataclasses.replace(config, denoiser=alone)
        assert torch.equal(made.denoiser(noisy, t, condition), expected.transpose(1, 2))  # before any training
        pixels = torch.rand(1, 17, 3, 32, 32) * 2 - 1
        latents = library.encode(rearrange(pixels, "b f c y x -> b c f y x")).latent_dist.mode()
        mean, deviation = (
            torch.tensor(library.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std")
        )
        own = made.first_stage.encode_clips(pixels)
        torch.testing.assert_close(own, ((latents - mean) / deviation).transpose(1, 2))
        torch.testing.assert_close(
            made.first_stage.decode_clips(own),
            library.decode(latents, return_dict=False)[0].transpose(1, 2),
            rtol=1e-4,
            atol=1e-5,
        )
    card = (tmp_path / "out/README.md").read_text()
    assert "sha256" in card and "new, to be trained" in card


def renamed(folder: Path, old: str, *new: str) -> None:
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    value = state.pop(old)
    save_file({**state, **{name: value.clone() for name in new}}, path)


def without(path: Path, name: str) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key != name}))


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


TRAPS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another pipeline": (
        lambda f: changed(f / "model_index.json", transformer=["diffusers", "FluxTransformer2DModel"]),
        "class",
    ),
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
    "an image-to-video model": (lambda f: changed(f / "transformer/config.json", image_dim=1280), "image_dim"),
    "two transformers": (
        lambda f: changed(f / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]),
        "transformer_2",
    ),
    "other places": (lambda f: changed(f / "transformer/config.json", rope_max_seq_len=2048), "rope_max_seq_len"),
    "no scale of latents": (lambda f: without(f / "vae/config.json", "latents_std"), "expected latents_std too"),
    "latents of other scales": (
        lambda f: changed(f / "vae/config.json", latents_std=[1.0, 1.0]),
        "latent_deviation",
    ),
    "a tensor more": (
        lambda f: renamed(f, "blocks.0.attn2.to_q.weight", "blocks.0.attn2.to_q.weight", "blocks.0.attn2.add_q.weight"),
        "add_q",
    ),
    "half of 2.2": (lambda f: changed(f / "vae/config.json", is_residual=True), "in_channels"),
    "other stages": (
        lambda f: changed(f / "vae/config.json", temperal_downsample=[True, False]),
        "temperal_downsample",
    ),
    "a missing tensor": (
        lambda f: renamed(f, "blocks.0.attn2.to_q.weight", "blocks.9.attn2.to_q.weight"),
        "do not fit",
    ),
    "pickles": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").rename(f / "vae/diffusion_pytorch_model.bin"),
        "pickles",
    ),
    "no text encoder": (lambda f: (f / "text_encoder/config.json").unlink(), "--null-text"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_what_it_is_not_made_for_stops_and_writes_nothing(tmp_path: Path, name: str) -> None:
    spoil, said = TRAPS[name]
    source = write_wan(tmp_path / "wan")
    spoil(source)
    with pytest.raises(CheckpointError, match=said):
        convert_wan(source, tmp_path / "out", size=32, clip_frames=17)
    assert not (tmp_path / "out").exists()


def test_16_frames_of_which_three_would_be_lost_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_wan(tmp_path / "wan")
    for frames in (16, 18, 32):
        flags = ["-o", str(tmp_path / "out"), "--size", "32", "--clip-frames", str(frames)]
        assert main(["convert", "wan", str(source), *flags]) == 2
        assert "4 n + 1 frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("downloaded", [True, False])
def test_the_card_has_revision_licence_and_hashes(
    tmp_path: Path, downloaded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source, rows = write_wan(tmp_path / "wan"), {"null": torch.randn(512, 8)}
    save_file(rows, tmp_path / "null.safetensors")
    if downloaded:  # as `hf download --local-dir` leaves a folder
        (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Wan\n")
        note = source / ".cache/huggingface/download/model_index.json.metadata"
        note.parent.mkdir(parents=True)
        note.write_text("0fad780a534b6463e45facd96134c9f345acfa5b\n" + "9" * 40 + "\n1733000000.0\n")
    convert_wan(source, tmp_path / "out", size=32, clip_frames=17, null_text=tmp_path / "null.safetensors")
    card = (tmp_path / "out/README.md").read_text()
    files = [*source.glob("*/diffusion_pytorch_model.safetensors"), tmp_path / "null.safetensors"]
    assert len(files) == 3
    assert all(hashlib.sha256(file.read_bytes()).hexdigest() in card for file in files)
    assert "19 new tensors" in card  # five in each of two blocks, and nine
    assert main(["info", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    if downloaded:
        assert "revision 0fad780a534b6463e45facd96134c9f345acfa5b" in card and "licence apache-2.0" in card
        assert "licence: apache-2.0" in printed
    else:
        assert "revision unknown" in card and "licence not named" in card and "licence: see the model card" in printed


def test_a_snapshot_of_the_hubs_cache_has_its_revision(tmp_path: Path) -> None:
    source = write_wan(tmp_path / "models--a--b/snapshots/0123abcd")
    report = convert_wan(source, tmp_path / "out", size=32, clip_frames=17)
    assert "revision 0123abcd" in report.notes


def test_the_null_prompt_may_come_from_a_file(tmp_path: Path) -> None:
    source, rows = write_wan(tmp_path / "wan"), torch.randn(512, 8)
    save_file({"null": rows}, tmp_path / "null.safetensors")
    convert_wan(source, tmp_path / "out", size=32, clip_frames=17, null_text=tmp_path / "null.safetensors")
    assert torch.equal(VideoTokenizer.from_pretrained(tmp_path / "out").denoiser.null_text[0], rows)
    save_file({"null": rows[:77]}, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="512 x 8"):
        convert_wan(source, tmp_path / "no", size=32, clip_frames=17, null_text=tmp_path / "short.safetensors")


def test_the_text_encoder_may_lie_elsewhere(tmp_path: Path) -> None:
    source = write_wan(tmp_path / "wan")
    convert_wan(source, tmp_path / "own", size=32, clip_frames=17)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(source / part, tmp_path / "umt5", dirs_exist_ok=True)
        shutil.rmtree(source / part)
    convert_wan(source, tmp_path / "out", size=32, clip_frames=17, text_encoder=tmp_path / "umt5")
    own, other = (VideoTokenizer.from_pretrained(tmp_path / name).denoiser.null_text for name in ("own", "out"))
    assert torch.equal(own, other) and own.any()


def test_shards_that_are_not_what_their_index_says_are_refused(tmp_path: Path) -> None:
    source = write_wan(tmp_path / "wan", "20KB")
    index = next((source / "transformer").glob("*.index.json"))
    places = json.loads(index.read_text())
    places["weight_map"]["no.such.weight"] = next(iter(places["weight_map"].values()))
    index.write_text(json.dumps(places))
    with pytest.raises(CheckpointError, match=r"1 tensors are not where it says, such as no\.such\.weight"):
        convert_wan(source, tmp_path / "out", size=32, clip_frames=17)
    next((source / "transformer").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"00002-.*no such file"):
        convert_wan(source, tmp_path / "out", size=32, clip_frames=17)
    pickled = tmp_path / "null.pt"
    torch.save({"null": torch.zeros(512, 8)}, pickled)
    with pytest.raises(CheckpointError, match=r"null\.pt"):
        convert_wan(write_wan(tmp_path / "other"), tmp_path / "out", size=32, clip_frames=17, null_text=pickled)
    assert not (tmp_path / "out").exists()


TOWER = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 30,
    "patch_size": 8,
}  # fmt: skip


def write_siglip(folder: Path) -> SiglipModel:
    """A model of random weights with both towers, whose picture is no whole number of patches, as so400m's is not."""
    torch.manual_seed(1)
    text = {**TOWER, "vocab_size": 12, "max_position_embeddings": 4, "projection_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**TOWER, "intermediate_size": 40})).eval()
    model.save_pretrained(folder)
    return model


def converted(source: Path, output: Path, tower: Path) -> VideoTokenizer:
    flags = ["-o", output, "--size", "32", "--clip-frames", "17", "--dtype", "float32", "--image-encoder", tower]
    assert main(["convert", "wan", *map(str, [source, *flags])]) == 0
    return VideoTokenizer.from_pretrained(output)


@torch.no_grad()
def test_a_siglip_tower_gives_the_features_of_its_own_library(tmp_path: Path) -> None:
    theirs = write_siglip(tmp_path / "siglip")
    made = converted(write_wan(tmp_path / "wan"), tmp_path / "out", tmp_path / "siglip")
    assert made.config.resampler is not None
    encoder = made.config.resampler.encoder
    assert (encoder.kind, encoder.heads, encoder.feed_forward, encoder.size) == ("siglip", 4, 40, 30)
    y, x, phases = np.arange(32)[:, None, None], np.arange(32)[None, :, None], np.arange(3)
    frame = (128 + 90 * np.sin(0.7 * x + phases) * np.cos(0.5 * y)).round().astype(np.uint8)
    processor = SiglipImageProcessor(size={"height": 30, "width": 30})
    pixels = torch.as_tensor(np.array(processor(frame)["pixel_values"][0]))[None]
    expected = theirs.vision_model(pixels).last_hidden_state
    read: list[torch.Tensor] = []
    made.encoder.tower.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    own = made.encoder(made._pixels_of(torch.from_numpy(frame)[None, None]))
    assert own.shape == expected.shape == (1, 9, 16)
    assert (own - expected).norm() < 0.02 * expected.norm()
    other = resized(made._pixels_of(torch.from_numpy(frame)[None, None]), 30)
    errors = [(scaled - pixels).abs().max().item() * 127.5 for scaled in (read[0], other)]
    assert errors[0] < 1.1 and errors[1] > 3, errors  # grey levels, to which the processor rounds twice
    torch.testing.assert_close(made.encoder.tower(pixels).last_hidden_state, expected)
    tokens = made.encode(torch.from_numpy(frame).expand(1, 17, -1, -1, -1))
    assert tokens.shape == (1, 2, 16, 1024) and tokens.isfinite().all()
    assert not any(p.requires_grad for p in made.encoder.parameters())
    assert "pools the image encoder" in (tmp_path / "out/README.md").read_text()


def test_a_tower_that_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    source = write_wan(tmp_path / "wan")
    write_siglip(tmp_path / "siglip")
    (tmp_path / "siglip/config.json").unlink()
    torch.manual_seed(2)
    CLIPVisionModel(CLIPVisionConfig(**{**TOWER, "image_size": 32})).save_pretrained(tmp_path / "quick")
    for tower, said in (("siglip", "config.json"), ("quick", "quick_gelu")):
        with pytest.raises(CheckpointError, match=said):
            convert_wan(source, tmp_path / "out", image_encoder=tmp_path / tower, size=32, clip_frames=17)


@torch.no_grad()
def test_a_clip_tower_has_the_heads_that_its_folder_says(tmp_path: Path) -> None:
    torch.manual_seed(2)
    theirs = CLIPVisionModel(CLIPVisionConfig(**{**TOWER, "image_size": 32, "hidden_act": "gelu"})).eval()
    theirs.save_pretrained(tmp_path / "clip")
    made = converted(write_wan(tmp_path / "wan"), tmp_path / "out", tmp_path / "clip")
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(made.encoder.tower(pixels).last_hidden_state, theirs(pixels).last_hidden_state)


def test_frames_need_not_be_square_with_an_image_encoder(tmp_path: Path) -> None:
    source = write_wan(tmp_path / "wan")
    write_siglip(tmp_path / "siglip")
    shape: dict[str, Any] = {"size": 32, "frame_width": 48, "clip_frames": 17}
    convert_wan(source, tmp_path / "out", image_encoder=tmp_path / "siglip", **shape)
    made = VideoTokenizer.from_pretrained(tmp_path / "out")
    assert made.config.frame_shape == (32, 48) and made.config.latent_shape == (8, 12)
    with pytest.raises(ValueError, match="frame_width"):
        convert_wan(source, tmp_path / "no", **shape)
    assert not (tmp_path / "no").exists()
