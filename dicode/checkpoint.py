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
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dicode.config import CheckpointError, nearest, read_config
from dicode.files import put, whole_folder

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT_MODEL = "sprites"
FLOATS = ("F16", "BF16", "F32", "F64")  # of safetensors' header; either is cast to the module's own type
NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
SEAL = "content"  # in the metadata of a file of weights: see `check_seal`
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


class Held(NamedTuple):
    """What a file's header says of a tensor, in the words of safetensors."""

    shape: tuple[int, ...]
    dtype: str


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


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None, beside: Path | None = None) -> None:
    """Write a module's state as one safetensors file, floating-point tensors as `dtype` where given.

    `int8` is for the disk alone: a matrix keeps 8 bits a number and a scale a row, all else is float16. `beside` is the
    text tokenizer that the weights cannot do without.
    """
    state = {}
    for name, value in module.state_dict().items():
        if is_quantized(value, dtype):
            state[name], state[name + SCALES] = quantized(value.detach().cpu())
        else:
            state[name] = as_saved(value.detach().cpu(), dtype).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    unknown = "0" * (32 if beside else 16)
    save_file(state, path, metadata={SEAL: unknown})  # a single key: of several the order differs from file to file
    content = content_of(path, beside)[0]
    with path.open("r+b") as file:
        head = file.read(2**16)
        file.seek(0)
        file.write(head.replace(f'"{SEAL}":"{unknown}"'.encode(), f'"{SEAL}":"{content}"'.encode(), 1))
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
        put(path, lambda partial: save_file(make(), partial))
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
        check_seal(path)
        _fill(module, _header(file), lambda name: _read(file, name), str(path))


def check_weights(build: Callable[[], Mapping[Path, nn.Module]], where: str) -> None:
    """Compare the headers of files with the modules that `build` makes for them: names, shapes and types of tensors.

    They are built without memory, so that nothing is allocated for what does not fit. Raises `CheckpointError`, also
    where they cannot be built of the section `where` at all.
    """
    try:
        with torch.device("meta"), without_initialisation(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            modules = build()
    except CheckpointError:
        raise
    except Exception as error:  # of torch, diffusers and transformers, for sizes that do not go together
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{where}: no network has these sizes ({reason[:300]})") from error
    for path, module in modules.items():
        with _opened(path) as file:
            if problems := misfits(module, _header(file)):
                raise _misfit(str(path), problems)


def content_of(path: Path, beside: Path | None = None) -> tuple[str, dict[str, str]]:
    """Hexadecimal digits that stand for a safetensors file's tensors, names and types, and its metadata.

    Sixteen, and as many for the content of the file `beside` it.
    """
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

    Numbers that a copy has damaged, or that a header calls by another type, would be taken for weights otherwise. What
    others wrote has no seal, and may be anything that fits.
    """
    beside = path.with_name("tokenizer.json")
    try:
        content, metadata = content_of(path, beside if beside.is_file() else None)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    expected = metadata.get(SEAL, "")
    if not content.startswith(expected):
        what = path if content[:16] != expected[:16] else beside
        raise CheckpointError(f"{what}: not the content that was saved with this model; download or copy it again")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file; a missing, truncated or damaged file raises `CheckpointError`."""
    with _opened(path) as file:
        return {name: _read(file, name) for name in _names(file)}


def _names(file: Any) -> list[str]:
    names = set(file.keys())
    return [n for n in file.keys() if not (n.endswith(SCALES) and n.removesuffix(SCALES) in names)]  # noqa: SIM118


def _header(file: Any) -> dict[str, Held]:
    """What the tensors of an open file are, by its header alone. A quantized one counts as float."""
    held = {}
    for name in _names(file):
        part = file.get_slice(name)
        shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
        if dtype == "I8" and name + SCALES in file.keys():  # noqa: SIM118
            scales = file.get_slice(name + SCALES)
            one_a_row = (shape[0], *[1] * (len(shape) - 1)) if shape else ()
            fits = tuple(scales.get_shape()) == one_a_row and scales.get_dtype() in FLOATS
            dtype = "F32" if fits else f"I8 with scales {scales.get_dtype()} {tuple(scales.get_shape())}"
        held[name] = Held(shape, dtype)
    return held


def _read(file: Any, name: str) -> Tensor:
    value = file.get_tensor(name)
    return value.float() * file.get_tensor(name + SCALES) if value.dtype == torch.int8 else value


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: expected a file, got a folder, pipe or device")
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
    _fill(module, held_by(state), state.__getitem__, source)


def held_by(state: Mapping[str, Tensor]) -> dict[str, Held]:
    """What the header of a file of these tensors would say."""
    return {name: Held(tuple(value.shape), NAMES.get(value.dtype, str(value.dtype))) for name, value in state.items()}


def _fill(module: nn.Module, held: Mapping[str, Held], read: Callable[[str], Tensor], source: str) -> None:
    own = module.state_dict()
    problems = misfits(module, held)
    fits = not problems
    with torch.no_grad():
        for name in held:
            value = own[name].copy_(read(name)) if fits else read(name)
            if not is_finite(value):
                problems.append(f"{name}: holds NaN or infinity in {value.dtype}")
    if problems:
        raise _misfit(source, problems)


def _misfit(source: str, problems: list[str]) -> CheckpointError:
    shown = "\n  ".join(problems[:8])
    more = f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else ""
    return CheckpointError(f"{source} does not fit the model of its config.json:\n  {shown}{more}")


def misfits(module: nn.Module, held: Mapping[str, Held]) -> list[str]:
    """What keeps tensors of these names, shapes and types from being the module's state, a line each."""
    own = module.state_dict()
    problems = [f"missing {name} {tuple(value.shape)}" for name, value in own.items() if name not in held]
    problems += [f"unexpected {name}{nearest(name, list(own))}" for name in held if name not in own]
    for name, (shape, dtype) in held.items():
        if name not in own:
            continue
        if (expected := tuple(own[name].shape)) != shape:
            problems.append(f"{name}: expected shape {expected}, got {shape}")
        kinds = FLOATS if own[name].is_floating_point() else (NAMES[own[name].dtype],)
        if dtype not in kinds:
            problems.append(f"{name}: expected {' or '.join(kinds)}, got {dtype}")
    return problems


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not value.is_floating_point():
        return True
    # NaN spreads to the extremes, which take a tenth of the time of asking every value
    return value.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(value))


@contextmanager
def model_folder(output: Path, own: Sequence[str] = HUB_FILES, *, keep: bool = False) -> Iterator[Path]:
    """An empty folder for a checkpoint, which takes the place of `output` when the block ends: whole, or not at all.

    Raises `CheckpointError` where that holds anything but a checkpoint of ours (`own`). A model card that is there
    stays; with `keep` so do all files that the block writes none of.
    """
    check_model_folder(output, own)
    with whole_folder(output) as made:
        yield made
        for path in output.iterdir() if output.is_dir() else ():
            if (keep or path.name == "README.md") and not (made / path.name).exists():
                shutil.copy2(path, made)


def check_model_folder(output: Path, own: Sequence[str] = HUB_FILES) -> None:
    """Raise `CheckpointError` unless a folder is missing, empty, or a checkpoint of ours with files of these names."""
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
