"""The published weights → a checkpoint folder of ours. Every tensor is used, or named with the reason why not."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from dicode import __version__
from dicode.checkpoint import headers_of, load_state, mismatches, model_folder, read_config, write_config
from dicode.config import CheckpointError, config_to_dict
from dicode.convert.configs import CLIP_HEAD_WIDTH, lm_size_of
from dicode.convert.files import State, read_weights, taken, without_prefix, write_tensors
from dicode.convert.names import clip_state, lm_state, unet_state, vae_state
from dicode.lm.deep_lm import WEIGHTS as LM_WEIGHTS
from dicode.lm.deep_lm import DeepLMConfig, DeepTokenLM
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
EXACT = ("latent_", "normalizer.", "denoiser.null_text")  # float32 whatever the rest is
START_OF_TEXT, END_OF_TEXT = 49_406, 49_407  # of CLIP's vocabulary; padding is 0 at OpenCLIP
UNET, VAE, RESAMPLER = "model.diffusion_model.", "first_stage_model.", "image_proj_model."
IMAGE_TOWER, TEXT_TOWER, LM = "embedder.model.visual.", "cond_stage_model.model.", "llm_agent."
TOKENIZER_PARTS = (UNET, VAE, RESAMPLER, IMAGE_TOWER, TEXT_TOWER)
LM_PARTS = ("llm.", "pre_input_resampler.", "input_resampler.", "output_resampler.", "video_pos_token.")
UNUSED = {  # what a tokenizer's file may hold beside its parts, and why nothing reads it
    r"(scale_arr|betas|.*alphas_cumprod.*|posterior_.*|lvlb_weights|logvar)": "noise schedule, computed here",
    r"embedder\.model\.(token_embedding|ln_final)\.\w+": "text half of the image tower's model",
    r"embedder\.model\.(positional_embedding|text_projection|attn_mask|logit_scale)": "the same",
    r"embedder\.(mean|std)": "constants of the image preprocessing",
}

LM_UNUSED = {  # the same of a language model's file
    r"llm\.lm_head\.weight": "words' output layer: deep tokens have their own",
    r"llm\.transformer\.h\.\d+\.attn\.(masked_)?bias": "causal mask",
}


@dataclass
class Report:
    """What became of a file's tensors."""

    used: dict[str, int] = field(default_factory=dict)  # part → numbers
    unused: dict[str, list[str]] = field(default_factory=dict)  # reason → names
    notes: list[str] = field(default_factory=list)

    def use(self, part: str, state: Mapping[str, Tensor]) -> None:
        """Note a part that is written."""
        self.used[part] = self.used.get(part, 0) + sum(value.numel() for value in state.values())

    def leave(self, reason: str, names: list[str]) -> None:
        """Note tensors that are not."""
        if names:
            self.unused.setdefault(reason, []).extend(names)

    def text(self) -> str:
        """A line a part, a reason and a note."""
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

    `clip` (OpenCLIP or transformers, file or folder) gives the towers that the tokenizer's file lacks. `vocabulary` is
    GPT-2's. The configurations default to the published tokenizer's and to the named size that the language model has.
    Raises `CheckpointError` with a list where a tensor is missing, misshapen, or neither used nor known to be needless;
    nothing is written then.
    """
    report = Report()
    sections: dict[str, Any] = {}
    writes: list[tuple[str, State]] = []
    resampler: State | None = None
    if tokenizer is not None:
        config = config or TOKENIZERS["paper_tokenizer_256"]
        first_stage, parts = tokenizer_states(tokenizer, config, clip, report)
        resampler = {n.removeprefix("resampler."): t for n, t in parts.items() if n.startswith("resampler.")}
        writes += [(FIRST_STAGE_WEIGHTS, first_stage), (WEIGHTS, parts)]
        sections |= tokenizer_sections(config, first_stage, parts, dtype)
    if lm is not None:
        if vocabulary is None:
            raise CheckpointError(
                "the language model reads GPT-2's vocabulary: name a folder with vocab.json and merges.txt"
            )
        state = language_state(lm, resampler, report)
        lm_config = lm_config or lm_size_of(state)
        lm_config = replace(lm_config, pad_id=vocabulary.pad_id, begin_id=vocabulary.begin_id)
        with torch.device("meta"):
            state = fitted(state, DeepTokenLM(lm_config), str(lm))
        writes.append((LM_WEIGHTS, state))
        sections["lm"] = config_to_dict(lm_config)
    if not writes:
        raise CheckpointError("nothing to convert: name the tokenizer's file, the language model's, or both")
    with model_folder(output, keep=True) as folder:
        for name, state in writes:
            write_tensors(folder / name, state, dtype, EXACT)
        if lm is not None and vocabulary is not None:
            vocabulary.save(folder)
        others = read_config(output) if (output / "config.json").is_file() else {}
        write_config(folder, {**others, **sections})
        write_card(folder, output, [path.name for path in (tokenizer, lm, clip) if path is not None], report)
    return report


def write_card(folder: Path, output: Path, sources: list[str], report: Report) -> None:
    """Say in README.md where the weights come from and what became of them; a card that is in `output` stays."""
    if not (output / "README.md").exists():
        head = "---\nlibrary_name: dicode\npipeline_tag: text-to-video\n---\n\n"
        made = (
            f"Converted by dicode {__version__} from {', '.join(sources)}; their licence holds for these weights too."
        )
        text = f"{head}# {output.resolve().name}\n\n{made}\n\n```\n{report.text()}\n```\n"
        (folder / "README.md").write_text(text, encoding="utf-8")


SCHEDULES = {
    "v_prediction": "predicts v on the schedule rescaled to zero terminal SNR",
    "epsilon": "predicts epsilon on the plain schedule, not rescaled to zero terminal SNR",
    "flow": "predicts the flow from latents to noise",
}


def tokenizer_sections(config: TokenizerConfig, first_stage: State, parts: State, dtype: torch.dtype) -> dict[str, Any]:
    """What `config.json` says of a tokenizer whose states are written in `dtype`."""
    saved = {
        name: value if name.startswith(EXACT) else value.to(dtype)
        for name, value in {**first_stage, **parts}.items()
        if not name.startswith("denoiser.")
    }
    stage, encoding = ({name: saved[name] for name in part if name in saved} for part in (first_stage, parts))
    return {
        "tokenizer": config_to_dict(config),
        "deep_tokens": hash_of_tokens(stage, encoding),
    }


def tokenizer_states(path: Path, config: TokenizerConfig, clip: Path | None, report: Report) -> tuple[State, State]:
    """The published tokenizer's file → the states of our first stage and of our `TokenizerParts`."""
    state = without_prefix(read_weights(path), TOKENIZER_PARTS, str(path))
    report.leave("the language model: name this file as --lm too", [name for name in state if name.startswith(LM)])
    taken(state, LM)
    unet, vae, resampler = (taken(state, part) for part in (UNET, VAE, RESAMPLER))
    image, text = towers(taken(state, IMAGE_TOWER), taken(state, TEXT_TOWER), clip, str(path), report)
    drop_unused(state, str(path), report)
    return joined(unet, vae, resampler, image, text, config, str(path), report)


def drop_unused(state: State, source: str, report: Report, known: Mapping[str, str] = UNUSED) -> None:
    """Take out what is known to be needless; raise `CheckpointError` with a list of what is left then."""
    for pattern, reason in known.items():
        names = [name for name in state if re.fullmatch(pattern, name)]
        report.leave(reason, names)
        for name in names:
            del state[name]
    if state:
        raise CheckpointError(f"{source}: {len(state)} tensors that no part has:\n  " + "\n  ".join(list(state)[:20]))


def joined(
    unet: State,
    vae: State,
    resampler: State,
    image: State,
    text: State,
    config: TokenizerConfig,
    source: str,
    report: Report,
) -> tuple[State, State]:
    """Public parts under their public names (`text` and `image` under transformers') → our two states, checked."""
    levels, depth = len(config.denoiser.channels), config.denoiser.depth
    try:
        denoiser = unet_state(unet, levels, depth)
        autoencoder = vae_state(vae, len(config.first_stage.channels))
    except KeyError as error:
        raise CheckpointError(f"{source}: no such network has a tensor {error}") from error
    tokens = config.resampler.queries * config.resampler.token_width
    channels = config.first_stage.latent_channels
    first_stage = {
        **{f"autoencoder.{name}": value for name, value in autoencoder.items()},
        "latent_mean": torch.zeros(channels),
        "latent_deviation": torch.full((channels,), 1 / LATENT_SCALE),
    }
    parts = {
        **{f"encoder.tower.{name}": value for name, value in image.items()},
        **{f"resampler.{name}": value for name, value in resampler.items()},
        # published tokens are read as the resampler gives them
        "normalizer.running_mean": torch.zeros(tokens),
        "normalizer.running_var": torch.full((tokens,), 1 - nn.BatchNorm1d(1).eps),
        "normalizer.num_batches_tracked": torch.zeros((), dtype=torch.int64),
        **{f"denoiser.{name}": value for name, value in denoiser.items()},
        "denoiser.null_text": null_text(text),
    }
    with torch.device("meta"):
        model = VideoTokenizer(config)
    first_stage = fitted(first_stage, model.first_stage, source)
    parts = fitted(parts, TokenizerParts(model), source)
    report.use("first stage", autoencoder)
    report.use("image encoder", image)
    report.use("resampler", resampler)
    report.use("denoiser", denoiser)
    report.notes.append(f"the denoiser {SCHEDULES[config.objective]} ({config.objective})")
    report.leave("text tower, of which the 77 null tokens are kept", list(text))
    return first_stage, parts


def towers(image: State, text: State, clip: Path | None, source: str, report: Report) -> tuple[State, State]:
    """Both CLIP towers under transformers' names, from the tokenizer's file or, where it lacks one, from `clip`."""
    text = dict(text)
    report.leave("causal mask", ["attn_mask"] if text.pop("attn_mask", None) is not None else [])
    own = {**{f"visual.{name}": value for name, value in image.items()}, **text}
    try:
        held = clip_state(own)
    except KeyError as error:
        raise CheckpointError(f"{source}: no CLIP has a tensor {error}") from error
    other = read_clip(clip) if clip else {}
    for tower, part in (("vision_model.", image), ("text_model.", text)):
        for name in [name for name in other if name.startswith(tower)]:
            if not part:
                held[name] = other[name]
            elif name in held and not torch.equal(held[name].float(), other[name].float()):
                raise CheckpointError(f"{source} and {clip} hold different towers, in {name}: leave one of them out")
    kept = {tower: taken(held, tower) for tower in ("vision_model.", "text_model.")}
    report.leave("projections to CLIP's common space", list(held))
    for tower, found in kept.items():
        if not found:
            raise CheckpointError(f"{source} holds no CLIP {tower.split('_')[0]} tower: name ViT-H/14 with --clip")
    return kept["vision_model."], kept["text_model."]


def is_transformers_clip(state: Mapping[str, Tensor]) -> bool:
    """Whether names are those of transformers' `CLIPModel`, not of OpenCLIP."""
    return any(name.startswith(("vision_model.", "text_model.")) for name in state)


def read_clip(path: Path) -> State:
    """A CLIP model's file or folder, of OpenCLIP or transformers → the state of transformers' `CLIPModel`."""
    state = read_weights(path)
    if is_transformers_clip(state):
        return {name: value for name, value in state.items() if not name.endswith(".position_ids")}
    try:
        return clip_state({name: value for name, value in state.items() if name != "attn_mask"})
    except KeyError as error:
        raise CheckpointError(f"{path}: neither OpenCLIP's names nor those of transformers: {error}") from error


@torch.no_grad()
def null_text(tower: Mapping[str, Tensor]) -> Tensor:
    """What OpenCLIP's text tower says of the empty prompt: its last layer but one, normalised, `1 77 1024`."""
    width = len(tower["final_layer_norm.weight"])
    depth = 1 + max(int(name.split(".")[2]) for name in tower if name.startswith("encoder.layers."))
    length = len(tower["embeddings.position_embedding.weight"])
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tower["embeddings.token_embedding.weight"]),
            hidden_size=width,
            intermediate_size=len(tower["encoder.layers.0.mlp.fc1.bias"]),
            num_hidden_layers=depth - 1,
            num_attention_heads=width // CLIP_HEAD_WIDTH["text"] or 1,
            max_position_embeddings=length,
            hidden_act="gelu",
        )
    ).eval()
    last = f"encoder.layers.{depth - 1}."
    load_state(model, {name: value for name, value in tower.items() if not name.startswith(last)}, "text tower")
    ids = torch.tensor([[START_OF_TEXT, END_OF_TEXT] + [0] * (length - 2)])
    return model(input_ids=ids).last_hidden_state


def language_state(path: Path, resampler: State | None, report: Report) -> State:
    """The published language model's file → the state of our `DeepTokenLM`.

    `resampler` is the tokenizer's; the file's second copy has to equal it.
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
    differing = [
        n for n, t in (resampler or copy).items() if n not in copy or not torch.equal(copy[n].float(), t.float())
    ]
    if copy and differing:
        raise CheckpointError(f"{path} was trained on another tokenizer: its resampler differs in {differing[:5]}")
    equal = "equal to the first" if resampler else "no tokenizer was named to compare it with"
    report.leave(f"second copy of the resampler, {equal}", list(copy))
    scale = state.pop("pre_normalizer", None)
    if scale is not None and not torch.equal(scale, torch.ones_like(scale)):
        raise CheckpointError(
            f"{path}: scales deep tokens by {scale.flatten()[:4].tolist()}…, which no model here does"
        )
    kept = {name: state.pop(name) for name in list(state) if not re.fullmatch("|".join(LM_UNUSED), name)}
    drop_unused(state, str(path), report, LM_UNUSED)
    renamed = lm_state(kept)
    report.use("language model", renamed)
    return renamed


def fitted(state: Mapping[str, Tensor], module: nn.Module, source: str) -> State:
    """`state` in the order of the module, which may be on the meta device.

    Raises `CheckpointError` where names or shapes are not those of the module.
    """
    if problems := mismatches(module, headers_of(state)):
        raise CheckpointError(f"{source}: {len(problems)} tensors do not fit:\n  " + "\n  ".join(problems[:20]))
    return {name: state[name] for name in module.state_dict()}
