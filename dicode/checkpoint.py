"""A checkpoint is a folder: `config.json`, `*.safetensors`, `README.md`. It loads strictly, runs no code of its own."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dicode.config import CheckpointError, config_from_dict, nearest, shortened
from dicode.files import TextError, put, read_json, whole_folder

FORMAT = 2
SECTIONS = ("first_stage", "tokenizer", "lm", "deep_tokens", "video_text")  # of config.json
MAX_CONFIG_BYTES = 2**20
CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT_MODEL = "sprites"
# as safetensors' headers name them; each is cast to the module's own type
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
SEAL = "content"  # key of a weight file's metadata: see `check_seal`
SCALES = ".int8_scales"  # suffix of the name of a quantized tensor's scales
HUB_FILES = ("config.json", "*.safetensors", "tokenizer.json", "README.md")  # nothing that could run
CARD = """---
library_name: dicode
pipeline_tag: text-to-video
---

# {repo_id}

A text-to-video model: `dicode generate "a prompt" --model {repo_id}`
"""
INITIALISERS = ("torch.nn.init", "transformers.initialization")  # the latter wraps the former
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` of a checkpoint folder, with the format number that `read_config` checks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, **config}, indent=2) + "\n")


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
            "dicode before 0.2 wrote format 1"
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
    """The folder of a checkpoint: one on disk, a bundled model (default: `sprites`), or `owner/name` on the Hub.

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
    folder = downloaded(str(name_or_folder), HUB_FILES, revision)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{str(name_or_folder)!r}: no config.json in it, so this is no dicode checkpoint")
    return folder


def downloaded(repo_id: str, files: Sequence[str], revision: str | None = None) -> Path:
    """These files (patterns) of a repository on the Hub, as a folder of its cache; without a network, the cached ones.

    Every failure is a `CheckpointError` with what to do.
    """
    from huggingface_hub import constants, errors, snapshot_download

    url = f"{constants.ENDPOINT}/{repo_id}"
    advice = {  # in this order: GatedRepoError is a RepositoryNotFoundError too
        errors.GatedRepoError: f"gated; ask for access at {url}, then run `hf auth login`",
        errors.RepositoryNotFoundError: f"no folder here and no repository at {url}; if private, run `hf auth login`",
        errors.RevisionNotFoundError: f"no such branch, tag or commit; see {url}",
        errors.LocalEntryNotFoundError: f"no folder here, not in the cache {constants.HF_HUB_CACHE}, and the Hub "
        "cannot be reached; connect once, or unset HF_HUB_OFFLINE",
    }
    try:
        # the first pattern would match in folders too, where training runs keep files that the model does not need
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except Exception as error:  # errors of the Hub's HTTP library share no stable base class
        other = f"download failed, try again ({type(error).__name__}: {error})"
        reason = next((text for kind, text in advice.items() if isinstance(error, kind)), other)
        name = f"{repo_id!r}" if revision is None else f"{repo_id!r} at revision {revision!r}"
        raise CheckpointError(f"{name}: {reason}") from error


def model_name(folder: Path) -> str:
    """A model's name in the metadata of its files: the folder's, or owner/name@commit in the Hub's cache."""
    *_, repository, snapshots, commit = ("", "", *folder.resolve().parts)
    if snapshots == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{commit}"
    return commit


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload a dicode model",
    card: str | None = None,
) -> str:
    """Upload a checkpoint folder to the Hub; returns its address.

    Creates the repository and the branch `revision` (default: main) where missing. `card` is the text of README.md;
    without one the repository's card stays, or a short one is written. Raises `ValueError` for a public repository
    where `private` is requested.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    repo_id = url.repo_id  # with the owner, where none was named
    if private and api.model_info(repo_id).private is False:
        raise ValueError(f"{repo_id} exists and is public: make it private at {url}/settings, or push another name")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if card is not None or not api.file_exists(repo_id, "README.md", revision=revision):
        (folder / "README.md").write_text(CARD.format(repo_id=repo_id) if card is None else card, encoding="utf-8")
    api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return str(url)


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None, beside: Path | None = None) -> None:
    """Write a module's state as one safetensors file, floating-point tensors as `dtype` where given.

    `int8` stores 8 bits a number and a scale a row for matrices, float16 for the rest; loading gives floats again.
    `beside` is the text tokenizer that belongs to the weights: the seal covers it too.
    """
    state = {}
    for name, value in module.state_dict().items():
        stored, scales = as_stored(value.detach().cpu(), dtype)
        state[name] = stored.contiguous()
        if scales is not None:
            state[name + SCALES] = scales.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    unknown = "0" * (32 if beside else 16)
    save_file(state, path, metadata={SEAL: unknown})  # a single key: the order of several varies
    content = content_of(path, beside)[0]
    with path.open("r+b") as file:
        head = file.read(2**16)
        file.seek(0)
        file.write(head.replace(f'"{SEAL}":"{unknown}"'.encode(), f'"{SEAL}":"{content}"'.encode(), 1))
    path.chmod(0o644)  # safetensors creates files for their owner alone


def as_stored(value: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """A tensor as `save_weights` stores it, and the float32 scales, one a row, to multiply int8 with."""
    if dtype is None or not value.is_floating_point():
        return value, None
    if dtype != torch.int8 or value.ndim < 2:
        return value.to(torch.float16 if dtype == torch.int8 else dtype), None
    scales = value.float().abs().amax(tuple(range(1, value.ndim)), keepdim=True).clamp_min(1e-12) / 127
    return (value.float() / scales).round().to(torch.int8), scales


def as_saved(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it is read back from a file of `save_weights`."""
    stored, scales = as_stored(value, dtype)
    return stored if scales is None else stored.float() * scales


def kept_tensors(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file, which is written from `make` where it is missing."""
    if not path.is_file():
        put(path, lambda partial: save_file(make(), partial))
    return read_tensors(path)


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


class TensorHeader(NamedTuple):
    """A tensor's entry in a safetensors header."""

    shape: tuple[int, ...]
    dtype: str


def headers_of(state: Mapping[str, Tensor]) -> dict[str, TensorHeader]:
    """The header that a file of these tensors would have."""
    return {
        name: TensorHeader(tuple(value.shape), FLOATS.get(value.dtype, str(value.dtype)))
        for name, value in state.items()
    }


def mismatches(module: nn.Module, headers: Mapping[str, TensorHeader]) -> list[str]:
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


def _fill(module: nn.Module, headers: Mapping[str, TensorHeader], read: Callable[[str], Tensor], source: str) -> None:
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


def _header(file: Any) -> dict[str, TensorHeader]:
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
        headers[name] = TensorHeader(shape, dtype)
    return headers


def _read(file: Any, name: str) -> Tensor:
    value = file.get_tensor(name)
    return value.float() * file.get_tensor(name + SCALES) if value.dtype == torch.int8 else value


@contextmanager
def model_folder(output: Path, own: Sequence[str] = HUB_FILES, *, keep: bool = False) -> Iterator[Path]:
    """An empty folder for a checkpoint, which takes the place of `output` when the block ends: whole, or not at all.

    A model card that is there stays; with `keep` so do all files that the block does not write. Raises as
    `check_model_folder`.
    """
    check_model_folder(output, own)
    with whole_folder(output) as folder:
        yield folder
        for path in output.iterdir() if output.is_dir() else ():
            if (keep or path.name == "README.md") and not (folder / path.name).exists():
                shutil.copy2(path, folder)


def check_model_folder(output: Path, own: Sequence[str] = HUB_FILES) -> None:
    """Raise `CheckpointError` unless a folder is missing, empty, or a dicode checkpoint with files of these names."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: expected a folder to write, or none yet, got a file")
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in own)]
    if names and not foreign:
        try:
            read_config(output)
        except CheckpointError:
            foreign = names
    if foreign:
        raise CheckpointError(
            f"{output}: holds {', '.join(foreign[:3])}{' …' if len(foreign) > 3 else ''}, which this command did not "
            "write and would not keep: name another folder"
        )
