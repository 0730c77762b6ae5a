"""Scripts and caches of `blocks`, made by another process, where no call is checked for its types: far faster."""

import json
import os
import subprocess
import sys
from pathlib import Path

from dicode.data.blocks.clips import BlocksOptions
from dicode.data.blocks.script import Script


def training_scripts(count: int) -> list[Script]:
    """Scripts of training, from the first one on."""
    made = _run(
        "import json; from dicode.data.blocks.plan import script_of\n"
        f"print(json.dumps([script_of(0, 'training', index).record() for index in range({count})]))"
    )
    return [Script.parse(record) for record in json.loads(made)]


def write_blocks(folder: Path, options: BlocksOptions) -> Path:
    """A cache of these options."""
    _run(
        "from pathlib import Path; from dicode.data.blocks.clips import BlocksOptions, build_blocks\n"
        f"build_blocks({options!r}, Path({str(folder)!r}))"
    )
    return folder


def _run(program: str) -> bytes:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True).stdout
