"""A user's scorer: its answers are compared with the keys of caption lines, by key, beside chance."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from dicode.config.user_code import RecipeError
from dicode.data.cache import CachedVideo, FrameCache
from dicode.features.scorer import ALL, Scorer, agrees, scorer_metrics
from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig
from dicode.pipeline import DiCoDe
from dicode.train.chain import assemble
from dicode.train.runs import LanguageRun, LoopConfig, OptimConfig
from dicode.train.stages import run_recipe, stage_of


def scorer_of(folder: Path, body: str) -> Scorer:
    (folder / "mine.py").write_text(f"def found(frames):\n    {body}\n")
    return Scorer(f"{folder}/mine.py:found")


def frames_of(value: int) -> np.ndarray:
    return np.full((3, 4, 4, 3), value, np.uint8)


def test_accuracy_of_each_key_stands_beside_that_of_shuffled_videos(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, "return {'shade': int(frames[0, 0, 0, 0]), 'half': bool(frames.mean() > 4), 'x': 1}")
    truths = [{"shade": i % 5, "half": i > 4, "caption": "a"} for i in range(10)]
    made = scorer_metrics(scorer, [frames_of(i) for i in range(10)], truths)
    assert made.keys() == {"shade", "half", ALL}  # neither what lines lack nor what the scorer lacks
    assert (made["shade"].value, made["half"].value, made[ALL].value) == (0.5, 1.0, 0.5)
    assert made["half"].chance == pytest.approx(4 / 9)  # of nine others four are on the same side
    assert made["shade"].chance == pytest.approx(5 / 90)  # videos 0 to 4 each fit one other
    z, n, p = norm.ppf(0.975), 10, 0.5  # Wilson 1927
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert made["shade"].interval == pytest.approx((0.5 - half, 0.5 + half))
    assert made["half"].interval[0] < 0.8 and made["half"].n == 10


def test_a_video_without_a_key_is_left_out_of_it(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, "return {'a': 1, 'b': 2}")
    made = scorer_metrics(scorer, [frames_of(i) for i in range(3)], [{"a": 1, "b": 2}, {"a": 1}, {"b": 3}])
    assert {key: (own.value, own.n) for key, own in made.items()} == {"a": (1.0, 2), "b": (0.5, 2), ALL: (1.0, 1)}


@pytest.mark.parametrize(
    ("found", "true", "right"),
    [
        (" Red ", "red", True),
        ("red", "blue", False),
        (3, 3, True),
        (3.0, 3, True),
        (33, 34, False),
        (1.04, 1.1, True),
        (1.04, 1.2, False),
        (True, 1, False),
        (True, True, True),
        (None, "red", False),
        ("3", 3, False),
        ([1, 2], [1, 2], True),
    ],
)
def test_answers_are_right_where_they_mean_the_same(found: object, true: object, right: bool) -> None:
    assert agrees(found, true) is right


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 3", r"mine.py:found: expected it to return a dict with names for keys, got 3"),
        ("return {}", r"expected a key of the caption lines, which have event; it returned none"),
        ("return {'evnt': 1}", r"which have event; it returned evnt"),
        ("return frames['x']", r"mine.py, line 2 \(return frames\['x'\]\): IndexError"),
    ],
)
def test_what_a_scorer_does_wrong_is_said_in_one_line(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        scorer_metrics(scorer_of(tmp_path, body), [frames_of(0)], [{"event": "a jump"}])


def test_a_scorer_cannot_change_the_frames_of_others(tmp_path: Path) -> None:
    frames = frames_of(7)
    scorer_of(tmp_path, "frames[:] = 0; return {'a': 1}")(frames)
    assert (frames == 7).all()


def test_a_run_takes_its_best_weights_by_a_scorer_of_what_it_renders(tiny_model: Path, tmp_path: Path) -> None:
    videos = [
        CachedVideo("a", f"{i}.mp4", (f"clip {i % 3}",), i % 2 == 0, True, 8 * i, 8, 2.0, extra={"count": 32 + i // 4})
        for i in range(8)
    ]
    frames = torch.randint(256, (64, 32, 32, 3), dtype=torch.uint8)
    FrameCache(tuple(videos), frames, torch.arange(8, dtype=torch.float64).repeat(8) / 4).save(tmp_path / "cache")
    body = f"""
    import numpy as np; from pathlib import Path
    np.save(f"{tmp_path}/seen-{{len(list(Path('{tmp_path}').glob('seen-*')))}}.npy", frames)
    return {{'count': len(frames)}}"""
    config = DeepLMConfig(
        BodyConfig("llama", width=16, depth=1, heads=2),
        head=HeadConfig(components=2),
        positions=80,
        vocab_size=300,
        token_width=6,
        tokens_per_keyframe=4,
        max_keyframes=9,
        text_length=8,
    )
    run = LanguageRun(
        cache=str(tmp_path / "cache"), tokenizer=str(tiny_model), model=config, longer=(), longer_share=(),
        scorer=scorer_of(tmp_path, body).spec,
        loop=LoopConfig(best="scorer_all", evaluate_every=2, optim=OptimConfig(steps=2, batch_size=2)),
    )  # fmt: skip
    best = run_recipe(run, tmp_path / "lm", {})
    assert best["scorer_count"] == best["scorer_all"] == 0.5  # two of four validation lines say 32
    assemble(tiny_model, tmp_path / "lm/best", tmp_path / "model")
    held = [video.captions[0] for video in videos if video.validation]
    made = DiCoDe.from_pretrained(tmp_path / "model").generate_batch(held, seconds=4.0)
    shown = torch.cat(list(made), dim=1)
    last = [np.load(tmp_path / f"seen-{4 + i}.npy") for i in range(4)]  # those before were seen before the first step
    assert (shown.numpy().astype(int) - np.stack(last)).std() < shown.float().std() / 4  # weights in float16
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/recipe.json").write_text('{"recipe": {"run": {"first_stage": "runs/first_stage/best"}}}')
    with pytest.raises(ValueError, match="has not learnt to render clips"):
        stage_of(dataclasses.replace(run, tokenizer=str(tmp_path / "keys/best")))
