"""The published weights and DynamiCrafter's → a checkpoint folder of ours; a report names every unused tensor."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from dicode import __version__
from dicode.checkpoint import headers_of, load_state, mismatches, read_config
from dicode.checkpoint.saving import model_folder, write_config
from dicode.config import CheckpointError, config_to_dict
from dicode.convert.files import State, read_weights, taken, without_prefix, write_tensors
from dicode.convert.names import clip_state, lm_state, unet_state, vae_state
from dicode.lm.config import DeepLMConfig
from dicode.lm.deep_lm import WEIGHTS as LM_WEIGHTS
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.presets import SIZES
from dicode.lm.text import TextTokenizer
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.presets import TOKENIZERS
from dicode.tokenizer.video_tokenizer import (
    FIRST_STAGE_WEIGHTS,
    WEIGHTS,
    TokenizerParts,
    VideoTokenizer,
    hash_of_tokens,
)

LATENT_SCALE = 0.18215  # of Stable Diffusion's autoencoder
EXACT = ("latent_", "denoiser.null_text")  # float32 whatever the rest is
START_OF_TEXT, END_OF_TEXT = 49_406, 49_407  # of CLIP's vocabulary; padding is 0 in OpenCLIP
CLIP_HEAD_WIDTH = {"vision": 80, "text": 64}  # of ViT-H/14: 16 heads in either tower
Prior = Literal["epsilon", "v_prediction"]  # the objectives of DynamiCrafter
UNET, VAE, RESAMPLER = "model.diffusion_model.", "first_stage_model.", "image_proj_model."
IMAGE_TOWER, TEXT_TOWER, LM = "embedder.model.visual.", "cond_stage_model.model.", "llm_agent."
TOKENIZER_PARTS = (UNET, VAE, RESAMPLER, IMAGE_TOWER, TEXT_TOWER)
LM_PARTS = ("llm.", "pre_input_resampler.", "input_resampler.", "output_resampler.", "video_pos_token.")
UNUSED = {  # in a tokenizer's file
    r"(scale_arr|betas|.*alphas_cumprod.*|posterior_.*|lvlb_weights|logvar)": "noise schedule, computed here",
    r"embedder\.model\.((token_embedding|ln_final)\.\w+|positional_embedding|text_projection|attn_mask|logit_scale)": (
        "text half of the image tower's model"
    ),
    r"embedder\.(mean|std)": "constants of the image preprocessing",
}
LM_UNUSED = {
    r"llm\.lm_head\.weight": "words' output layer: deep tokens have their own",
    r"llm\.transformer\.h\.\d+\.attn\.(masked_)?bias": "causal mask",
}


@dataclass
class Report:
    """The fate of a file's tensors."""

    used: dict[str, int] = field(default_factory=dict)  # part → count of numbers
    unused: dict[str, list[str]] = field(default_factory=dict)  # reason → names
    notes: list[str] = field(default_factory=list)
    licence: str | None = None  # of the weights, as their own card names it

    def use(self, part: str, state: Mapping[str, Tensor]) -> None:
        """Count a part that is written."""
        self.used[part] = self.used.get(part, 0) + sum(value.numel() for value in state.values())

    def leave(self, reason: str, names: list[str]) -> None:
        """Record tensors that are not."""
        if names:
            self.unused.setdefault(reason, []).extend(names)

    def text(self) -> str:
        """One line a part, a reason and a note."""
        lines = [f"  {part:<32}{count:>16,}" for part, count in self.used.items()]
        for reason, names in self.unused.items():
            lines.append(f"  not needed: {len(names)} ({reason}), such as {names[0]}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def convert_official(
    output: Path,
    tokenizer: Path | None = None,
    lm: Path | None = None,
    *,
    clip: Path | None = None,
    vocabulary: TextTokenizer | None = None,
    config: TokenizerConfig | None = None,
    lm_config: DeepLMConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Write the folder `output` from the published tokenizer, language model, or both.

    `clip` (OpenCLIP or transformers, file or folder) supplies towers that the tokenizer's file lacks; `vocabulary` is
    GPT-2's. Default configurations: the published tokenizer's, and the preset of the language model's size. Raises
    `CheckpointError` where a tensor is missing, misshapen or unknown; nothing is written then.
    """
    report = Report()
    sections: dict[str, Any] = {}
    states: dict[str, State] = {}
    if tokenizer is not None:
        config = config or TOKENIZERS["paper_tokenizer_256"]
        state = without_prefix(read_weights(tokenizer), TOKENIZER_PARTS, str(tokenizer))
        report.leave("the language model: name this file as --lm too", list(taken(state, LM)))
        public = {part: taken(state, part) for part in TOKENIZER_PARTS}
        drop_unused(state, str(tokenizer), report)
        states, sections = joined(public, config, clip, str(tokenizer), dtype, report)
    if lm is not None:
        if vocabulary is None:
            raise CheckpointError("the language model needs GPT-2's vocabulary: a folder with vocab.json, merges.txt")
        state = language_state(lm, states.get(WEIGHTS), report)
        lm_config = lm_config or lm_size_of(state)
        lm_config = replace(lm_config, pad_id=vocabulary.pad_id, begin_id=vocabulary.begin_id)
        with torch.device("meta"):
            states[LM_WEIGHTS] = fitted(state, DeepTokenLM(lm_config), str(lm))
        sections["lm"] = config_to_dict(lm_config)
    if not states:
        raise CheckpointError("nothing to convert: name the tokenizer's file, the language model's, or both")
    if (output / "config.json").is_file():
        sections = {**read_config(output), **sections}
    sources = [path for path in (tokenizer, lm, clip) if path is not None]
    write_model(output, states, sections, dtype, sources, report, vocabulary if lm else None, keep=True)
    return report


def convert_dynamicrafter(
    path: Path,
    output: Path,
    *,
    clip: Path | None = None,
    config: TokenizerConfig | None = None,
    objective: Prior | None = None,
    dtype: torch.dtype = torch.float32,
) -> Report:
    """DynamiCrafter's checkpoint → a folder from which to train a tokenizer of the published arrangement.

    The U-Net keeps its objective and schedule, `objective` or by the betas: DynamiCrafter-256 predicts epsilon on
    the plain schedule, 512 and 1024 v on that of zero terminal SNR. Its first convolution loses the half for latents of
    a given image; of its resampler's 16 queries for each of 16 frames those of the first stay.
    """
    config, report = config or TOKENIZERS["paper_tokenizer_256"], Report()
    state = without_prefix(read_weights(path), TOKENIZER_PARTS, str(path))
    public = {part: taken(state, part) for part in TOKENIZER_PARTS}
    if objective is None:
        if "betas" not in state:
            raise CheckpointError(
                f"{path}: expected 'betas', which determine the objective; name --objective epsilon for "
                "DynamiCrafter-256, v_prediction for 512 and 1024"
            )
        # zero terminal SNR has a last beta of 1 (Lin et al. 2024, algorithm 1), the plain schedule one of 0.012
        objective = "v_prediction" if float(state["betas"][-1]) > 0.999 else "epsilon"
    sampling = config.sampling if objective == "v_prediction" else config.sampling.changed(guidance_rescale=0.0)
    config = replace(config, objective=objective, sampling=sampling)
    if state.pop("scale_arr", None) is not None:
        report.leave("its latents shrink with the time step (dynamic rescale), ours do not", ["scale_arr"])
    drop_unused(state, str(path), report)
    unet, resampler = public[UNET], public[RESAMPLER]
    first, channels = "input_blocks.0.0.weight", config.first_stage.latent_channels
    if first not in unet or "latents" not in resampler:
        raise CheckpointError(f"{path}: expected DynamiCrafter's {UNET}{first} and {RESAMPLER}latents")
    if unet[first].shape[1] > channels:
        report.leave("reads the latents of a given image", [f"{UNET}{first}, input channels from {channels}"])
        unet[first] = unet[first][:, :channels]
    queries = config.tokens_per_keyframe
    if resampler["latents"].shape[1] > queries:
        report.leave("queries of later frames", [f"{RESAMPLER}latents, from {queries}"])
        resampler["latents"] = resampler["latents"][:, :queries]
    for name in [name for name in unet if name.endswith("attn2.to_k_ip.weight")]:
        unet.setdefault(name.replace("to_k_ip.weight", "alpha"), torch.zeros(()))  # scale 1 there; tanh(0) + 1 here
    states, sections = joined(public, config, clip, str(path), dtype, report)
    write_model(output, states, sections, dtype, [path], report)
    return report


def write_model(
    output: Path,
    states: Mapping[str, State],
    sections: Mapping[str, Any],
    dtype: torch.dtype,
    sources: Sequence[Path],
    report: Report,
    vocabulary: TextTokenizer | None = None,
    keep: bool = False,
) -> None:
    """Write a checkpoint folder, with the report in a model card where there is none yet; `keep` its other files."""
    with model_folder(output, keep=keep) as folder:
        for name, state in states.items():
            write_tensors(folder / name, state, dtype, EXACT)
        if vocabulary is not None:
            vocabulary.save(folder)
        write_config(folder, sections)
        if not (output / "README.md").exists():
            names = ", ".join(path.name for path in sources)
            licence = f"license: {report.licence}\n" if report.licence else ""
            (folder / "README.md").write_text(
                f"---\nlibrary_name: dicode\n{licence}pipeline_tag: text-to-video\n---\n\n# {output.resolve().name}\n\n"
                f"Converted by dicode {__version__} from {names}, whose licence holds for these weights too.\n\n"
                f"```\n{report.text()}\n```\n",
                encoding="utf-8",
            )


def drop_unused(state: State, source: str, report: Report, known: Mapping[str, str] = UNUSED) -> None:
    """Remove tensors known to be needless; raise `CheckpointError` if any is left."""
    for pattern, reason in known.items():
        names = [name for name in state if re.fullmatch(pattern, name)]
        report.leave(reason, names)
        for name in names:
            del state[name]
    if state:
        raise CheckpointError(f"{source}: {len(state)} tensors that no part has:\n  " + "\n  ".join(list(state)[:20]))


def joined(
    public: Mapping[str, State],
    config: TokenizerConfig,
    clip: Path | None,
    source: str,
    dtype: torch.dtype,
    report: Report,
) -> tuple[dict[str, State], dict[str, Any]]:
    """Public parts under their public names → our two states by their files, and the tokenizer's sections.

    Raises `CheckpointError` where they do not fit the networks of `config`.
    """
    image, text = towers(public[IMAGE_TOWER], public[TEXT_TOWER], clip, source, report)
    autoencoder = vae_state(public[VAE], len(config.first_stage.channels))
    denoiser = unet_state(public[UNET], config.denoiser.depth)
    channels = config.first_stage.latent_channels
    first_stage = {
        **{f"autoencoder.{name}": value for name, value in autoencoder.items()},
        "latent_mean": torch.zeros(channels),
        "latent_deviation": torch.full((channels,), 1 / LATENT_SCALE),
    }
    parts = {
        **{f"encoder.tower.{name}": value for name, value in image.items()},
        **{f"resampler.{name}": value for name, value in public[RESAMPLER].items()},
        **{f"denoiser.{name}": value for name, value in denoiser.items()},
        "denoiser.null_text": null_text(text),
    }
    with torch.device("meta"):
        model = VideoTokenizer(config)
    first_stage = fitted(first_stage, model.first_stage, source)
    parts = fitted(parts, TokenizerParts(model), source)
    from dicode.tokenizer.library import DROPOUT

    report.use("first stage", autoencoder)
    report.use("image encoder", image)
    report.use("resampler", public[RESAMPLER])
    report.use("denoiser", denoiser)
    report.notes.append(f"the denoiser's objective is {config.objective}")
    report.notes.append(f"its residual blocks drop out {DROPOUT:g} in training, as public")
    report.leave("text tower, of which the 77 null tokens are kept", list(text))
    encoding = {name: value for name, value in parts.items() if not name.startswith("denoiser.")}
    stage, encoding = (
        {name: value if name.startswith(EXACT) else value.to(dtype) for name, value in part.items()}
        for part in (first_stage, encoding)
    )
    sections = {"tokenizer": config_to_dict(config), "deep_tokens": hash_of_tokens(stage, encoding)}
    return {FIRST_STAGE_WEIGHTS: first_stage, WEIGHTS: parts}, sections


def towers(image: State, text: State, clip: Path | None, source: str, report: Report) -> tuple[State, State]:
    """Both CLIP towers under transformers' names, from the tokenizer's file or, where it lacks one, from `clip`."""
    report.leave("causal mask", [name for name in text if name == "attn_mask"])
    own = {name: value for name, value in text.items() if name != "attn_mask"}
    state = clip_state({**{f"visual.{name}": value for name, value in image.items()}, **own})
    other = read_clip(clip)[0] if clip else {}
    found = []
    for tower, part in (("vision_model.", image), ("text_model.", own)):
        theirs = taken(other, tower)
        ours = taken(state, tower) if part else theirs
        if differing := [n for n in ours.keys() & theirs if not torch.equal(ours[n].float(), theirs[n].float())]:
            raise CheckpointError(f"{source} and {clip} hold different towers ({differing[0]}): leave one out")
        if not ours:
            raise CheckpointError(f"{source} holds no CLIP {tower.split('_')[0]} tower: name ViT-H/14 with --clip")
        found.append(ours)
    projections = [name for name in state if name.endswith("_projection.weight") or name == "logit_scale"]
    report.leave("projections to CLIP's common space", projections)
    if unknown := state.keys() - set(projections):
        raise CheckpointError(f"{source}: no CLIP has a tensor {min(unknown)}")
    return found[0], found[1]


def read_clip(path: Path) -> tuple[State, bool]:
    """A CLIP model's file or folder → the state of transformers' `CLIPModel`, and whether it had OpenCLIP's names."""
    needless = ("attn_mask", ".position_ids")
    state = {name: value for name, value in read_weights(path).items() if not name.endswith(needless)}
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        return state, False
    return clip_state(state), True


def tower_sizes(state: Mapping[str, Tensor], tower: str, prefix: str) -> dict[str, Any]:
    """Sizes of one CLIP tower ("vision" or "text") by its weights; heads are as wide as those of ViT-H/14."""
    layers = re.compile(re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
    width = len(state[f"{prefix}encoder.layers.0.layer_norm1.weight"])
    return {
        "hidden_size": width,
        "intermediate_size": len(state[f"{prefix}encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": 1 + max(int(found[1]) for name in state if (found := layers.match(name))),
        "num_attention_heads": max(1, width // CLIP_HEAD_WIDTH[tower]),
        "hidden_act": "gelu",
    }


@torch.no_grad()
def null_text(tower: Mapping[str, Tensor]) -> Tensor:
    """OpenCLIP's text features of the empty prompt: the last layer but one, normalised, `1 77 1024`."""
    sizes = tower_sizes(tower, "text", "")
    words, places = (tower[f"embeddings.{kind}_embedding.weight"] for kind in ("token", "position"))
    last = sizes["num_hidden_layers"] = sizes["num_hidden_layers"] - 1
    config = CLIPTextConfig(**sizes, vocab_size=len(words), max_position_embeddings=len(places))
    model = CLIPTextModel(config).eval()
    kept = {name: value for name, value in tower.items() if not name.startswith(f"encoder.layers.{last}.")}
    load_state(model, kept, "text tower")
    ids = torch.tensor([[START_OF_TEXT, END_OF_TEXT] + [0] * (len(places) - 2)])
    return model(input_ids=ids).last_hidden_state


def language_state(path: Path, tokenizer: State | None, report: Report) -> State:
    """The published language model's file → the state of our `DeepTokenLM`.

    The file's second copy of the resampler has to equal that of the `tokenizer` (the state of `TokenizerParts`).
    """
    state = read_weights(path)
    if any(f".{LM}" in f".{name}" for name in state):
        state = without_prefix(state, (*TOKENIZER_PARTS, LM), str(path))
        others = [name for name in state if not name.startswith(LM)]
        report.leave("not the language model's: name this file as --tokenizer too", others)
        state = taken(state, LM)
    else:
        state = without_prefix(state, LM_PARTS, str(path))
    copy = taken(state, "pre_input_resampler.")
    first = {} if tokenizer is None else taken(dict(tokenizer), "resampler.")
    differing = [n for n, t in first.items() if n not in copy or not torch.equal(copy[n].float(), t.float())]
    if copy and differing:
        raise CheckpointError(f"{path} was trained on another tokenizer: its resampler differs in {differing[:5]}")
    equal = "equal to the first" if first else "no tokenizer was named to compare it with"
    report.leave(f"second copy of the resampler, {equal}", list(copy))
    scale = state.pop("pre_normalizer", None)
    if scale is not None and not torch.equal(scale, torch.ones_like(scale)):
        raise CheckpointError(f"{path}: scales deep tokens by {scale.flatten()[:4].tolist()}…, expected 1")
    kept = {name: state.pop(name) for name in list(state) if not re.fullmatch("|".join(LM_UNUSED), name)}
    drop_unused(state, str(path), report, LM_UNUSED)
    renamed = lm_state(kept)
    report.use("language model", renamed)
    return renamed


def lm_size_of(state: Mapping[str, Tensor]) -> DeepLMConfig:
    """The preset of a public language model's size, by its state under our names."""
    width = state["backbone.body.wte.weight"].shape[1]
    depth = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("backbone.body.h."))
    for size in SIZES.values():
        if (size.body.kind, size.body.width, size.body.depth) == ("gpt2", width, depth):
            return size
    raise CheckpointError(f"no preset of a language model has width {width} and depth {depth}")


def fitted(state: Mapping[str, Tensor], module: nn.Module, source: str) -> State:
    """`state` in the order of the module, which may be on the meta device.

    Raises `CheckpointError` where names or shapes are not those of the module.
    """
    if problems := mismatches(module, headers_of(state)):
        raise CheckpointError(f"{source}: {len(problems)} tensors do not fit:\n  " + "\n  ".join(problems[:20]))
    return {name: state[name] for name in module.state_dict()}
