"""The package: what it needs, what it must not bring, what lies in its box, and that documented commands exist."""

import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dicode.checkpoint import CHECKPOINTS
from dicode.cli.app import parse

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(line.split("==")[0]): line.split("==")[1].strip()
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
}
BOX_LIMIT_BYTES = 24_000_000


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != "dicode"]


def test_every_requirement_has_a_lower_bound_that_its_pin_meets():
    for requirement in requirements():
        assert [part.operator for part in requirement.specifier] == [">="], requirement
        assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def test_everything_that_requirements_bring_is_pinned():
    waiting, seen = requirements(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        assert name in PINS, f"{name} is not in constraints.txt"
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                waiting.append(needed)


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "xformers", "decord"])
def test_heavy_packages_are_absent(name):
    assert name not in PINS
    assert util.find_spec(name) is None


def test_importing_the_package_imports_nothing_heavy():
    program = "import dicode, sys; assert not {'torch', 'numpy', 'tyro'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_licence_is_apache_2():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()


def documented_commands() -> list[tuple[str, str]]:
    """Every line of README.md's shell blocks and of the recipes' docstrings that calls `dicode`."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    texts = {"README.md": "\n".join(blocks)}
    texts |= {path.name: path.read_text() for path in sorted((ROOT / "recipes").glob("*.py"))}
    command = re.compile(r"^ *dicode (?:.*\\\n)*.*$", re.M)
    return [(name, line.strip().replace("\\\n", " ")) for name, text in texts.items() for line in command.findall(text)]


@pytest.mark.parametrize(("document", "line"), documented_commands())
def test_documented_commands_exist_with_their_flags(monkeypatch, capsys, document, line):
    monkeypatch.chdir(ROOT)
    try:
        parse(shlex.split(line, comments=True)[1:])
    except SystemExit:
        pytest.fail(f"{document}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("name", ["sprites", "world"])
def test_the_models_in_the_box_load_and_are_small(name: str) -> None:
    from dicode.pipeline import DiCoDe

    model = DiCoDe.from_pretrained(name)
    config = model.tokenizer.config
    assert (config.size, config.fps, config.clip_frames, config.tokens_per_keyframe) == (64, 8.0, 16, 16)
    files = [path for path in (CHECKPOINTS / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert CHECKPOINTS / name / "README.md" in files
    assert sum(path.stat().st_size for path in files) <= BOX_LIMIT_BYTES
