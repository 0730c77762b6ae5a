"""Where a model is written: never over files that are not its own."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from dicode.config import CheckpointError, read_config
from dicode.files import PARTIAL
from dicode.hub import HUB_FILES


@contextmanager
def model_folder(output: Path) -> Iterator[Path]:
    """An empty folder for a checkpoint, which takes the place of `output` when the block ends: whole, or not at all.

    Raises `CheckpointError` where that holds anything but a checkpoint of ours. A model card that is there stays.
    """
    check_model_folder(output)
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(PARTIAL, f".{output.name}.", parent))
    try:
        yield made
        if (output / "README.md").is_file() and not (made / "README.md").exists():
            shutil.copy2(output / "README.md", made)
        made.chmod(0o755)  # mkdtemp makes folders for their owner alone
        if output.exists():
            held = Path(tempfile.mkdtemp(PARTIAL, f".{output.name}.old.", parent))
            output.replace(held / "model")
            made.replace(output)
            shutil.rmtree(held)
        else:
            made.replace(output)
    finally:
        shutil.rmtree(made, ignore_errors=True)


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
