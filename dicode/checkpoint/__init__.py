"""A checkpoint is a folder: `config.json`, `*.safetensors`, `README.md`. It loads strictly, runs no code of its own.

`dicode.checkpoint.saving` writes checkpoints, `dicode.checkpoint.hub` exchanges them with the Hugging Face Hub.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dicode import __version__
from dicode.config import DEFAULT_MODEL, CheckpointError, config_from_dict, nearest, shortened
from dicode.files import TextError, printable, read_json

FORMAT = 3
SECTIONS = ("first_stage", "tokenizer", "lm", "deep_tokens", "video_text")  # of config.json
MAX_CONFIG_BYTES = 2**20
CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
FILES = ("config.json", "*.safetensors", "tokenizer.json", "README.md")  # nothing that could run
# as safetensors' headers name them; each is cast to the module's own type
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
SEAL = "content"  # key of a weight file's metadata: see `check_seal`
SCALES = ".int8_scales"  # suffix of the name of a quantized tensor's scales
INITIALISERS = ("torch.nn.init", "transformers.initialization")  # the latter wraps the former
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
Header = tuple[tuple[int, ...], str]  # of a tensor: its shape, and its type as safetensors names it


def read_config(folder: Path) -> dict[str, Any]:
    """The sections of a checkpoint folder's `config.json`. Raises `CheckpointError` for another format or section."""
    path = folder / "config.json"
    try:
        values = read_json(path, MAX_CONFIG_BYTES)
    except (OSError, TextError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    found = values.pop("format", None) if isinstance(values, dict) else None
    if isinstance(found, bool) or found != FORMAT:
        raise CheckpointError(
            f"{path}: expected format {FORMAT}, got {shortened(found)}; this version of dicode cannot read it: "
            "dicode before 0.3 wrote formats 1 and 2"
        )
    if unknown := [key for key in values if key not in SECTIONS]:
        raise CheckpointError(f"{path}: unknown section {shortened(unknown[0])}{nearest(unknown[0], list(SECTIONS))}")
    return values


def read_section(folder: Path, name: str, kind: type[T]) -> T:
    """One section of a checkpoint folder's `config.json`, as a dataclass."""
    sections = read_config(folder)
    if name not in sections:
        raise CheckpointError(f"{folder}/config.json: no section {name!r}; it has {sorted(sections)}")
    return config_from_dict(kind, sections[name], f"{folder}/config.json: {name}")


def resolve(name_or_folder: str | Path | None = None, revision: str | None = None) -> Path:
    """The folder of a checkpoint: one on disk, a bundled model (default: DEFAULT_MODEL), or `owner/name` on the Hub.

    A repository is downloaded once and then read from the Hub's cache, offline too; `revision` is its branch, tag or
    commit (default: main). A `Path` is never looked up on the Hub.
    """
    name_or_folder = DEFAULT_MODEL if name_or_folder is None else name_or_folder
    for folder in (Path(name_or_folder), CHECKPOINTS / name_or_folder):
        if (folder / "config.json").is_file():
            if revision is not None:
                raise CheckpointError(f"revision {revision!r}: {folder} is a folder, which has none; leave it out")
            return folder
    is_hub_id = isinstance(name_or_folder, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_folder) is not None
    if not is_hub_id or Path(name_or_folder).exists():
        bundled = sorted(p.parent.name for p in CHECKPOINTS.glob("*/lm.safetensors"))  # others only evaluate
        raise CheckpointError(
            f"no checkpoint at {str(name_or_folder)!r}: expected a folder with config.json, one of {bundled}, "
            "or owner/name on the Hub"
        )
    from dicode.checkpoint.hub import downloaded

    folder = downloaded(str(name_or_folder), FILES, revision)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{str(name_or_folder)!r}: no config.json in it, so this is no dicode checkpoint")
    return folder


def model_name(folder: Path) -> str:
    """A model's name in the metadata of its files: the folder's, or owner/name@commit in the Hub's cache."""
    *_, repository, snapshots, commit = ("", "", *folder.resolve().parts)
    if snapshots == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{commit}"
    return commit


def model_origin(folder: Path, *weights: Path) -> dict[str, str]:
    """Which model made a file, for its metadata: name, hash of its weights, version of dicode."""
    return {"model": printable(model_name(folder)), "weights": content_hash(*weights), "dicode": __version__}


def content_hash(*files: Path) -> str:
    """Sixteen hexadecimal digits for the names and contents of files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def content_of(path: Path, beside: Path | None = None) -> tuple[str, dict[str, str]]:
    """A safetensors file's hash, sixteen hexadecimal digits and as many of the file `beside` it, and its metadata."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, path.stat().st_size)))
        metadata = header.pop("__metadata__", {})
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()[:16] + (content_hash(beside) if beside else ""), metadata


def check_seal(path: Path) -> None:
    """Raise `CheckpointError` where a file, or the text tokenizer beside it, is not as `save_weights` wrote it.

    Damaged numbers and changed types would load otherwise. Files of other programs have no seal and pass.
    """
    beside = path.with_name("tokenizer.json")
    try:
        content, metadata = content_of(path, beside if beside.is_file() else None)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    expected = metadata.get(SEAL, "")
    if not content.startswith(expected):
        damaged = path if content[:16] != expected[:16] else beside
        raise CheckpointError(f"{damaged}: not the content that was saved with this model; download or copy it again")


def load_model(
    folder: Path,
    build: Callable[[], M],
    parts: Callable[[M], Mapping[str, nn.Module]],
    dtype: torch.dtype | None = None,
) -> M:
    """The model that `build` constructs, its `parts` filled from files of a folder, strictly, in eval mode.

    Parameters have `dtype` (None: as built). Files' headers are compared with a model without memory first, so that
    nothing is allocated for sizes that do not fit. Raises `CheckpointError`.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point one, got {dtype}")
    try:
        with torch.device("meta"), without_initialisation(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = parts(build())
    except Exception as error:  # of torch, diffusers and transformers, for sizes that do not go together
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{folder}/config.json: no network has these sizes ({reason[:300]})") from error
    for name, module in expected.items():
        with _opened(folder / name) as file:
            if problems := mismatches(module, _header(file)):
                raise _mismatch(str(folder / name), problems)
    with without_initialisation():
        model = build()
    for parameter in model.parameters():  # buffers stay float32: bfloat16 turns the angles of position 1,000 by 2 rad
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    for name, module in parts(model).items():
        load_weights(module, folder / name)
    return model.eval()


class without_initialisation(TorchFunctionMode):
    """A context in which modules get no random values from `torch.nn.init`: fill them from a checkpoint, strictly.

    As Lightning Fabric's `_EmptyInit`. Buffers and parameters that a constructor computes itself keep their values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Skip functions of `INITIALISERS`."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) in INITIALISERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a safetensors file, strictly, holding one tensor of it at a time. Raises as `load_state`."""
    with _opened(path) as file:
        check_seal(path)
        _fill(module, _header(file), lambda name: _read(file, name), str(path))


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`, strictly; values are cast to the module's dtype.

    Raises `CheckpointError` that names missing, unexpected and misshapen tensors, which leaves the module as it was,
    and those that hold NaN or infinity, or would once cast.
    """
    _fill(module, headers_of(state), state.__getitem__, source)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises `CheckpointError` for a missing, truncated or damaged one."""
    with _opened(path) as file:
        return {name: _read(file, name) for name in _names(file)}


def headers_of(state: Mapping[str, Tensor]) -> dict[str, Header]:
    """The header that a file of these tensors would have."""
    return {name: (tuple(value.shape), FLOATS.get(value.dtype, str(value.dtype))) for name, value in state.items()}


def mismatches(module: nn.Module, headers: Mapping[str, Header]) -> list[str]:
    """A line for each difference between these names, shapes and types and those of the module's state."""
    own = module.state_dict()
    problems = [f"missing {name} {tuple(value.shape)}" for name, value in own.items() if name not in headers]
    problems += [f"unexpected {name}{nearest(name, list(own))}" for name in headers if name not in own]
    for name, (shape, dtype) in headers.items():
        if (expected := own.get(name)) is None:
            continue
        if tuple(expected.shape) != shape:
            problems.append(f"{name}: expected shape {tuple(expected.shape)}, got {shape}")
        if expected.is_floating_point() != (dtype in FLOATS.values()):
            types = " or ".join(FLOATS.values()) if expected.is_floating_point() else str(expected.dtype)
            problems.append(f"{name}: expected {types}, got {dtype}")
    return problems


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not value.is_floating_point() or value.numel() == 0:
        return True
    # NaN spreads to the extremes, which take a tenth of the time of asking every value
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(value))


def _fill(module: nn.Module, headers: Mapping[str, Header], read: Callable[[str], Tensor], source: str) -> None:
    own = module.state_dict()
    problems = mismatches(module, headers)
    fits = not problems
    with torch.no_grad():
        for name in headers:
            value = own[name].copy_(read(name)) if fits else read(name)
            if not is_finite(value):
                problems.append(f"{name}: holds NaN or infinity in {value.dtype}")
    if problems:
        raise _mismatch(source, problems)


def _mismatch(source: str, problems: list[str]) -> CheckpointError:
    listed = "\n  ".join(problems[:8])
    more = f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else ""
    return CheckpointError(f"{source} does not fit the model of its config.json:\n  {listed}{more}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        problem = "expected a file, got a folder, pipe or device" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: {problem}; the checkpoint folder is incomplete")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); download or copy it again"
        ) from error


def _names(file: Any) -> list[str]:
    names = list(file.keys())
    return [name for name in names if not (name.endswith(SCALES) and name.removesuffix(SCALES) in names)]


def _header(file: Any) -> dict[str, Header]:
    """The header of an open file; a quantized tensor counts as float."""
    headers, names = {}, set(file.keys())
    for name in _names(file):
        part = file.get_slice(name)
        shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
        if dtype == "I8" and name + SCALES in names:
            scales = file.get_slice(name + SCALES)
            one_a_row = (shape[0], *[1] * (len(shape) - 1)) if shape else ()
            fits = tuple(scales.get_shape()) == one_a_row and scales.get_dtype() in FLOATS.values()
            dtype = "F32" if fits else f"I8 with scales {scales.get_dtype()} {tuple(scales.get_shape())}"
        headers[name] = shape, dtype
    return headers


def _read(file: Any, name: str) -> Tensor:
    value = file.get_tensor(name)
    return value.float() * file.get_tensor(name + SCALES) if value.dtype == torch.int8 else value
