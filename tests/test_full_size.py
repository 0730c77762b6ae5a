"""The published sizes with random weights, converted, loaded and run. Hours of nothing to a laptop: run it by name.

    python -m pytest tests/test_full_size.py -m slow -s

It needs 24 GiB of memory and 30 GB of disk, and writes what it measured to results/full-size.json.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from published import weights_of
from torch import Tensor

from dicode.convert.names import clip_state, lm_state, unet_state, vae_state
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.presets import SIZES
from dicode.tokenizer.presets import TOKENIZERS
from dicode.tokenizer.video_tokenizer import VideoTokenizer

PAPER = TOKENIZERS["paper_tokenizer_256"]
GIB = 2**30


def public_unet_names() -> list[str]:
    """Names of DynamiCrafter-256's U-Net: the modules' insides as in the reference, their arrangement as published."""
    inside: dict[str, set[str]] = {}
    for name in weights_of("unet"):
        side, block, part, rest = (name + "....").split(".", 3)
        inside.setdefault(f"{side}.{block}.{part}", set()).add(rest.rstrip("."))
    residual, spatial, temporal = (inside[f"input_blocks.1.{part}"] for part in range(3))
    residual = {name for name in residual if not name.startswith("skip_connection")}
    skip = {"skip_connection.weight", "skip_connection.bias"}
    names = [n for n in weights_of("unet") if n.split(".")[0] not in ("input_blocks", "output_blocks")]
    names += ["input_blocks.0.0.weight", "input_blocks.0.0.bias"]
    channels, layers = PAPER.denoiser.channels, PAPER.denoiser.depth
    attended = range(len(channels) - 1)

    def modules(block: str, level: int, widens: bool) -> list[str]:
        made = [f"{block}.0.{name}" for name in residual | (skip if widens else set())]
        if level in attended:
            made += [f"{block}.1.{name}" for name in spatial] + [f"{block}.2.{name}" for name in temporal]
        return made

    block, stack = 1, [channels[0]]
    for level, width in enumerate(channels):
        for _ in range(layers):
            names += modules(f"input_blocks.{block}", level, stack[-1] != width)
            stack.append(width)
            block += 1
        if level < len(channels) - 1:
            names += [f"input_blocks.{block}.0.op.{kind}" for kind in ("weight", "bias")]
            stack.append(width)
            block += 1
    block = 0
    for level in reversed(range(len(channels))):
        for layer in range(layers + 1):
            names += modules(f"output_blocks.{block}", level, widens=True)
            if level and layer == layers:
                part = 3 if level in attended else 1
                names += [f"output_blocks.{block}.{part}.conv.{kind}" for kind in ("weight", "bias")]
            block += 1
    return names


def public_vae_names() -> list[str]:
    """Names of Stable Diffusion's autoencoder, likewise."""
    names = [n for n in weights_of("vae") if ".down." not in n and ".up." not in n]
    kinds = ("weight", "bias")
    for side, levels in (("encoder.down", range(4)), ("decoder.up", range(4))):
        for level in levels:
            for layer in range(2 if side == "encoder.down" else 3):
                parts = ["norm1", "conv1", "norm2", "conv2"]
                wider = level in (1, 2) if side == "encoder.down" else level in (0, 1)
                parts += ["nin_shortcut"] if layer == 0 and wider else []
                names += [f"{side}.{level}.block.{layer}.{part}.{kind}" for part in parts for kind in kinds]
            scaling = ("downsample", level < 3) if side == "encoder.down" else ("upsample", level > 0)
            if scaling[1]:
                names += [f"{side}.{level}.{scaling[0]}.conv.{kind}" for kind in kinds]
    return names


def random_like(shape: torch.Size) -> Tensor:
    return torch.randn(shape) * (0.02 if len(shape) > 1 else 0.01) + (0.0 if len(shape) > 1 else 0.5)


def filled(names: list[str], shapes: dict[str, torch.Size], rename: object, widened: str = "a^") -> dict[str, Tensor]:
    """Random tensors under public names, each of the shape that its renamed self has with us."""
    state = {}
    for name in names:
        (ours,) = rename({name: torch.zeros(1, 1, 1, 1)})  # type: ignore[operator]
        shape = shapes[ours]
        state[name] = random_like(torch.Size((*shape, *(1,) * widened_by(name, widened))))
    return state


def widened_by(name: str, pattern: str) -> int:
    """How many axes of length 1 the public tensor has at its end: projections are convolutions there."""
    if re.fullmatch(r"init_attn\.0\.proj_(in|out)\.weight", name):
        return 1
    return 2 if re.fullmatch(pattern, name) else 0


def write_published(folder: Path) -> tuple[Path, Path]:
    with torch.device("meta"):
        model = VideoTokenizer(PAPER)
        lm = DeepTokenLM(SIZES["gpt2-large"])
    unet = {n: t.shape for n, t in model.denoiser.state_dict().items()}
    vae = {n: t.shape for n, t in model.first_stage.autoencoder.state_dict().items()}
    state = {
        f"model.diffusion_model.{n}": t
        for n, t in filled(public_unet_names(), unet, lambda s: unet_state(s, 2)).items()
    }
    for name, value in filled(
        public_vae_names(), vae, lambda s: vae_state(s, 4), r".*attn_1\.(q|k|v|proj_out)\.weight"
    ).items():
        state[f"first_stage_model.{name}"] = value
    resampler = {n: random_like(t.shape) for n, t in model.resampler.state_dict().items()}
    state |= {f"image_proj_model.{name}": value for name, value in resampler.items()}
    state |= {f"embedder.model.visual.{n}": t for n, t in open_clip_tower(1280, 32, 14, 257).items()}
    state |= {f"cond_stage_model.model.{n}": t for n, t in open_clip_text(1024, 24).items()}
    torch.save(state, folder / "pytorch_model.bin")
    del state
    words = {n: random_like(t.shape) for n, t in lm.state_dict().items()}
    backwards = {
        "backbone.body.": "llm.transformer.",
        "embedding.mlp.": "input_resampler.",
        "head.mlp.": "output_resampler.",
    }
    public = {}
    for name, value in words.items():
        for ours, theirs in backwards.items():
            name = name.replace(ours, theirs)
        public[name] = value
    public["video_pos_token.frame_token"] = public.pop("embedding.keyframe")[:, None]
    public["video_pos_token.pos_token"] = public.pop("embedding.place")[None]
    assert lm_state(public).keys() == lm.state_dict().keys()
    public |= {f"pre_input_resampler.{name}": value for name, value in resampler.items()}
    public["llm.lm_head.weight"] = public["llm.transformer.wte.weight"]
    torch.save({f"llm_agent.{name}": value for name, value in public.items()}, folder / "gpt2_large.bin")
    return folder / "pytorch_model.bin", folder / "gpt2_large.bin"


def open_clip_blocks(prefix: str, width: int, depth: int) -> dict[str, Tensor]:
    shapes = {
        "ln_1": (width,),
        "ln_2": (width,),
        "attn.in_proj_": (3 * width, width),
        "attn.out_proj": (width, width),
        "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }
    state = {}
    for layer in range(depth):
        for name, shape in shapes.items():
            joint = "" if name.endswith("_") else "."
            where = f"{prefix}transformer.resblocks.{layer}.{name}{joint}"
            state[f"{where}weight"], state[f"{where}bias"] = random_like(torch.Size(shape)), torch.zeros(shape[0])
    return state


def open_clip_tower(width: int, depth: int, patch: int, places: int) -> dict[str, Tensor]:
    ends = {
        "class_embedding": (width,),
        "positional_embedding": (places, width),
        "conv1.weight": (width, 3, patch, patch),
        "ln_pre.weight": (width,),
        "ln_pre.bias": (width,),
        "ln_post.weight": (width,),
        "ln_post.bias": (width,),
        "proj": (width, 1024),
    }
    state = {name: random_like(torch.Size(shape)) for name, shape in ends.items()}
    state |= open_clip_blocks("", width, depth)
    assert clip_state({f"visual.{name}": value for name, value in state.items()})
    return state


def open_clip_text(width: int, depth: int) -> dict[str, Tensor]:
    ends = {
        "token_embedding.weight": (49_408, width),
        "positional_embedding": (77, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, 1024),
        "logit_scale": (),
    }
    return {name: random_like(torch.Size(shape)) for name, shape in ends.items()} | open_clip_blocks("", width, depth)


def gpt2_vocabulary(folder: Path) -> Path:
    """As many entries as GPT-2's own, less its end of text."""
    words = {f"word{i}": i for i in range(50_256)}
    letters = list("abcdefghijklmnopqrstuvwxyzĠ")
    for i, letter in enumerate(letters):
        words[letter] = words.pop(f"word{i}")
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def in_own_process(code: str, *arguments: object) -> dict[str, float]:
    """Run code that prints its figures as JSON; adds its seconds."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": round(time.monotonic() - started, 1)}


CONVERT = """
import json, resource, sys
from dicode.cli.app import main
flags = zip(("--tokenizer", "--lm", "--vocabulary", "-o"), sys.argv[1:], strict=True)
assert main(["convert", "official", *(word for flag in flags for word in flag)]) == 0
print(json.dumps({"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""
RUN = """
import json, resource, sys, time
import torch
from dicode.pipeline import DiCoDe
started = time.monotonic()
model = DiCoDe.from_pretrained(sys.argv[1])
loaded_s = time.monotonic() - started
ids = model.text.encode(["a dog"], 80)
started = time.monotonic()
first = next(model.lm.generate(ids, 1, sampling=model.sampling))
key_frame_s = time.monotonic() - started
assert first.shape == (1, 16, 1024) and first.isfinite().all()
pair = torch.stack([first, first], dim=1)
tokenizer = model.tokenizer
noisy = torch.randn(1, 16, 4, 32, 32)
started = time.monotonic()
with torch.no_grad():
    said = tokenizer.denoiser(noisy, torch.tensor([981.0]), tokenizer.conditioning(pair))
step_s = time.monotonic() - started
assert said.shape == noisy.shape and said.isfinite().all()
counts = {name: getattr(tokenizer, name) for name in ("denoiser", "encoder", "resampler", "first_stage")}
counts["lm"] = model.lm
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"peak_gib": peak, "load_s": loaded_s, "key_frame_s": key_frame_s, "denoising_step_s": step_s,
    "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in counts.items()}}))
"""


@pytest.mark.slow
def test_published_sizes_convert_load_and_run_within_24_gib(tmp_path: Path) -> None:
    tokenizer, lm = write_published(tmp_path)
    largest = max(path.stat().st_size for path in (tokenizer, lm)) / GIB
    out = tmp_path / "out"
    converted = in_own_process(CONVERT, tokenizer, lm, gpt2_vocabulary(tmp_path), out)
    ran = in_own_process(RUN, out)
    figures = {
        "command": "python -m pytest tests/test_full_size.py -m slow",
        "largest_file_gib": largest,
        "convert": converted,
        "load_and_run": ran,
    }
    print(json.dumps(figures, indent=2))
    results = Path(__file__).parent.parent / "results" / "full-size.json"
    results.write_text(json.dumps(figures, indent=2) + "\n")
    assert converted["peak_gib"] < 1.5 * largest
    assert ran["peak_gib"] < 24
    assert ran["parameters"]["denoiser"] == pytest.approx(1.44e9, rel=0.01)  # type: ignore[index]
