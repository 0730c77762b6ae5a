"""The published arrangement trains from a video prior, and language models from weights of `transformers`."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lm_text import CAPTIONS
from test_tokenizer import DENOISERS, RESAMPLER, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from toy_runs import SIZE, assert_same_checkpoint, loop, train_in_parts, write_cache, write_prior
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dicode.config import CheckpointError
from dicode.data.columns import CachedVideo
from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.library import body_differences, load_pretrained
from dicode.lm.presets import SIZES
from dicode.lm.text import IMAGE_ENTRIES, TextTokenizer
from dicode.seeds import generator_for
from dicode.tokenizer.presets import TOKENIZERS
from dicode.tokenizer.video_tokenizer import TokenizerParts, VideoTokenizer
from dicode.train.cached import frames_to_pixels
from dicode.train.lm import LanguageTraining
from dicode.train.runs import LanguageRun, LinearCodeRun, LoRAConfig, TokenizerRun, load_run
from dicode.train.stages import run_recipe
from dicode.train.tokenizer import TokenizerTraining

RECIPES = Path(__file__).parents[1] / "recipes/paper.py"
LANGUAGE_RECIPES = {  # what a recipe's body has with its name's vocabulary, in millions
    "gpt2_mini": 51.5, "distilgpt2": 81.9, "gpt2": 124.4, "gpt2_medium": 354.8, "gpt2_large": 774.0,
    "llama_1b": 1235.8, "llama_3b": 3212.7,
}  # fmt: skip


PRESET = TOKENIZERS["paper_tokenizer_256"]
PUBLISHED: dict[str, Any] = {  # the preset with every part tiny, as changes of `tiny_config`
    "tail_frame": PRESET.tail_frame,
    "null_tokens": PRESET.null_tokens,
    "denoiser": dataclasses.replace(DENOISERS["unet3d"], channels=(16, 32), context_frames=0),
    "objective": PRESET.objective,
    "sampling": dataclasses.replace(PRESET.sampling, steps=2),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and a folder `prior` as a converter writes it."""
    folder = tmp_path_factory.mktemp("paper")
    torch.set_num_threads(1)
    write_cache(folder / "cache", count=12)
    write_prior(folder / "prior", **PUBLISHED)
    return folder


def run(root: Path, **changes: Any) -> TokenizerRun:
    made = TokenizerRun(
        cache=str(root / "cache"),
        init=str(root / "prior"),
        model=tiny_config(resampler=RESAMPLER, **PUBLISHED),
        loop=dataclasses.replace(loop(4), optim=dataclasses.replace(loop(4).optim, batch_size=2)),
        token_noise=0.0,
    )
    return dataclasses.replace(made, **changes)


def test_a_prior_is_loaded_wholly(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = TokenizerTraining(run(root))
    held = load_file(root / "prior/tokenizer.safetensors")
    assert held.keys() == TokenizerParts(stage.module).state_dict().keys()
    for name, value in TokenizerParts(stage.module).state_dict().items():
        assert torch.equal(value, held[name]), name
    assert "random" not in capsys.readouterr().out


def test_resampler_and_denoiser_learn_and_nothing_else_moves(root: Path) -> None:
    stage = TokenizerTraining(run(root))
    batch = stage.batch(torch.arange(2), generator_for(0))
    before = {name: value.clone() for name, value in stage.module.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in stage.module.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(10):
        stage.module.train()
        loss, scalars = stage.loss(batch, generator_for(1))
        for part in (stage.module.encoder, stage.module.first_stage):
            assert not any(module.training for module in part.modules())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert scalars.keys() == {"denoising_loss"}
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, value in stage.module.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"resampler", "denoiser"}
    assert {name for name in before if name.startswith("resampler.")} <= moved
    assert "denoiser.null_text" not in moved


def test_the_tail_key_frame_is_the_clips_last_and_both_are_read_from_the_frames_drawn(root: Path) -> None:
    stage = TokenizerTraining(run(root, mirror=True))
    rows = torch.arange(len(stage.cache.frames)).float()[:, None, None, None]
    stage.latents = torch.stack([rows, -rows], dim=1)  # each tells its row, and by its sign whether it is mirrored
    batch = stage.batch(torch.arange(8), generator_for(2))
    assert batch["clips"].shape[:2] == (8, 16)
    drawn = torch.cat([batch["clips"][:, 0], batch["clips"][:, 15]]).flatten()
    assert (drawn < 0).any() and (drawn > 0).any()
    for pixels, row in zip(batch["keys"], drawn, strict=True):
        frame = frames_to_pixels(stage.cache.frames[int(row.abs())])
        assert torch.equal(pixels, frame if row > 0 else frame.flip(-1))


def test_dropped_clips_see_the_tokens_of_a_grey_image_and_teach_them(root: Path) -> None:
    stage = TokenizerTraining(run(root, drop_tokens=1.0))
    stage.module.train()
    batch = stage.batch(torch.arange(3), generator_for(0))
    told = []
    stage.module.denoiser.register_forward_pre_hook(lambda _, given: told.append(given[2].tokens))
    stage.loss(batch, generator_for(1))[0].backward()
    assert stage.module.resampler.proj_in.weight.grad is not None
    assert stage.module.resampler.proj_in.weight.grad.any()
    stage.module.eval()
    grey = torch.zeros(1, 3, SIZE, SIZE)
    expected = stage.module.tokens_of(grey).expand(6, -1, -1).unflatten(0, (3, 2))
    torch.testing.assert_close(told[0], expected)


def test_a_clip_is_read_with_the_stride_drawn_and_the_network_is_given_it(root: Path) -> None:
    """Stride 6 is 8 frames a second, which the cache has: lower ones would repeat frames and are not drawn."""
    stage = TokenizerTraining(run(root, frame_strides=(1, 9)))
    rows = torch.arange(len(stage.cache.frames)).float()[:, None, None, None]
    stage.latents = torch.stack([rows, rows], dim=1)
    given = []
    stage.module.denoiser.register_forward_pre_hook(lambda _, args: given.append(args[2].frame_stride))
    batch = stage.batch(torch.arange(8), generator_for(2))
    for clip, stride in zip(batch["clips"].flatten(1).long(), batch["frame_stride"].tolist(), strict=True):
        video = next(v for v in stage.cache.videos if v.first <= clip[0] < v.first + v.count)
        times = (clip - video.first) / 8
        apart = (times[0] + torch.arange(16) * stride / 48 - times + video.period_s / 2) % video.period_s
        assert (apart - video.period_s / 2).abs().max() < 1 / 8 + 1e-4  # the clip begins between two frames
    assert len(set(batch["frame_stride"].tolist())) > 1 and batch["frame_stride"].min() >= 6
    stage.latents = torch.randn(len(rows), 2, *stage.module.first_stage.encode(torch.zeros(1, 3, SIZE, SIZE)).shape[1:])
    batch = stage.batch(torch.arange(8), generator_for(2))
    stage.loss(batch, generator_for(1))
    assert torch.equal(given[0], batch["frame_stride"])
    assert set(TokenizerTraining(run(root)).batch(torch.arange(4), generator_for(0))["frame_stride"].tolist()) == {6.0}
    fast = CachedVideo("", "48 frames a second", (), False, False, 0, 480, 10.0)
    stage = TokenizerTraining(run(root, frame_strides=(1, 6)))
    assert {stage.places.stride_of(fast, generator_for(0, i)) for i in range(200)} == {1, 2, 3, 4, 5, 6}
    with pytest.raises(ValueError, match=r"frame_strides: expected two numbers from 1 on.*got \(3, 2\)"):
        TokenizerTraining(run(root, frame_strides=(3, 2)))


def test_a_run_is_refused_a_prior_that_predicts_something_else(root: Path) -> None:
    epsilon = dataclasses.replace(tiny_config(resampler=RESAMPLER, **PUBLISHED), objective="epsilon")
    with pytest.raises(ValueError, match=r"predicts v_prediction, the run trains epsilon.*objective v_prediction"):
        TokenizerTraining(run(root, model=epsilon))
    with pytest.raises(ValueError, match="predicts v_prediction, the run trains epsilon"):
        TokenizerTraining(run(root, model=epsilon, init_denoiser=str(root / "prior")))


def test_adapters_leave_the_resampler_as_it_is(root: Path) -> None:
    module = TokenizerTraining(run(root, lora=LoRAConfig(rank=2))).module
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    assert trained and all(name.startswith("denoiser.") and ".parametrizations." in name for name in trained)


def test_a_tokenizer_with_a_resampler_has_no_linear_code_to_fit(root: Path, tmp_path: Path) -> None:
    code = LinearCodeRun(str(root / "cache"), str(root / "prior"), tiny_config(resampler=RESAMPLER, **PUBLISHED))
    with pytest.raises(ValueError, match=r"model\.resampler and model\.code: expected neither"):
        run_recipe(code, tmp_path, {})


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """`root` with a short run of the tokenizer."""
    run_recipe(run(root), root / "tokenizer", {})
    return root


def test_resume_is_bit_exact(trained: Path, tmp_path: Path) -> None:
    train_in_parts(run(trained), tmp_path)
    assert_same_checkpoint(trained / "tokenizer", tmp_path, step=4)


def test_what_was_trained_encodes_and_decodes_clips_that_share_a_frame(trained: Path) -> None:
    tokenizer = VideoTokenizer.from_pretrained(trained / "tokenizer/best")
    frames = torch.randint(256, (1, 31, SIZE, SIZE, 3), dtype=torch.uint8)
    tokens = tokenizer.encode(frames)
    assert tokens.shape == (1, 3, 4, 6)
    torch.testing.assert_close(  # not normalised, as published
        tokens[:, 1], tokenizer.resampler(tokenizer.encoder(frames_to_pixels(frames[:, 15]))), atol=1e-5, rtol=1e-5
    )
    clips = list(tokenizer.decode(tokens))
    assert [clip.shape[1] for clip in clips] == [16, 15]
    assert list((trained / "tokenizer/sheets").iterdir())


# --- language models ---


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a folder was named, and the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)


def gpt2_vocabulary(folder: Path) -> int:
    """A little vocabulary in GPT-2's two files; returns its size."""
    entries = [*pre_tokenizers.ByteLevel.alphabet(), "ic", "ho", "Ġic", "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE({e: i for i, e in enumerate(entries)}, [("i", "c"), ("h", "o"), ("Ġ", "ic")]))
    tokenizer.model.save(str(folder))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    (folder / "as_json").mkdir()
    tokenizer.save(str(folder / "as_json/tokenizer.json"))
    return len(entries)


def llama_vocabulary(folder: Path) -> int:
    """A little vocabulary as Llama 3's: a begin of text before every text, special entries after the others."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    begin = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[begin])
    tokenizer.enable_truncation(5)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def save_body(kind: str, folder: Path, entries: int) -> GPT2LMHeadModel | LlamaForCausalLM:
    """A tiny model for text with `entries` entries, saved by `transformers`."""
    torch.manual_seed(5)
    none: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=entries, n_positions=64, n_embd=24, n_layer=2, n_head=3, n_inner=None, **none)
        )
    else:
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=entries, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=131_072, rms_norm_eps=1e-5, rope_parameters=rope, **none,
            )
        )  # fmt: skip
    for parameter in model.parameters():  # so that every tensor matters
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def body_config(kind: str, entries: int, /, **changes: Any) -> DeepLMConfig:
    config = DeepLMConfig(
        BodyConfig("gpt2", width=24, depth=2, heads=3),
        head=HeadConfig(components=2),
        positions=64,
        vocab_size=entries + 66,
        token_width=6,
        max_keyframes=6,
        text_length=12,
        tokens_per_keyframe=4,
    )
    if kind == "llama":
        config = dataclasses.replace(
            config,
            body=dataclasses.replace(
                config.body,
                kind="llama",
                heads=4,
                key_value_heads=2,
                feed_forward=40,
                rope_base=500000.0,
                rope_factor=32.0,
            ),
        )
    body = {name: changes.pop(name) for name in list(changes) if name in BodyConfig.__dataclass_fields__}
    return dataclasses.replace(config, body=dataclasses.replace(config.body, **body), **changes)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.usefixtures("no_network")
def test_a_body_of_transformers_says_what_it_said_and_new_entries_are_the_mean(kind: str, tmp_path: Path) -> None:
    theirs = save_body(kind, tmp_path, entries=50).base_model
    model = DeepTokenLM(body_config(kind, 50)).eval()
    load_pretrained(model.backbone, tmp_path)
    ids = torch.randint(50, (2, 12))
    with torch.no_grad():
        hidden = model.backbone(model.backbone.embed_text(ids))
        torch.testing.assert_close(hidden, theirs(input_ids=ids).last_hidden_state, atol=1e-5, rtol=1e-5)
        entries = theirs.get_input_embeddings().weight
        rows = model.backbone.embed_text(torch.arange(116)[None])[0]
    assert torch.equal(rows[:50], entries)
    torch.testing.assert_close(rows[50:], entries.mean(0).expand(66, -1))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gpt2", {"width": 12, "depth": 3}, r"n_embd: expected 12, got 24; n_layer: expected 3, got 2"),
        ("gpt2", {"heads": 2}, "n_head: expected 2, got 3"),
        ("gpt2", {"feed_forward": 50}, "n_inner: expected 50, got 96"),
        ("gpt2", {"positions": 100}, "n_positions: expected 100, got 64"),
        ("gpt2", {"vocab_size": 40}, "vocab_size: expected at most 40, got 50"),
        ("gpt2", {"kind": "llama"}, "model_type: expected llama, got gpt2"),
        ("llama", {"rope_base": 10_000.0}, r"rope_parameters: expected .*10000.0.*got .*500000.0"),
        ("llama", {"key_value_heads": 4}, "num_key_value_heads: expected 4, got 2"),
        ("llama", {"feed_forward": None}, "intermediate_size: expected 72, got 40"),
    ],
)
def test_another_body_is_an_error_that_names_what_differs(
    tmp_path: Path, kind: str, changes: dict[str, Any], said: str
) -> None:
    save_body(kind, tmp_path, entries=50)
    with pytest.raises(CheckpointError, match=said):
        load_pretrained(DeepTokenLM(body_config(kind, 50, **changes)).backbone, tmp_path)


def test_a_body_without_one_of_its_tensors_or_files_is_an_error(tmp_path: Path) -> None:
    save_body("gpt2", tmp_path, entries=50)
    model, weights = DeepTokenLM(body_config("gpt2", 50)), tmp_path / "model.safetensors"
    state = load_file(weights)
    state.pop("transformer.h.1.mlp.c_fc.bias")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.bias"):
        load_pretrained(model.backbone, tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_pretrained(model.backbone, tmp_path)


def test_llamas_vocabulary_gets_the_image_entries_and_no_begin_of_text(tmp_path: Path) -> None:
    count = llama_vocabulary(tmp_path)
    text = TextTokenizer.from_pretrained(tmp_path)
    assert (text.vocab_size, text.begin_id) == (count + 66, count + 1)
    assert text.tokenizer.id_to_token(text.pad_id) == "<|end_of_text|>"
    assert [text.tokenizer.id_to_token(count + i) for i in range(66)] == IMAGE_ENTRIES
    assert text.encode([""], 4).tolist() == [[text.pad_id] * 4]
    said = [i for i in text.encode(["a swirling ice vortex"], 40)[0].tolist() if i != text.pad_id]
    assert text.tokenizer.decode(said) == "a swirling ice vortex"
    text.save(tmp_path / "saved")
    for again in (TextTokenizer.load(tmp_path / "saved"), TextTokenizer.from_pretrained(tmp_path / "saved")):
        assert (again.vocab_size, again.encode(CAPTIONS, 20).tolist()) == (
            count + 66,
            text.encode(CAPTIONS, 20).tolist(),
        )


def test_gpt2s_vocabulary_is_the_same_from_either_kind_of_file(tmp_path: Path) -> None:
    count = gpt2_vocabulary(tmp_path)
    one, other = (TextTokenizer.from_pretrained(folder) for folder in (tmp_path, tmp_path / "as_json"))
    assert (one.pad_id, one.begin_id, one.vocab_size) == (count - 1, count + 1, count + 66)
    assert (one.pad_id, one.begin_id, one.vocab_size) == (other.pad_id, other.begin_id, other.vocab_size)
    assert one.encode(CAPTIONS, 30).tolist() == other.encode(CAPTIONS, 30).tolist()


def language_run(root: Path, kind: str, entries: int, **changes: Any) -> LanguageRun:
    made = LanguageRun(
        cache=str(root / "cache"),
        tokenizer=str(root / "tokenizer/best"),
        model=body_config(kind, entries),
        loop=loop(2),
        longer=(),
        longer_share=(),
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.usefixtures("no_network")
def test_a_language_model_trains_from_a_body_with_its_vocabulary(trained: Path, tmp_path: Path) -> None:
    entries = gpt2_vocabulary(tmp_path)
    save_body("gpt2", tmp_path, entries)
    run = language_run(trained, "gpt2", entries, body=str(tmp_path))
    run_recipe(run, tmp_path / "run", {})
    model = DeepTokenLM.from_pretrained(tmp_path / "run/best")
    assert model.text is not None
    assert (model.config.pad_id, model.config.begin_id) == (entries - 1, entries + 1)
    assert model.text.encode(CAPTIONS, 30).equal(TextTokenizer.from_pretrained(tmp_path).encode(CAPTIONS, 30))
    start = LanguageTraining(run).module.backbone.state_dict()  # two steps from it
    assert all((value - start[name]).abs().max() < 0.02 for name, value in model.backbone.state_dict().items())
    assert not (tmp_path / "run/sheets").exists()  # its tokens do not give back their key frames


def test_an_id_is_downloaded_and_says_where_it_failed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = llama_vocabulary(tmp_path)
    body, asked = save_body("llama", tmp_path, entries).base_model, []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        if name != "meta/llama":
            raise OSError("no such repository")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    stage = LanguageTraining(language_run(trained, "llama", entries, body="meta/llama"))
    assert torch.equal(stage.module.backbone.body.get_parameter("norm.weight"), body.norm.weight)
    assert asked[0][0] == "meta/llama" and "*.safetensors" in asked[0][1] and "*.bin" not in asked[0][1]
    with pytest.raises(CheckpointError, match=r"'no/model': download failed.*no such repository"):
        LanguageTraining(language_run(trained, "llama", entries, body="no/model"))


def test_a_run_from_scratch_takes_a_vocabulary_that_fits_and_only_one(trained: Path, tmp_path: Path) -> None:
    entries = gpt2_vocabulary(tmp_path)
    stage = LanguageTraining(language_run(trained, "gpt2", entries, vocabulary=str(tmp_path)))
    assert stage.text.vocab_size == entries + 66
    stage = LanguageTraining(language_run(trained, "gpt2", entries))  # learnt, and fewer than the model holds
    assert stage.text.pad_id == 0 and stage.text.vocab_size <= entries + 66
    with pytest.raises(ValueError, match=f"expected {entries + 66} or more, got {entries}"):
        LanguageTraining(language_run(trained, "gpt2", entries - 66, vocabulary=str(tmp_path)))
    with pytest.raises(ValueError, match="init and body: each brings a vocabulary"):
        LanguageTraining(language_run(trained, "gpt2", entries, init="runs/lm/best", body=str(tmp_path)))


# --- recipes ---


def test_the_tokenizer_recipe_is_the_published_one() -> None:
    run = load_run(f"{RECIPES}:paper_tokenizer_256")
    assert run.model == TOKENIZERS["paper_tokenizer_256"] and run.frame_strides == (1, 6)
    assert run.model.objective == "v_prediction"
    sampling = run.model.sampling
    assert (sampling.steps, sampling.eta, sampling.guidance_rescale, sampling.decoder_guidance) == (50, 1.0, 0.7, 7.5)
    with torch.device("meta"):
        model = VideoTokenizer(run.model)
    assert parameters_m(model.denoiser) == pytest.approx(1439, abs=1)
    assert parameters_m(model.encoder) == pytest.approx(631, abs=1)


@pytest.mark.parametrize("name", LANGUAGE_RECIPES)
def test_language_recipes_have_the_sizes_of_their_names(name: str) -> None:
    run = load_run(f"{RECIPES}:{name}")
    with torch.device("meta"):
        model = DeepTokenLM(run.model)
    entries = run.model.vocab_size - 66
    own = parameters_m(model.backbone) - 66 * run.model.body.width / 1e6
    assert own == pytest.approx(LANGUAGE_RECIPES[name], rel=1e-3)
    assert entries in (50_257, 128_256) and run.model.keyframe_limit >= max(run.longer)
    assert run.model == SIZES[name.replace("_", "-")]
    assert name != "gpt2_mini" or parameters_m(model) < 100


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12}),
        ("gpt2-medium", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
        ("gpt2-large", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
        ("llama-1b", {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64}),
        ("llama-3b", {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}),
    ],
)
def test_named_sizes_fit_the_bodies_of_their_names(name: str, theirs: dict[str, int]) -> None:
    """The values are those of the published config.json files, older spelling of rope included."""
    if name.startswith("gpt2"):
        published = GPT2Config(n_positions=1024, activation_function="gelu_new", vocab_size=50_257, **theirs)
    else:
        published = LlamaConfig(
            intermediate_size=8192, num_key_value_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5,
            rope_theta=500_000.0, vocab_size=128_256, hidden_act="silu", **theirs,
            rope_scaling={
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        )  # fmt: skip
    assert body_differences(SIZES[name], published) == []
    assert SIZES[name].vocab_size == published.vocab_size + 66


def parameters_m(module: torch.nn.Module) -> float:
    """Parameters, in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
