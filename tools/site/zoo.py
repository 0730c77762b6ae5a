"""The page of bundled models: sizes from their folders, time and memory from `results/`, the rest from their cards."""

import json
import re
from pathlib import Path

from dicode.checkpoint import CHECKPOINTS, read_section
from dicode.lm.config import DeepLMConfig
from dicode.sizing.count import size_lm, size_tokenizer
from dicode.tokenizer.config import TokenizerConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = "the example prompts on the page of `dicode serve`, 4 s, seed 0"  # python tools/examples_picture.py
PICTURES = {
    "blocks": ("blocks.webp", "the first two validation prompts of five sets that training never has, seed 0"),
    "sprites": ("sprites.webp", EXAMPLES),
    "world": ("world.webp", EXAMPLES),
}


def zoo_page() -> str:
    """A table of the models that generate, then each with its picture, and the network that measures."""
    head = ["", *(f"[`{name}`](models/{name}.md)" for name in PICTURES)]
    columns = [described(name) for name in PICTURES]
    rows = [[key, *(column[key] for column in columns)] for key in columns[0]]
    parts = [
        "# Models",
        "Three models that generate and one that measures are part of the package: nothing is downloaded. "
        '`--model NAME` or `DiCoDe.from_pretrained("NAME")` takes one of them, a folder, or `owner/name` on the Hub.',
        _table([head, *rows]),
        "Time and memory: `dicode evaluate NAME --parts speed`, medians of `results/NAME-speed.json`, which names "
        "the processor. For others `dicode info NAME` counts parameters, FLOPs and memory; [GPU](gpu.md) has rates.",
    ]
    for name, (picture, caption) in PICTURES.items():
        what = f"*{caption[0].upper()}{caption[1:]}; not selected.*"
        parts += [f"## {name}", _first_paragraph(name), *_commands(name), f"![videos and their prompts]({picture})"]
        parts += [f"{what} Figures, data, licences, limits: [card](models/{name}.md)."]
    parts += ["## tinyvt", f"{_first_paragraph('tinyvt')} [Card](models/tinyvt.md)."]
    return "\n\n".join(parts) + "\n"


def described(name: str) -> dict[str, str]:
    """The column of a model."""
    folder = CHECKPOINTS / name
    tokenizer, lm = read_section(folder, "tokenizer", TokenizerConfig), read_section(folder, "lm", DeepLMConfig)
    parameters = sum(size_tokenizer(tokenizer)["parameters"].values()) + sum(size_lm(lm)["parameters"].values())
    speed = json.loads((ROOT / f"results/{name}-speed.json").read_text(encoding="utf-8"))["values"]
    length_s, threads = speed["seconds_of_video"], speed["threads"]
    bytes_ = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "draws": _first_paragraph(name).split(":")[0].removeprefix("Text to video of "),
        "parameters": f"{parameters / 1e6:.1f} M",
        "on disk": f"{bytes_ / 1e6:.1f} MB",
        f"{length_s:g} s of video, {threads} CPU threads": f"{speed['median_s']['value']:.1f} s",
        "the whole process, loading included": f"{speed['process_s']['value']:.1f} s",
        "memory of the process": f"{speed['peak_memory_gib']['value']:.2f} GiB",
        "picture": f"{tokenizer.size}×{tokenizer.size}, {tokenizer.fps:g} fps",
        "tokens of a key frame": f"{tokenizer.tokens_per_keyframe} × {tokenizer.token_width}",
        "last image beyond one clip, loop": "yes" if lm.end_frame_conditioning else "no",
    }


def _first_paragraph(name: str) -> str:
    """What a card says below its title, without links and the brackets that hold them."""
    text = (CHECKPOINTS / name / "README.md").read_text(encoding="utf-8").split("\n# ", 1)[1]
    paragraph = " ".join(text.split("\n\n")[1].split())
    paragraph = re.sub(r" \([^()]*\[[^\]]*\]\([^)]*\)[^()]*\)", "", paragraph)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)


def _commands(name: str) -> list[str]:
    """The commands that a card begins with."""
    text = (CHECKPOINTS / name / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (dicode .*)$", text, re.MULTILINE)
    return ["```sh\n" + "\n".join(lines) + "\n```"]


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
