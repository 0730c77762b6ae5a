"""The worked examples of docs/extend.md run as they stand, and name files that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"^```python\n(.*?)^```", body, re.DOTALL | re.MULTILINE)
    for title, body in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
}


@pytest.mark.parametrize("title", [title for title, blocks in SECTIONS.items() if blocks])
def test_the_examples_of_a_section_run(title: str, tmp_path: Path) -> None:
    """In a process of their own, as a user's script: here, types are checked that an unregistered name breaks."""
    script = tmp_path / "example.py"
    script.write_text("\n\n".join(SECTIONS[title]), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_examples_of_a_head_and_a_denoiser() -> None:
    assert {"Add a head", "Add a denoiser"} <= {title for title, blocks in SECTIONS.items() if len(blocks) == 2}


def test_files_that_the_document_names_exist() -> None:
    named = re.findall(r"`((?:dicode|tests|recipes)/[\w/]+\.py)`", TEXT)
    assert named and all((ROOT / name).is_file() for name in named)
