"""`evaluate --parts events`: a model that does as told reaches what real clips do, one that does not is at chance."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from drawn_blocks import write_blocks

from dicode.cli.app import main
from dicode.data.blocks.clips import BlocksOptions, drawn
from dicode.data.blocks.script import SETS, Script
from dicode.data.cache import FrameCache
from dicode.evaluate.events import (
    CASES,
    SHUFFLED,
    check_scripts,
    clips_of_scripts,
    evaluate_events,
    scripted_of,
    share_score,
)
from dicode.pipeline import DiCoDe
from dicode.storyboard import Shot

COUNT = 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FrameCache:
    folder = tmp_path_factory.mktemp("events") / "cache"
    return FrameCache.load(write_blocks(folder, BlocksOptions(count=1, validation=COUNT)))


class Oracle(DiCoDe):
    """Has the whole cache by heart: clips of the caption's own video. Its tokens are the frames."""

    def __init__(self, cache: FrameCache) -> None:
        torch.nn.Module.__init__(self) if isinstance(self, torch.nn.Module) else None
        self.known: dict[str, np.ndarray] = {}
        for video in cache.videos:
            frames = cache.frames[video.first : video.first + video.count].numpy()[:-1]
            self.known[video.captions[0]] = frames
            if "swapped" in video.extra:
                other = Script.parse(video.extra["swapped"])
                self.known[video.extra["swapped_caption"]] = drawn(other, 0, "swaps", 0)[:-1]
        self.tokenizer = SimpleNamespace(encode=lambda frames: frames, decode=self.decoded)  # type: ignore[assignment]

    def decoded(self, frames: torch.Tensor, **_: Any) -> Iterator[torch.Tensor]:
        yield from frames[:, :-1].split(16, dim=1)

    def generate_batch(self, prompts: Sequence[Any], **options: Any) -> Iterator[torch.Tensor]:
        texts = [prompt if isinstance(prompt, str) else prompt[0].prompt for prompt in prompts]
        assert ("seconds" in options) == isinstance(prompts[0], str)
        yield torch.from_numpy(np.stack([self.known[text] for text in texts]))


def test_a_model_that_does_as_told_is_right_and_is_not_by_the_scripts_of_others(cache: FrameCache) -> None:
    figures, sheet = evaluate_events(Oracle(cache), cache, count=COUNT)
    assert figures["n"] == COUNT * (len(SETS) - 2) + 1
    right = figures["clauses_right"]
    for name in SETS[1:]:
        for case in CASES[:-1]:
            assert right[f"{name}: {case}"].value > 0.9, (name, case)
    chance = [value.value for key, value in right.items() if key.endswith(SHUFFLED)]
    assert len(chance) > 2 and np.mean(chance) < 0.4
    assert figures["swap"]["both right"].value == 1 and figures["swap"]["each in its order"].value == 1
    assert figures["order"]["lengths: generated"].value > 0.9
    assert figures["objects_kept"]["lengths: real"].value > 0.95
    assert {key.split(":")[0] for key in figures["sequences_right"]} >= {"lengths, 6 clauses", "story, 30 clauses"}
    assert sheet.width > 12 * 64


def test_sets_are_limited_and_a_story_is_a_storyboard(cache: FrameCache) -> None:
    found = scripted_of(cache, 2)
    assert [sum(one.name == name for one in found) for name in SETS] == [0, 2, 2, 2, 2, 2, 2, 2, 1]
    assert isinstance(found[-1].prompt, list) and isinstance(found[-1].prompt[0], Shot) and len(found[-1].prompt) == 30
    assert clips_of_scripts(cache, 2) > sum(one.script.clips for one in found)


def test_intervals_are_over_videos() -> None:
    whole = share_score([[(1.0, 1.0)]] * 20)
    assert whole is not None and whole.value == 1 and whole.interval is not None and 0.8 < whole.interval[0] < 0.9
    mixed = share_score([[(2.0, 4.0)], [(4.0, 4.0)], [(0.0, 0.0)], [(1.0, 2.0)]])
    assert mixed is not None and mixed.value == pytest.approx(0.7) and mixed.n == 3
    assert share_score([]) is None and share_score([[(0.0, 0.0)]]) is None


def test_other_caches_and_models_are_errors(
    cache: FrameCache, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from toy_runs import write_cache

    from dicode.tokenizer.video_tokenizer import VideoTokenizer

    write_cache(tmp_path / "plain", count=4)
    command = ["evaluate", str(tiny_model), "--parts", "events", "-o", str(tmp_path / "out"), "--cache"]
    assert main([*command, str(tmp_path / "plain")]) == 2
    assert "dicode data blocks" in capsys.readouterr().err
    with pytest.raises(ValueError, match="size, fps and clip"):
        check_scripts(VideoTokenizer.from_pretrained(tiny_model).config, cache)
