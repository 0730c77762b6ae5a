"""Command lines: the ones that once failed, then random ones of every command, its flags, and odd values and files.

A traceback, an error of more than a line or of Python's own words, silence, and a file that was there and is gone are
faults.
"""
# ruff: noqa: E501  tables of words

import csv
import dataclasses
import io
import os
import random
import re
import shutil
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from . import guarded
from .models import write_tiny

FOUND = """
generate \udcff\udcfe -o new.mp4
generate x --seconds 1e308 | generate x --scale 100000 | generate x --steps 1000000000 | generate x --device meta
generate x --guidance nan | generate x --seconds nan | generate x --motion-scale inf | generate x --seed -1
generate --storyboard deep.yaml | generate --storyboard bomb.yaml | generate --storyboard latin1.txt
generate --storyboard fifo | generate --prompts fifo | generate --prompts binary.bin | generate --prompts empty.txt
generate x --sheet x.txt --model model --seconds 1 | generate x --preview -o frames --model model --seconds 1
generate x --image fifo --model model | generate x --image binary.bin --model model | generate x --image /dev/zero --model model
generate x --continue-from clips --model model | generate x --model recipe.py | generate x --model fifo
generate x -o notes.md | generate x -o clips --model model | generate x -o . --model model | generate x -o /dev/null --model model
generate x -o /dev/full/a.mp4 --model model | generate x -o image.png --model model
finetune clips -o model --batch-size 0 | finetune clips -o clips --steps 1 | finetune clips -o new --steps 1000000000 --lr nan
finetune fifo -o new | finetune -o new | finetune clips -o notes.md | finetune clips -o "" --steps 1
info --micro-batches 0 | info recipe.py | info nothing.py | info notes.md | info broken.py | info raises.py | info model --gpus 0
info recipe.py:gone | info recipe.py:odd | info model --mfu nan | info model --json no/where.json | info plain.py
train --run-folder X recipe.py:odd | train recipe.py | train broken.py:lm | train raises.py:lm | train deeprecipe.py:lm
train tokenizers.py:lm | train recipe.py:odd --steps nan | train recipe.py:odd --steps x | train recipe.py:strict --share 7
train | train --run-folder X | train fifo | train recipe.py:number | train recipe.py:looping | train exits.py:lm
data cache clips -o "" | data cache clips -o model | data cache clips -o clips | data cache clips -o new --size 100000
data cache clips -o new --dedupe -1 | data cache clips -o new --workers 0 | data cache bigfield -o new | data index deep
data cache clips -o notes.md | data index fifo | data index bigfield | data index . | data sheet clips -o x.txt | data index
data verify clips | data verify notes.md | data encode clips | data export clips -o new | data sheet clips -o clips
assemble model model -o clips | assemble model model -o . | assemble model model -o model --dtype int8 | assemble clips model -o new
assemble model model -o notes.md | assemble model model -o new --context-key-frames -1 | assemble model model -o ""
convert vae binary.bin -o new | convert clip model -o model | convert official -o new | convert official --lm fifo -o new
convert dynamicrafter pickled.bin -o new | convert vae fifo -o new | convert official --tokenizer notes.md -o clips
evaluate model --cache clips | evaluate model --cache nowhere --repeats 0 | evaluate model --cache clips --features I3D=binary.bin
benchmark vbench notes.md -o clips --model model --shard 9/4 | benchmark ucf101 clips -o new.json | benchmark msrvtt clips -o clips
reconstruct tokens.safetensors --model model -o new.mp4 | reconstruct binary.bin | reconstruct model/lm.safetensors --model model
tokenize clips -o notes.md | tokenize clips --model model -o model/lm.safetensors.mp4 | tokenize fifo --model model
"""
COMMANDS = {
    "generate": ("Generate", 0), "tokenize": ("Tokenize", 1), "reconstruct": ("Reconstruct", 1), "train": ("Train", 1),
    "finetune": ("Finetune", 1), "assemble": ("Assemble", 2), "evaluate": ("Evaluate", 1),
    "info": ("Info", 1), "benchmark ucf101": ("Ucf101", 1), "benchmark msrvtt": ("Msrvtt", 1),
    "benchmark vbench": ("Vbench", 1), "data index": ("Index", 1), "data cache": ("Cache", 1),
    "data verify": ("Verify", 1), "data encode": ("Encode", 1), "data export": ("Export", 1), "data sheet": ("Sheet", 1),
    "convert official": ("Official", 0), "convert dynamicrafter": ("Dynamicrafter", 1), "convert clip": ("Clip", 1),
    "convert vae": ("Vae", 1),
}  # fmt: skip
# What would be legal and take long, or start processes: given last, so that it holds whatever was drawn before.
SHORT = {
    "generate": "--model model --seconds 0.5 --steps 1",
    "finetune": "--model model --steps 1 --batch-size 1 --rank 1",
    "evaluate": "--cache nowhere",
    "data cache": "--workers 1",
    "benchmark vbench": "--samples 1 --seconds 0.5 --model model",
}
SKIPPED = ("ray", "here", "work_folder", "all", "revision", "run")  # and what would leave the folder of the test
POSITIONAL = ("prompt", "input", "folder", "folders", "recipe", "tokenizer", "lm", "caches", "checkpoint")
WORDS = (
    "x",
    "",
    " ",
    "\udcff",
    "日本",
    "a" * 300,
    "None",
    "true",
    "../..",
    "[2s: x",
    "{}",
    "=",
    "%s",
    "-",
    "sprites",
    "0/0",
)
NUMBERS = (
    "0", "-1", "1", "2", "0.5", "nan", "inf", "-inf", "1e308", "-1e-9", "1e9", "100000", "9" * 40, "0x10", "1_0", "٣", "",
)  # fmt: skip
FILES = (
    "model", "clips", "notes.md", "empty.txt", "latin1.txt", "binary.bin", "deep.yaml", "bomb.yaml", "fifo", "dir", "image.png",
    "clips/captions.jsonl", "recipe.py:odd", "broken.py", "recipe.py", "nowhere", "no/where", ".", "/", "", "loop", "deep",
    "prompts.txt", "board.yaml", "tokens.safetensors", "model/config.json", "/dev/null", "/dev/zero", "bigfield", "pickled.bin",
)  # fmt: skip
OUTPUTS = ("new", "new/", "new.mp4", "new.gif", "new.png", "new.json", "new.safetensors", "clips", "model", "notes.md", "dir/",
           "", ".", "no/new.mp4", "image.png", "x" * 300, "new.mp4/", "/dev/full", "fifo")  # fmt: skip
# What Python and torch say, and a user should not have to read.
FOREIGN = re.compile(
    r"invalid literal|could not convert|unpack|math domain|codec can't|unhashable|object is not|has no attribute|"
    r"positional argument|out of range|not subscriptable|NoneType|Sizes of tensors|mat1 and mat2|must match the size|"
    r"embedded null|is not JSON serializable|list index|division by zero|cannot reshape|\bEOF\b|KeyError|maximum recursion"
)
RECIPE = """
from dataclasses import dataclass, field
@dataclass(frozen=True)
class Odd:
    '''No run of ours.'''
    steps: int = 5
    rate: float = 0.5
@dataclass(frozen=True)
class Strict:
    share: float = 0.5
    def __post_init__(self):
        assert 0 <= self.share <= 1, "share!"
def odd() -> Odd:
    return Odd()
def strict() -> Strict:
    return Strict()
def number() -> int:
    return 3
def looping() -> Odd:
    return looping()
"""


@dataclass(frozen=True)
class Case:
    """A command line, in a folder with odd files."""

    argv: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(
            repr(word) if not word or " " in word or len(word) > 60 else ascii(word)[1:-1] for word in self.argv
        )


@cache
def world() -> Path:
    """The folder that every command line finds a copy of."""
    from safetensors.torch import save_file
    from torch import zeros

    from tests.synthetic import write_dataset

    root = Path(mkdtemp(prefix="dicode-fuzz-world-"))
    write_tiny(root / "model")
    write_dataset(root / "clips", count=2, num_frames=8, size=32)
    save_file({"tokens": zeros(2, 4, 6)}, root / "tokens.safetensors")
    (root / "dir").mkdir()
    (root / "bigfield").mkdir()
    (root / "deep").mkdir()
    wide = io.StringIO()
    csv.writer(wide).writerows([["file", "caption"], ["a.mp4", "x" * 200_000]])
    texts: dict[str, str | bytes] = {
        "notes.md": "# mine\n", "dir/kept.txt": "mine", "empty.txt": "", "latin1.txt": b"- caf\xe9\n", "binary.bin": random.Random(0).randbytes(3000),
        "deep.yaml": "[" * 20_000, "prompts.txt": "a red square\n", "board.yaml": "- {seconds: 2, prompt: a red square}\n",
        "bomb.yaml": "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}]\n" for p, c in zip("abcdefghij", "bcdefghijk", strict=True)),
        "bigfield/captions.csv": wide.getvalue(), "deep/captions.jsonl": '{"file": ' + "[" * 20_000 + "\n",
        "recipe.py": RECIPE, "broken.py": "def lm(:\n", "raises.py": "def lm() -> 'LanguageRun':\n    raise KeyError('mine')\n",
        "plain.py": "x = 1\n", "tokenizers.py": RECIPE + "\nlm = odd\n", "exits.py": "import sys\nsys.exit(3)\n",
        "deeprecipe.py": "x = " + "(" * 5000 + ")" * 5000, "pickled.bin": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    }  # fmt: skip
    for name, text in texts.items():
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    import numpy as np
    from PIL import Image

    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(root / "image.png")
    return root


def cases(seed: int, count: int) -> Iterator[Case]:
    """First the lines of `FOUND`, in an order of the seed, then random ones."""
    draw = random.Random(seed)
    lines = [line.strip() for row in FOUND.strip().splitlines() for line in row.split(" | ")]
    draw.shuffle(lines)
    for i in range(count):
        if i < len(lines):
            yield Case(tuple(word.strip('"') if word == '""' else word for word in lines[i].split(" ")))
        else:
            yield Case(tuple(random_line(draw)))


def random_line(draw: random.Random) -> list[str]:
    name = draw.choice(list(COMMANDS))
    kind, positional = COMMANDS[name]
    flags = flags_of(kind)
    argv = name.split()
    if name == "generate" and draw.random() < 0.6:
        argv.append(draw.choice(["a red square", "[2s: a red square]", draw.choice(WORDS)]))
    argv += [draw.choice(FILES if draw.random() < 0.9 else WORDS) for _ in range(positional)]
    if "output" in flags and draw.random() < 0.95:
        argv += ["-o", draw.choice(OUTPUTS)]
    for flag in draw.sample(sorted(flags), min(len(flags), draw.choice([0, 1, 1, 2, 3]))):
        if flag == "output":
            continue
        argv += [f"--{flag.replace('_', '-')}", *value_of(flags[flag], draw)]
    return argv + SHORT.get(name, "").split() * (draw.random() < 0.97 or name not in ("generate", "data cache"))


def flags_of(kind: str) -> dict[str, Any]:
    """The flags of a command and their types, those of its groups included."""
    from dicode.cli import app as cli

    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(getattr(cli, kind)).items():
        found |= typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return {name: hint for name, hint in found.items() if name not in (*SKIPPED, *POSITIONAL)}


def value_of(hint: Any, draw: random.Random) -> list[str]:
    text = str(hint)
    if hint is bool:
        return []
    if draw.random() < 0.15:
        return [draw.choice((*WORDS, *NUMBERS, *FILES))]
    if "Literal" in text:
        return [draw.choice([*re.findall(r"'(\w+)'", text), "other"])]
    if "int" in text or "float" in text:
        return [draw.choice(NUMBERS)]
    return [draw.choice(FILES if draw.random() < 0.7 else OUTPUTS)]


def run(case: Case, folder: Path) -> str:
    """Exit 0, or a refusal of one line of ours; nothing that was there is gone but what is named as the output."""
    root = folder / "world"
    shutil.copytree(world(), root)
    os.mkfifo(root / "fifo")
    (root / "loop").symlink_to("loop")
    before = contents(root)
    said = folder / "said.txt"
    outcome = guarded(lambda: ran(case, root, said), processor_s=60)
    if outcome in ("ok", "refused") and (gone := lost(before, contents(root), case)):
        return f"wrong: {gone} is gone or changed"
    return outcome


def ran(case: Case, root: Path, said: Path) -> str:
    """What becomes of the command line, in this process."""
    import torch

    from dicode.cli.app import main

    torch.set_num_threads(1)
    os.chdir(root)
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "HOME": str(root)}
    os.environ.pop("DICODE_DEBUG", None)
    handle = os.open(said, os.O_CREAT | os.O_WRONLY)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(handle, number)
    sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        code = main(list(case.argv))
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    return judged(case, code, said.read_text(errors="replace"))


def judged(case: Case, code: int, text: str) -> str:
    """The outcome of an exit code and of what was said."""
    errors = [
        line for line in text.splitlines() if line.startswith("dicode: ") and not line.startswith("dicode: warning")
    ]
    if code == 70 or "Traceback (most recent" in text or "this is a bug" in text:
        return f"traceback: {' '.join(errors)[-500:] or text[-500:]}"
    if code == 0:
        return "ok"
    if not text.strip():
        return f"wrong: exit {code} without a word"
    if errors and ".py" not in errors[-1] and (found := FOREIGN.search(errors[-1])):  # a recipe has its own words
        return f"wrong: not our words ({found[0]}): {errors[-1][:300]}"
    if len(errors) > 1 or (errors and len(errors[0]) > 2000):
        return f"wrong: expected an error of one line, got {errors[:3]}"
    return "refused"


def contents(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            facts = os.lstat(os.path.join(folder, name))
            found[os.path.relpath(os.path.join(folder, name), root)] = (facts.st_size, facts.st_mtime_ns)
    return found


def lost(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], case: Case) -> str:
    """A file that a command had no right to touch, '' if there is none.

    What is named as an output may be replaced where it is a file, or a model, which `assemble` replaces whole.
    """
    named = {os.path.normpath(word) for word in case.argv if word}
    for name, facts in before.items():
        own = name in named or (
            name.startswith("model/") and "model" in named and case.argv[0] in ("assemble", "finetune")
        )
        if after.get(name) != facts and not own and not name.endswith(".pyc"):
            return name
    return ""
