"""Whether given files are those of published figures, which decides a figure's name."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dicode.features.networks import CLIP_FILES
from dicode.files import sha256_of
from dicode.hub import downloaded

I3D_FILE = "i3d_torchscript.pt of StyleGAN-V (https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt)"
C3D_FILE = "c3d_ucf101.pt of StyleGAN-V (https://www.dropbox.com/s/jxpu7avzdc9n97q/c3d_ucf101.pt)"
CLIP_HUB_ID, CLIP_PICKLE = "openai/clip-vit-base-patch32", "pytorch_model.bin"
# As public repositories, ten or so each, pin them for these files. No such sum is known here for C3D.
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
CLIP_PICKLE_SHA256 = "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f"


@dataclass(frozen=True)
class NetworkFile:
    """The file of one network, and whether it is known to be the one that the literature uses (`expected`)."""

    network: str
    expected: str
    sha256: str
    confirmed: bool

    def figure(self, metric: str) -> str:
        """The name of its figure of a metric: the published one only for the published file."""
        return metric if self.confirmed else f"{metric}-unconfirmed-{self.network}"


def i3d_file(path: Path | None, confirm: Collection[str]) -> tuple[Path, NetworkFile]:
    """The file that `--i3d` names."""
    return _checked("I3D", "--i3d", path, I3D_FILE, {I3D_SHA256, *confirm})


def c3d_file(path: Path | None, confirm: Collection[str]) -> tuple[Path, NetworkFile]:
    """The file that `--c3d` names."""
    return _checked("C3D", "--c3d", path, C3D_FILE, set(confirm))


def clip_file(source: str, confirm: Collection[str]) -> tuple[Path, NetworkFile]:
    """The folder that `--clip` names, or that of the Hub: what comes from the published place is the published one.

    Where there are no safetensors (as at that place's older commits), pytorch_model.bin is read if it is the published
    one: a pickle, of which `transformers` takes tensors only.
    """
    on_disk = Path(source).is_dir()
    folder = Path(source) if on_disk else downloaded(source, CLIP_FILES)
    weights, known = folder / "model.safetensors", set(confirm)
    if not weights.is_file():
        folder = folder if on_disk else downloaded(source, [*CLIP_FILES, CLIP_PICKLE])
        pickle = folder / CLIP_PICKLE
        if pickle.is_file() and sha256_of(pickle) == CLIP_PICKLE_SHA256:
            weights, known = pickle, {CLIP_PICKLE_SHA256}
    elif source == CLIP_HUB_ID and not on_disk:
        known = {sha256_of(weights)}
    _, file = _checked("CLIP", "--clip", weights, CLIP_HUB_ID, known)
    return weights.parent, file


def check_confirmed(confirm: Collection[str], files: Sequence[NetworkFile]) -> None:
    """Raise `ValueError` for a sum that is none of these files', which would be a slip."""
    if stray := set(confirm) - {file.sha256 for file in files}:
        sums = ", ".join(f"{file.network} {file.sha256}" for file in files)
        raise ValueError(f"--confirm {stray.pop()}: expected the SHA-256 of a file given, which are {sums}")


def _checked(network: str, flag: str, path: Path | None, expected: str, known: set[str]) -> tuple[Path, NetworkFile]:
    if path is None or not path.is_file():
        given = "nothing" if path is None else f"{path}, where no file is"
        raise FileNotFoundError(f"{flag}: expected {expected}, got {given}; see docs/benchmarks.md")
    found = sha256_of(path)
    file = NetworkFile(network, expected, found, found in known)
    if not file.confirmed:
        warnings.warn(
            f"{path}: not known to be {expected}; figures made with it get another name. If you know that it is, add "
            f"--confirm {file.sha256}",
            stacklevel=3,
        )
    return path, file
