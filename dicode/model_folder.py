"""Where a model is written: never over files that are not its own."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from dicode.config import CheckpointError, read_config
from dicode.files import whole_folder
from dicode.hub import HUB_FILES


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
