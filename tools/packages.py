"""The wheel in a clean environment of each Python: what is installed, how large it is, and the file that it makes.

python tools/packages.py python3.11 python3.12 python3.13    # results/packages.json; 5 GB each on Linux, removed again
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from dicode.provenance import write_result

ROOT = Path(__file__).parents[1]
PROMPT = "a red ball jumps"
VERSIONS = "import platform, torch, dicode; print(platform.python_version(), torch.__version__, dicode.__version__)"


def main(pythons: Sequence[str]) -> None:
    """Build the wheel once, then install and use it with each Python."""
    with TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, str(ROOT)], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        tried = {python: installed(python, wheel, Path(folder)) for python in pythons}
        values = {"wheel_mb": wheel.stat().st_size / 1e6, "environments": tried}
        values["equal_files"] = len({one["sha256"] for one in tried.values()}) == 1
    write_result(
        ROOT / "results/packages.json",
        "packages",
        values,
        len(tried),
        0,
        f"python tools/packages.py {' '.join(pythons)}",
    )


def installed(python: str, wheel: Path, folder: Path) -> dict[str, object]:
    """One environment, from nothing to a video."""
    with TemporaryDirectory(dir=folder) as name:
        home = Path(name)
        subprocess.run([python, "-m", "venv", home / "env"], check=True)
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        pins, video = str(ROOT / "constraints.txt"), home / "ball.mp4"
        subprocess.run([home / "env/bin/pip", "install", "--quiet", "-c", pins, wheel], check=True, env=own)
        generate = [str(home / "env/bin/dicode"), "generate", PROMPT, "--device", "cpu", "-o", str(video)]
        subprocess.run(generate, check=True, cwd=home, env=own)
        found = subprocess.run(
            [home / "env/bin/python", "-c", VERSIONS], check=True, cwd=home, env=own, stdout=subprocess.PIPE, text=True
        )
        size = sum(
            path.lstat().st_size for path in (home / "env").rglob("*") if path.is_file() and not path.is_symlink()
        )
        versions = dict(zip(("python", "torch", "dicode"), found.stdout.split(), strict=True))
        return {**versions, "gb": size / 1e9, "sha256": hashlib.sha256(video.read_bytes()).hexdigest()}


if __name__ == "__main__":
    main(sys.argv[1:])
