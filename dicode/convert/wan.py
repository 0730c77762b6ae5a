"""A folder of Wan 2.1 or 2.2 as diffusers writes it → a checkpoint folder from which to train a tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.transformers.transformer_wan import WanImageEmbedding
from huggingface_hub import metadata_load
from torch import Tensor, nn

from dicode.checkpoint import read_tensors
from dicode.config import CheckpointError, config_to_dict
from dicode.convert.files import State, read_weights, taken
from dicode.convert.official import CLIP_HEAD_WIDTH, Report, fitted, read_clip, tower_sizes, write_model
from dicode.files import read_json, sha256_of
from dicode.tokenizer.config import (
    CodeConfig,
    DenoiserConfig,
    EncoderConfig,
    FirstStageConfig,
    ResamplerConfig,
    SamplingConfig,
    TokenizerConfig,
)
from dicode.tokenizer.encoder import Resampler
from dicode.tokenizer.learned_code import LearnedCode
from dicode.tokenizer.video_tokenizer import (
    FIRST_STAGE_WEIGHTS,
    WEIGHTS,
    TokenizerParts,
    VideoTokenizer,
    hash_of_tokens,
)
from dicode.tokenizer.wan import IMAGE_PATH, PATCH, TEXT_ROWS, WAVES

CLASSES = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}
# what the adapter is built for; a folder that says otherwise is another model
TRANSFORMER = {
    "patch_size": [*PATCH], "image_dim": None, "added_kv_proj_dim": None, "cross_attn_norm": True, "freq_dim": WAVES,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "pos_embed_seq_len": None, "rope_max_seq_len": 1024,
}  # fmt: skip
SIZES = (
    "in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "text_dim",
)  # fmt: skip
VAE_SIZES = (
    "base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "latents_mean", "latents_std",
)  # fmt: skip
VAE = {"attn_scales": [], "in_channels": 3, "out_channels": 3, "patch_size": None}
VAE_22 = {"attn_scales": [], "in_channels": 12, "out_channels": 12, "patch_size": 2}
TOKENS, TOKEN_WIDTH, CODE_WIDTH = 16, 1024, 64  # of a key frame; of features, and of latents
CLASS_TOKEN = "embeddings.class_embedding"  # which CLIP has, and SigLIP has not
TIME_SHIFT = {"wan": 3.0, "wan22": 5.0}  # as 2.1 samples 480 lines and fewer, and 2.2
STEPS = 24


def convert_wan(
    path: Path,
    output: Path,
    *,
    null_text: Path | None = None,
    text_encoder: Path | None = None,
    image_encoder: Path | None = None,
    size: int = 256,
    frame_width: int | None = None,
    clip_frames: int = 33,
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Write the folder `output` from a folder with `model_index.json`, `transformer/` and `vae/`, sharded or not.

    Deep tokens come from `image_encoder`, a tower of CLIP or SigLIP, by a resampler, or without one from the latents of
    key frames, by a learned code. Either has random weights, and so has what the transformer reads tokens by, which
    starts without effect.
    `null_text` is a safetensors file of the null prompt's rows, `text_encoder` a folder of UMT5 and its tokenizer to
    compute them by (default: `text_encoder/` and `tokenizer/` of the folder). Raises `CheckpointError` for another
    model, for pickles, and where a tensor is missing, misshapen or unknown; nothing is written then.
    """
    check_index(path)
    settings = checked(path / "transformer/config.json", TRANSFORMER, SIZES)
    residual = read_json(path / "vae/config.json").get("is_residual", False)
    vae = checked(path / "vae/config.json", VAE_22 if residual else VAE, VAE_SIZES)
    config = configured(settings, vae, path, image_encoder, (size, frame_width), clip_frames)
    report = Report()
    own, used = sharded(path / "transformer", report)
    autoencoder, more = sharded(path / "vae", report)
    parts = {f"denoiser.transformer.{name}": value for name, value in {**own, **image_path(own, config)}.items()}
    parts["denoiser.null_text"] = null_rows(path, null_text, text_encoder, config.denoiser.text_width)
    parts |= token_parts(config, image_encoder, report)
    stage = {f"autoencoder.{name}": value for name, value in autoencoder.items()}
    stage["latent_mean"] = torch.tensor(vae["latents_mean"])
    stage["latent_deviation"] = torch.tensor(vae["latents_std"])
    with torch.device("meta"):
        model = VideoTokenizer(config)
    stage = fitted(stage, model.first_stage, str(path / "vae"))
    parts = fitted(parts, TokenizerParts(model), str(path / "transformer"))
    report.use("first stage", autoencoder)
    report.use("denoiser", own)
    given = (*(f"denoiser.transformer.{name}" for name in own), "denoiser.null_text", "encoder.")
    new = {name: value for name, value in parts.items() if not name.startswith(given)}
    report.use("new, to be trained", new)
    added = [value for name, value in new.items() if any(part in name for part in IMAGE_PATH)]
    report.notes.append(f"by which it reads deep tokens: {len(added)} new tensors of {sum(map(Tensor.numel, added)):,}")
    report.notes += origin(path, report)
    beside = [file for file in (null_text, image_encoder) if file is not None]
    beside = [file for own in beside for file in (sorted(own.glob("*.safetensors")) if own.is_dir() else [own])]
    hashes = {**used, **more, **{str(file): sha256_of(file) for file in beside}}
    report.notes += [f"sha256 {digest}  {file}" for file, digest in sorted(hashes.items())]
    sections = {"tokenizer": config_to_dict(config), "deep_tokens": hash_of_tokens(stage, parts)}
    write_model(output, {FIRST_STAGE_WEIGHTS: stage, WEIGHTS: parts}, sections, dtype, [path], report)
    return report


def origin(path: Path, report: Report) -> list[str]:
    """Lines on where a folder is from: its revision on the Hub, and its licence, which the report keeps too."""
    metadata = path / ".cache/huggingface/download/model_index.json.metadata"  # of `hf download --local-dir`
    revision = path.resolve().name if path.resolve().parent.name == "snapshots" else None  # of the Hub's cache
    if metadata.is_file():
        revision = metadata.read_text(encoding="utf-8").partition("\n")[0].strip()
    card = path / "README.md"
    report.licence = (metadata_load(card) or {}).get("license") if card.is_file() else None
    return [f"revision {revision or 'unknown: not a download of the Hub'}", f"licence {report.licence or 'not named'}"]


def check_index(path: Path) -> None:
    """Raise `CheckpointError` unless the folder is of a pipeline with Wan's transformer and autoencoder."""
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    for part, expected in CLASSES.items():
        found = index.get(part)
        if not (isinstance(found, list) and len(found) == 2 and found[1] == expected):
            raise CheckpointError(f"{path}/model_index.json: expected {part} of class {expected}, got {found}")
    if (second := index.get("transformer_2")) not in (None, [None, None]):
        raise CheckpointError(f"{path}/model_index.json: expected one transformer, got transformer_2 {second} too")


def checked(path: Path, known: Mapping[str, Any], sizes: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a part. Raises `CheckpointError` where one is not as expected, or one of `sizes` lacks."""
    settings = read_json(path)
    if missing := sorted({*sizes} - settings.keys()):
        raise CheckpointError(f"{path}: expected {', '.join(missing)} too, as diffusers writes them")
    for name, expected in known.items():
        if name in settings and settings[name] != expected:
            raise CheckpointError(f"{path}: {name} is {settings[name]!r}, expected {expected!r}: another kind of Wan")
    return settings


def configured(
    settings: Mapping[str, Any],
    vae: Mapping[str, Any],
    path: Path,
    image_encoder: Path | None,
    frame: tuple[int, int | None],
    clip_frames: int,
) -> TokenizerConfig:
    """The tokenizer's configuration; the rate is such that a clip lasts two seconds."""
    if settings["in_channels"] != vae["z_dim"] or settings["out_channels"] != vae["z_dim"]:
        raise CheckpointError(
            f"{path}: transformer and vae have latents of {settings['in_channels']} and {vae['z_dim']}"
        )
    stages = vae["temperal_downsample"]
    if stages != [level >= len(stages) - 2 for level in range(len(stages))]:
        raise CheckpointError(f"{path}/vae: temperal_downsample {stages}, expected the last two stages")
    blocks = (vae["num_res_blocks"],)
    channels, residual = tuple(vae["base_dim"] * m for m in vae["dim_mult"]), vae.get("is_residual", False)
    kind: Literal["wan", "wan22"] = "wan22" if residual else "wan"
    stage = FirstStageConfig(kind, channels, vae["z_dim"], blocks, blocks, vae.get("decoder_base_dim"))
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    denoiser = DenoiserConfig(
        kind="wan",
        context_frames=1,
        depth=settings["num_layers"],
        heads=settings["num_attention_heads"],
        width=width,
        feed_forward=settings["ffn_dim"],
        text_width=settings["text_dim"],
        text_tokens=TEXT_ROWS,
        time_shift=TIME_SHIFT[kind],
    )
    resampler = None
    if image_encoder is not None:
        resampler = ResamplerConfig(encoder=encoder_of(image_encoder))
    return TokenizerConfig(
        size=frame[0],
        frame_width=frame[1],
        fps=(clip_frames - 1) / 2,
        clip_frames=clip_frames,
        tail_frame=clip_frames - 1,
        null_tokens="grey_image",
        tokens_per_keyframe=TOKENS,
        token_width=TOKEN_WIDTH if resampler else CODE_WIDTH,
        first_stage=stage,
        resampler=resampler,
        code=None if resampler else CodeConfig(width=512, depth=4, heads=8),
        denoiser=denoiser,
        sampling=SamplingConfig(steps=STEPS, decoder_guidance=3.0),
    )


def read_tower(path: Path) -> State:
    """An image tower of CLIP or SigLIP under its own names, from a file or folder of it alone or of both towers."""
    state = read_weights(path)
    if CLASS_TOKEN in state or "embeddings.patch_embedding.bias" in state:  # saved alone, by transformers from 5.0 on
        return {name: value for name, value in state.items() if not name.endswith(".position_ids")}
    if not (tower := taken(read_clip(path)[0], "vision_model.")):
        raise CheckpointError(f"{path}: expected an image tower of CLIP or SigLIP, got tensors such as {min(state)}")
    return tower


def encoder_of(path: Path) -> EncoderConfig:
    """Sizes of an image tower, by its weights, and by the `config.json` of its folder.

    Raises `CheckpointError` for a tower of SigLIP without one, which alone has the number of heads, and for a CLIP that
    does not compute as ViT-H/14 of OpenCLIP.
    """
    state = read_tower(path)
    file = path / "config.json"
    config = read_json(file) if file.is_file() else {}
    config = config.get("vision_config", config)
    sizes = tower_sizes(state, "vision", "")
    width, depth, between = (sizes[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    patch = state["embeddings.patch_embedding.weight"].shape[-1]
    places = len(state["embeddings.position_embedding.weight"])
    if CLASS_TOKEN in state:
        heads = config.get("num_attention_heads", max(1, width // CLIP_HEAD_WIDTH["vision"]))
        if (used := config.get("hidden_act", "gelu")) != "gelu" or between != 4 * width:
            raise CheckpointError(f"{path}: {used!r}, {between} numbers between layers: expected 'gelu', {4 * width}")
        return EncoderConfig(width, depth, heads, round((places - 1) ** 0.5) * patch, patch)
    if "num_attention_heads" not in config:
        raise CheckpointError(f"{path}: a tower of SigLIP: name the folder, with config.json and model.safetensors")
    # 384 pixels of so400m are 27.4 patches: the rest of a row is not read
    size = config.get("image_size", round(places**0.5) * patch)
    return EncoderConfig(width, depth, config["num_attention_heads"], size, patch, "siglip", between)


def sharded(folder: Path, report: Report) -> tuple[State, dict[str, str]]:
    """The tensors of a part, of one file or several, and the hashes of these."""
    name = "diffusion_pytorch_model.safetensors"
    files = [folder / name]
    expected: set[str] | None = None
    if (index := folder / f"{name}.index.json").is_file():
        places: dict[str, str] = read_json(index)["weight_map"]
        files = [folder / Path(file).name for file in sorted(set(places.values()))]  # never outside
        expected = set(places)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; safetensors are read, pickles are not")
    state = {key: value for file in files for key, value in read_tensors(file).items()}
    if expected is not None and (differing := expected ^ state.keys()):
        raise CheckpointError(f"{index}: {len(differing)} tensors are not where it says, such as {min(differing)}")
    return state, {f"{folder.name}/{file.name}": sha256_of(file) for file in files}


def image_path(state: State, config: TokenizerConfig) -> State:
    """What deep tokens are read by: keys as those of the text, values without effect, places small and random."""
    rows = 2 * config.tokens_per_keyframe
    torch.manual_seed(0)
    embedder = WanImageEmbedding(config.token_width, config.denoiser.width, pos_embed_seq_len=rows)
    nn.init.normal_(embedder.pos_embed, std=0.02)
    added = {f"condition_embedder.image_embedder.{name}": value for name, value in embedder.state_dict().items()}
    for number in range(config.denoiser.depth):
        own = f"blocks.{number}.attn2."
        for kind in ("weight", "bias"):
            added[f"{own}add_k_proj.{kind}"] = state[f"{own}to_k.{kind}"]
            added[f"{own}add_v_proj.{kind}"] = torch.zeros(()).expand(state[f"{own}to_v.{kind}"].shape)  # no memory
        added[f"{own}norm_added_k.weight"] = state[f"{own}norm_k.weight"]
    return added


def token_parts(config: TokenizerConfig, image_encoder: Path | None, report: Report) -> State:
    """What computes deep tokens: an image tower and a resampler, or a code of latents."""
    torch.manual_seed(0)
    if image_encoder is None:
        return {f"learned_code.{name}": value for name, value in LearnedCode(config).state_dict().items()}
    assert config.resampler is not None
    module = Resampler(config.resampler, config.tokens_per_keyframe, config.token_width)
    parts = {f"resampler.{name}": value for name, value in module.state_dict().items()}
    tower = read_tower(image_encoder)
    if config.resampler.encoder.kind == "siglip":
        report.leave("pools the image encoder's features, which are read one by one", [*taken(tower, "head.")])
    report.use("image encoder", tower)
    return parts | {f"encoder.tower.{name}": t for name, t in tower.items()}


def null_rows(path: Path, file: Path | None, text_encoder: Path | None, width: int) -> Tensor:
    """The embedding of the null prompt, `1 512 width`: its one token, then zeros."""
    if file is not None:
        held = read_tensors(file)
        rows = next(iter(held.values())) if len(held) == 1 else torch.empty(0)
        if tuple(rows.shape[-2:]) != (TEXT_ROWS, width) or rows.numel() != TEXT_ROWS * width:
            raise CheckpointError(
                f"{file}: expected one tensor of {TEXT_ROWS} x {width}, got {[[*t.shape] for t in held.values()]}"
            )
        return rows.float().reshape(1, TEXT_ROWS, width)
    encoder = text_encoder or path / "text_encoder"
    words = path / "tokenizer" if text_encoder is None else text_encoder
    if not (encoder / "config.json").is_file():
        raise CheckpointError(
            f"{encoder}: no text encoder; name one with --text-encoder, or a file of the rows with --null-text"
        )
    from transformers import AutoTokenizer, UMT5EncoderModel

    ids = AutoTokenizer.from_pretrained(words, local_files_only=True)("", return_tensors="pt").input_ids
    model = UMT5EncoderModel.from_pretrained(encoder, local_files_only=True, use_safetensors=True).eval()
    with torch.no_grad():
        rows = model(ids).last_hidden_state.float()
    if rows.shape[-1] != width:
        raise CheckpointError(f"{encoder}: rows of {rows.shape[-1]} numbers, the transformer reads {width}")
    return nn.functional.pad(rows, (0, 0, 0, TEXT_ROWS - rows.shape[1]))
