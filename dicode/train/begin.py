"""What a tokenizer's run begins with: weights of a checkpoint, another denoiser's, or what of them fits."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from dicode.checkpoint import load_state, load_weights, read_config, read_section, read_tensors
from dicode.config import config_from_dict
from dicode.tokenizer.config import FirstStageConfig, TokenizerConfig
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, WEIGHTS, TokenizerParts, VideoTokenizer
from dicode.train.runs import TokenizerRun

DENOISER, MOTION = "denoiser.", "motion"  # what the names of their tensors in a checkpoint begin with, or contain


def load_first_stage(tokenizer: VideoTokenizer, folder: Path) -> None:
    """Fill the first stage from a run or model. Raises `ValueError` where its configuration is another."""
    section, ours = read_config(folder), tokenizer.config.first_stage
    section = section["first_stage"] if "first_stage" in section else section["tokenizer"]["first_stage"]
    if (held := config_from_dict(FirstStageConfig, section)) != ours:
        raise ValueError(f"{folder} holds {held}, the recipe names {ours}")
    load_weights(tokenizer.first_stage, folder / FIRST_STAGE_WEIGHTS)


def start_from(tokenizer: VideoTokenizer, run: TokenizerRun) -> None:
    """Take the weights of `run.init`, all of them; where its denoiser is another network, ours starts afresh.

    So do motion tokens, and what reads them, where it has none. Raises `ValueError` for what a run would leave with
    random weights, and where the denoiser predicts another thing.
    """
    folder, adapts = Path(run.init), bool(run.lora.rank)
    if run.trains == "code" and "tokenizer" not in read_config(folder):
        return  # a first stage
    held, parts = read_section(folder, "tokenizer", TokenizerConfig), TokenizerParts(tokenizer)
    ours, moves = tokenizer.config.denoiser, tokenizer.config.motion is not None and held.motion is None
    if moves and (adapts or run.trains == "denoiser"):
        raise ValueError(
            f"lora and trains 'denoiser': {folder} has no motion tokens, the recipe names {tokenizer.config.motion}"
        )
    if run.trains == "code" and held.code != tokenizer.config.code:
        take_what_fits(parts, folder)
        return
    own = {name: t for name, t in parts.state_dict().items() if moves and MOTION in name}
    begins = ours.flow_map and not held.denoiser.flow_map
    # a stride is an input, no other network; a flow map begins as the denoiser that it is made from, of less guidance
    maps = {"flow_map": held.denoiser.flow_map or begins, "fused_guidance": ours.fused_guidance}
    if replace(held.denoiser, frame_stride=ours.frame_stride, **maps) == ours:  # type: ignore[arg-type]
        check_objective(tokenizer.config, held, folder)
        if not begins and not moves:
            load_weights(parts, folder / WEIGHTS)
            return
        state = widened(read_tensors(folder / WEIGHTS) | own, parts.state_dict())
        if begins:  # ends of jumps are embedded as times are: by `time` beside `until`, or by what holds `until`
            ends = [name for name in parts.state_dict() if name.startswith(DENOISER) and ".until." in name]
            times = {name: name.replace(".until.", ".time.") for name in ends}
            state |= {e: state[t] if t in state else state[e.replace(".until.", ".")] for e, t in times.items()}
        load_state(parts, state, str(folder / WEIGHTS))
        return
    if adapts:
        raise ValueError(f"lora: {folder} holds {held.denoiser}, the recipe names {ours}")
    kind = f"{held.denoiser.kind}{', a flow map' if held.denoiser.flow_map else ''}"
    print(f"{folder} holds another denoiser ({kind}): this one starts with random weights", flush=True)
    own |= {name: t for name, t in parts.state_dict().items() if name.startswith(DENOISER)}
    theirs = {name: t for name, t in read_tensors(folder / WEIGHTS).items() if not name.startswith(DENOISER)}
    load_state(parts, {**theirs, **own}, str(folder / WEIGHTS))


def take_what_fits(parts: TokenizerParts, folder: Path) -> None:
    """For a tokenizer with a new code: of a run's or model's weights those that do not depend on tokens' width."""
    ours, theirs = parts.state_dict(), read_tensors(folder / WEIGHTS)
    fitting = {name: t for name, t in theirs.items() if name in ours and t.shape == ours[name].shape}
    print(f"{folder}: {len(fitting)} of {len(ours)} tensors are taken; the others have random weights", flush=True)
    load_state(parts, ours | fitting, str(folder / WEIGHTS))


def widened(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a denoiser, with zeros for input channels that they lack: those of the expected clip."""
    found = dict(theirs)
    for name, tensor in theirs.items():
        if name in ours and tensor.ndim == 4 and (missing := ours[name].shape[1] - tensor.shape[1]) > 0:
            found[name] = functional.pad(tensor, (0, 0, 0, 0, 0, missing))
    return found


def take_denoiser(tokenizer: VideoTokenizer, folder: Path) -> None:
    """Begin with the denoiser of a model of other videos; where it reads no motion tokens, ours begins to.

    Raises `CheckpointError` where it is another network.
    """
    held = read_section(folder, "tokenizer", TokenizerConfig)
    check_objective(tokenizer.config, held, folder)
    tensors = read_tensors(folder / WEIGHTS).items()
    theirs = {name.removeprefix(DENOISER): t for name, t in tensors if name.startswith(DENOISER)}
    if not held.motion:
        ours = tokenizer.denoiser.state_dict()
        theirs = widened(theirs | {name: own for name, own in ours.items() if MOTION in name}, ours)
    load_state(tokenizer.denoiser, theirs, str(folder / WEIGHTS))


def check_places(wan: nn.Module, source: str) -> None:
    """Raise `ValueError` where the places that distinguish head from tail are zero, as diffusers leaves it."""
    if not wan.get_parameter("transformer.condition_embedder.image_embedder.pos_embed").any():
        raise ValueError(
            f"{source}: pos_embed is all zeros: head and tail are one; expected that of `dicode convert wan`"
        )


def check_objective(ours: TokenizerConfig, held: TokenizerConfig, folder: Path) -> None:
    """Raise `ValueError` where a denoiser to begin with predicts another thing than this run trains."""
    if ours.objective != held.objective:
        raise ValueError(
            f"{folder}: its denoiser predicts {held.objective}, the run trains {ours.objective}; what it has learnt "
            f"would be lost: train with --model.objective {held.objective}, or begin with one that predicts "
            f"{ours.objective}"
        )
