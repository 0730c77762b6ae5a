"""A checkpoint is a folder: `config.json`, `*.safetensors`, `README.md`. It loads strictly, runs no code of its own."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dicode.config import CheckpointError as CheckpointError
from dicode.config import config_from_dict as config_from_dict
from dicode.config import config_to_dict as config_to_dict
from dicode.config import nearest as nearest

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT_MODEL = "sprites"
FORMAT = 1
SCALES = ".int8_scales"  # what the name of a quantized tensor's scales ends with
HUB_FILES = ["config.json", "*.safetensors", "tokenizer.json", "README.md"]  # nothing that could run
CARD = """---
library_name: dicode
pipeline_tag: text-to-video
---

# {repo_id}

A text-to-video model for `dicode`.

    dicode generate "a prompt" --model {repo_id}
"""
INITIALISERS = ("torch.nn.init", "transformers.initialization")  # the latter stands in for the former now and then


def resolve(name_or_folder: str | Path | None = None, revision: str | None = None) -> Path:
    """The folder of a checkpoint: one on disk, a model in the box (default: `sprites`), or `owner/name` on the Hub.

    What is on the Hub is downloaded once and then taken from its cache, offline too; `revision` is its branch, tag or
    commit (default: main). A `Path` is never looked up on the Hub.
    """
    if name_or_folder is None:
        name_or_folder = DEFAULT_MODEL
    for folder in (Path(name_or_folder), CHECKPOINTS / name_or_folder):
        if (folder / "config.json").is_file():
            if revision is not None:
                raise CheckpointError(f"revision {revision!r}: {folder} is a folder, which has none; leave it out")
            return folder
    is_hub_id = isinstance(name_or_folder, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_folder) is not None
    if is_hub_id and not Path(name_or_folder).exists():
        return checkpoint_folder(str(name_or_folder), revision)
    boxed = sorted(p.parent.name for p in CHECKPOINTS.glob("*/lm.safetensors"))  # not what only measures
    raise CheckpointError(
        f"no checkpoint at {str(name_or_folder)!r}: expected a folder with config.json, one of {boxed}, "
        "or owner/name on the Hub"
    )


def checkpoint_folder(repo_id: str, revision: str | None) -> Path:
    """A checkpoint of ours on the Hub, as a folder of its cache."""
    folder = downloaded(repo_id, HUB_FILES, revision)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{repo_id!r}: no config.json in it, so this is no dicode checkpoint")
    return folder


def downloaded(repo_id: str, files: Sequence[str], revision: str | None = None) -> Path:
    """These files (patterns) of a repository on the Hub, as a folder of its cache; without a network, what is there.

    Every failure is a `CheckpointError` that says what to do.
    """
    from huggingface_hub import constants, errors, snapshot_download

    asked = f"{repo_id!r}" if revision is None else f"{repo_id!r} at revision {revision!r}"
    url = f"{constants.ENDPOINT}/{repo_id}"
    try:
        # the first pattern would match in folders too, where training runs keep what is no part of the model
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"])
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{asked} is gated: ask for access at {url}, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"no {asked}: neither a folder here nor a repository at {url}; check the name, or run "
            "`hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{asked}: no such branch, tag or commit; see {url}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{asked}: no folder here, not in the cache {constants.HF_HUB_CACHE}, and the Hub cannot be reached; "
            f"connect once, or unset HF_HUB_OFFLINE ({error})"
        ) from error
    except Exception as error:  # the errors of its HTTP library share no base that lasts between its versions
        raise CheckpointError(f"{asked}: download failed, try again ({type(error).__name__}: {error})") from error
    return Path(folder)


def model_name(folder: Path) -> str:
    """What files say made them: the folder's name, or owner/name@commit for a folder in the Hub's cache."""
    *_, repository, snapshots, commit = ("", "", *folder.resolve().parts)
    if snapshots == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{commit}"
    return commit


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    token: str | None,
    commit_message: str,
    card: str | None,
) -> str:
    """Upload a checkpoint folder to the Hub, making repository and branch where missing; returns its address.

    Where `card` is None, the card that the repository has stays, or a short one is written.
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


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a module's state as one safetensors file, floating-point tensors as `dtype` where given.

    `int8` is for the disk alone: a matrix keeps 8 bits a number and a scale a row, all else is float16.
    """
    state = {}
    for name, value in module.state_dict().items():
        if is_quantized(value, dtype):
            state[name], state[name + SCALES] = quantized(value.detach().cpu())
        else:
            state[name] = as_saved(value.detach().cpu(), dtype).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files for their owner alone; a checkpoint is there to be shared


def is_quantized(value: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether `save_weights` keeps 8 bits of each number: `int8` of matrices and convolutions."""
    return dtype == torch.int8 and value.is_floating_point() and value.ndim > 1


def quantized(value: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest int8 of every number, and the float32 scales, one a row, that turn them back."""
    scales = value.float().abs().amax(tuple(range(1, value.ndim)), keepdim=True).clamp_min(1e-12) / 127
    return (value.float() / scales).round().to(torch.int8).contiguous(), scales.contiguous()


def as_saved(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What a reader of `save_weights`'s file gets of a tensor."""
    if is_quantized(value, dtype):
        numbers, scales = quantized(value)
        return numbers.float() * scales
    if dtype is None or not value.is_floating_point():
        return value
    return value.to(torch.float16 if dtype == torch.int8 else dtype)


def kept_tensors(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file that `make` fills on first use; an interrupted first use leaves no file."""
    if not path.is_file():
        partial = path.with_name(f".{path.name}.part")
        try:
            save_file(make(), partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return read_tensors(path)


@contextmanager
def without_initialisation() -> Iterator[None]:
    """Modules built inside get no random starting values from `torch.nn.init`: fill them from a checkpoint, strictly.

    As Lightning Fabric's `_EmptyInit`. What a constructor computes itself stays: buffers, and parameters it assigns.
    """
    with _SkipInitialisation():
        yield


class _SkipInitialisation(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) in INITIALISERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def cast_parameters(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Give all parameters this dtype; None leaves them. Buffers keep theirs.

    Buffers are statistics of latents and tokens and the angles of positions, small and worth float32: bfloat16 would
    turn position 1,000 by up to two radians.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point one, got {dtype}")
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a safetensors file, tensor by tensor, strictly: as `load_state`, without a second copy."""
    with _opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in _names(file)}
        _fill(module, shapes, lambda name: _read(file, name), str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file; a missing, truncated or damaged file raises `CheckpointError`."""
    with _opened(path) as file:
        return {name: _read(file, name) for name in _names(file)}


def _names(file: Any) -> list[str]:
    names = set(file.keys())
    return [n for n in file.keys() if not (n.endswith(SCALES) and n.removesuffix(SCALES) in names)]  # noqa: SIM118


def _read(file: Any, name: str) -> Tensor:
    value = file.get_tensor(name)
    return value.float() * file.get_tensor(name + SCALES) if value.dtype == torch.int8 else value


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the checkpoint folder is incomplete")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); download or copy it again"
        ) from error


def content_hash(*files: Path) -> str:
    """Sixteen hexadecimal digits that stand for the names and the content of files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`, strictly; values are cast to the module's dtype.

    Raises `CheckpointError` that names missing, extra and misshapen tensors, which leaves the module as it was, and
    those that hold NaN or infinity, or would once cast.
    """
    _fill(module, {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__, source)


def _fill(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], source: str) -> None:
    own = module.state_dict()
    problems = misfits(module, shapes)
    fits = not problems
    with torch.no_grad():
        for name in shapes:
            value = own[name].copy_(read(name)) if fits else read(name)
            if not is_finite(value):
                problems.append(f"{name}: holds NaN or infinity in {value.dtype}")
    if problems:
        shown = "\n  ".join(problems[:8])
        more = f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{source} does not fit the model of its config.json:\n  {shown}{more}")


def misfits(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors of these names and shapes from being the module's state, a line each."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    problems = [f"missing {name} {shape}" for name, shape in own.items() if name not in shapes]
    problems += [f"unexpected {name}{nearest(name, list(own))}" for name in shapes if name not in own]
    problems += [
        f"{name}: expected shape {own[name]}, got {shape}"
        for name, shape in shapes.items()
        if name in own and own[name] != shape
    ]
    return problems


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # NaN spreads to the extremes, which take a tenth of the time of asking every value
    return value.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(value))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` of a checkpoint folder, with the format number that `read_config` checks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, **config}, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a checkpoint folder and check its format number."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {found!r}; this version of dicode cannot read it")
    return {key: value for key, value in values.items() if key != "format"}
