"""Damaged checkpoints: every field of config.json, every tensor, every file. Loaded, and asked for one second."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from . import guarded, unexpected
from .models import KINDS, write_tiny

PROMPT = "a red square"
BOX = "sprites"
# None stands for null; a string beginning with = is written as it is
VALUES: list[Any] = [
    None, 0, -1, 10**9, "=1e9", "=NaN", "=Infinity", "=-Infinity", "=1e999", 1.5, -0.25, 1e-300, 1e308, "word", "",
    True, False, [], {}, [0], [[8]], {"kind": "tiny"}, "=" + "9" * 5000, "=" + "[" * 5000 + "]" * 5000, [8] * 5000,
    2**63, "\ud800", 1, 2, 3, 5, 7, 24, 64, 1000, 65536, 0.5, 1.0, "gpt2", "llama", "wan", "unet3d", "hourglass", "kl",
    "clip", "patch", "flow", "mixture", "regression", "keyframe", "v_prediction", "parallel",
]  # fmt: skip
TENSORS = (
    "missing", "extra", "renamed", "shape", "flat", "empty", "nan", "inf", "int8", "int32", "int64", "uint8", "bool",
    "complex64", "float64", "scales", "relabelled", "reshaped", "bits", "beyond",
)  # fmt: skip
FILES = (
    "truncated", "cut header", "long header", "no header", "garbage", "none", "no file", "folder", "loop", "dangling",
    "fifo", "device", "other", "swapped", "deep", "byte order mark", "utf-16", "latin-1",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One thing that is changed in one model."""

    model: str
    what: str
    where: str
    seed: int
    value: Any = None

    def __str__(self) -> str:
        return f"{self.model}: {self.what} {self.where} {str(self.value)[:40]!r} (seed {self.seed})"


@cache
def folders() -> dict[str, Path]:
    """The undamaged models; the one of the box is only read."""
    from dicode.checkpoint import CHECKPOINTS

    root = Path(mkdtemp(prefix="dicode-fuzz-models-"))
    return {**{kind: write_tiny(root / kind, kind) for kind in KINDS}, BOX: CHECKPOINTS / BOX}


@cache
def undamaged(model: str) -> bytes:
    """What the undamaged model draws."""
    return drawn(folders()[model])


def drawn(folder: Path) -> bytes:
    """A second of video, two key frames, as bytes."""
    import torch

    from dicode.pipeline import DiCoDe

    torch.set_num_threads(1)
    model = DiCoDe.from_pretrained(folder)
    frames = next(iter(model.generate(PROMPT, seconds=1.0, seed=3, steps=1)))
    return frames.tobytes()


def cases(seed: int, count: int) -> Iterator[Case]:
    """A third each of fields, tensors and files; every field and every kind of damage before any comes again."""
    draw = random.Random(seed)
    fields = {name: list(paths(json.loads((folder / "config.json").read_text()))) for name, folder in folders().items()}
    tensors = {name: names(folder) for name, folder in folders().items()}
    order = [(name, path) for name in KINDS for path in fields[name]]
    draw.shuffle(order)
    for i in range(count):
        model = BOX if draw.random() < 0.04 else draw.choice(KINDS)
        kind = ("field", "field", "tensor", "file")[i % 4]
        if kind == "field":
            model, path = order[(i // 2) % len(order)]
            if draw.random() < 0.06:
                yield Case(model, draw.choice(["drop", "twice", "unknown"]), json.dumps(path), draw.randrange(10**6))
            else:
                value = VALUES[(i // 2 // len(order) + draw.randrange(len(VALUES))) % len(VALUES)]
                yield Case(model, "field", json.dumps(path), draw.randrange(10**6), value)
        elif kind == "tensor":
            where = draw.choice(tensors[model])
            yield Case(model, TENSORS[i // 4 % len(TENSORS)], where, draw.randrange(10**6))
        else:
            files = sorted(p.name for p in folders()[model].iterdir() if p.suffix in (".json", ".safetensors"))
            yield Case(model, FILES[i // 4 % len(FILES)], draw.choice(files), draw.randrange(10**6))


def run(case: Case, folder: Path) -> str:
    """Refused, or the same video as before; another one only where a field was given another value that it may have."""
    expected = undamaged(case.model)
    damaged = copied(folders()[case.model], folder / "model")
    damage(case, damaged)
    return guarded(lambda: outcome(case, damaged, expected), processor_s=40)


def outcome(case: Case, damaged: Path, expected: bytes) -> str:
    """What becomes of the damaged model, in this process."""
    from dicode.config import CheckpointError

    try:
        found = drawn(damaged)
    except CheckpointError as error:
        text = str(error)
        names_it = any(word in text for word in (str(damaged), damaged.name))
        return "refused" if names_it and len(text) < 3000 else f"wrong: an error that names no file: {text[:200]}"
    except ValueError as error:
        # what a model cannot do with a setting that is legal by itself; torch's and Python's own words are none of ours
        return "refused" if type(error) is ValueError and "expected" in str(error) else unexpected(error)
    except Exception as error:
        return unexpected(error)
    if found == expected or case.what == "field":
        return "ok"
    return "wrong: accepted, and draws another video"


def copied(source: Path, target: Path) -> Path:
    """A folder of links to a model's files, each to be replaced before it is changed."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    return target


def paths(values: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested JSON lie: sections, fields, and items of lists."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*before, key))


def names(folder: Path) -> list[str]:
    """FILE TENSOR of every tensor."""
    return [f"{file.name} {name}" for file in sorted(folder.glob("*.safetensors")) for name in header_of(file)[0]]


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file without its metadata, and its data."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return {name: value for name, value in header.items() if name != "__metadata__"}, data[8 + size :]


def damage(case: Case, folder: Path) -> None:
    """Do to the folder what the case says."""
    if case.what in ("field", "drop", "twice", "unknown"):
        config = folder / "config.json"
        text = changed_config(json.loads(config.read_text()), case)
        config.unlink()
        config.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif case.what in TENSORS:
        name, tensor = case.where.split(" ", 1)
        change_tensor(folder / name, tensor, case)
    else:
        change_file(folder / case.where, case.what, random.Random(case.seed))


def changed_config(config: dict[str, Any], case: Case) -> str:
    *inside, key = json.loads(case.where)
    holder: Any = config
    for part in inside:
        holder = holder[part]
    mark = "@here@"
    if case.what == "drop":
        del holder[key]
        return json.dumps(config)
    if case.what == "unknown" and isinstance(holder, dict):
        holder[f"{key}_more"] = 1
        return json.dumps(config)
    if case.what == "twice" and isinstance(holder, dict):
        text = json.dumps({**holder, key: mark})
        double = text.replace(f'"{mark}"', f"{json.dumps(holder[key])}, {json.dumps(key)}: 1")
        return double if not inside else json.dumps(config).replace(json.dumps(holder), double)
    holder[key] = mark
    value = case.value
    literal = value[1:] if isinstance(value, str) and value.startswith("=") else json.dumps(value)
    return json.dumps(config).replace(f'"{mark}"', literal)


def change_tensor(file: Path, name: str, case: Case) -> None:
    """Write the file anew with one tensor changed, or change its header or data in place."""
    import torch
    from safetensors.torch import load_file, save_file

    draw = random.Random(case.seed)
    raw = bytearray(file.read_bytes())
    state = load_file(file)
    value = state[name]
    file.unlink()
    if case.what in ("relabelled", "reshaped", "bits", "beyond"):
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        entry, data = header[name], raw[8 + size :]
        if case.what == "relabelled":
            same = {"F32": ["I32", "U32"], "F16": ["BF16", "I16"], "I64": ["F64", "U64"], "BF16": ["F16", "U16"]}
            entry["dtype"] = draw.choice(same.get(entry["dtype"], ["F8_E4M3"]))
        elif case.what == "reshaped":
            entry["shape"] = [*entry["shape"], 1] if len(set(entry["shape"])) < 2 else entry["shape"][::-1]
        elif case.what == "beyond":
            entry["data_offsets"][1] += draw.choice([4, 2**40, 2**63])
        else:
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        file.write_bytes(len(head).to_bytes(8, "little") + head + data)
        return
    if case.what == "missing":
        del state[name]
    elif case.what == "extra":
        state[f"{name}_"] = value.clone()
    elif case.what == "renamed":
        state[name[:-1] + ("_" if name[-1] != "_" else "x")] = state.pop(name)
    elif case.what == "shape":
        state[name] = torch.zeros((*value.shape, 2), dtype=value.dtype)
    elif case.what == "flat":
        state[name] = value.flatten() if value.ndim != 1 else value[None]
    elif case.what == "empty":
        state[name] = value.flatten()[:0]
    elif case.what in ("nan", "inf"):
        state[name] = value.double().float().clone()
        state[name].view(-1)[draw.randrange(value.numel())] = float(case.what)
    elif case.what == "scales":
        state[name] = value.clamp(-1, 1).to(torch.int8)
        state[f"{name}.int8_scales"] = torch.ones(3, dtype=torch.int32)
    else:
        state[name] = value.to(getattr(torch, case.what))
    save_file({n: t.contiguous() for n, t in state.items()}, file)


def change_file(file: Path, what: str, draw: random.Random) -> None:
    """Damage a file as a whole."""
    data = file.read_bytes()
    others = [path for path in file.parent.iterdir() if path.suffix == file.suffix and path.name != file.name]
    file.unlink()
    if what == "fifo":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    elif what == "loop":
        file.symlink_to(file)
    elif what == "dangling":
        file.symlink_to(file.with_name("nowhere"))
    elif what == "device":
        file.symlink_to("/dev/zero")
    elif what == "other":
        shutil.copy(draw.choice(others).resolve() if others else "/proc/version", file)
    elif what == "swapped":
        text = data.decode("latin-1")
        digits = [i for i, letter in enumerate(text) if letter.isalpha() and text[i - 1] == '"']
        i = draw.choice(digits) if digits else len(text) // 2
        file.write_bytes((text[:i] + draw.choice("qQzZ7") + text[i + 1 :]).encode("latin-1"))
    elif what != "no file":
        file.write_bytes(
            {
                "truncated": data[: draw.randrange(len(data))],
                "cut header": data[: draw.randrange(1, 12)],
                "long header": (2 ** draw.choice([20, 31, 40, 63])).to_bytes(8, "little") + data[8:],
                "no header": bytes(8) + data[8:],
                "garbage": draw.randbytes(2000),
                "none": b"",
                "deep": b"[" * 10**5 + b"]" * 10**5,
                "byte order mark": b"\xef\xbb\xbf" + data,
                "utf-16": data.decode("latin-1").encode("utf-16"),
                "latin-1": data.replace(b'"', b'"\xe9', 1),
            }[what]
        )
