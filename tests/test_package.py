"""The package: what it needs, what it must not bring, and what lies in its box."""

import subprocess
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dicode import __version__
from dicode.checkpoint import CHECKPOINTS

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


def test_the_lock_has_the_versions_of_the_constraints_from_pypi_alone():
    """`uv lock --check` needs the network; this compares what it would."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    packages = {package["name"]: package for package in lock["package"]}
    assert len(packages) == len(lock["package"]), "a package in two versions"
    own = packages.pop("dicode")
    assert {package["source"]["registry"] for package in packages.values()} == {"https://pypi.org/simple"}
    assert {name: PINS[name] for name in packages if name in PINS} == {
        name: package["version"] for name, package in packages.items() if name in PINS
    }
    locked = {(one["name"], one.get("specifier", "")) for one in own["metadata"]["requires-dist"]}
    assert {(canonicalize_name(r.name), str(r.specifier)) for r in requirements()} == locked - {("dicode", "")}


def test_the_citation_names_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


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
