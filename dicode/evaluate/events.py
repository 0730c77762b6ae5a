"""Do videos of `blocks` show what their scripts say, in order? Real ones, reconstructions, and generated ones."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dicode.data.blocks.script import CLIP_FRAMES, EVENTS, FPS, SETS, Script
from dicode.data.cache import FrameCache
from dicode.data.columns import VALIDATION, CachedVideo, spread_numbers
from dicode.evaluate.scores import Score, mean_score
from dicode.features.events.score import score, score_tracks
from dicode.features.events.tracks import Track, tracks_of
from dicode.features.metrics import bootstrap_interval
from dicode.pipeline import DiCoDe, Prompt
from dicode.shapes import FrameStack
from dicode.stopwatch import tracked
from dicode.storyboard import Shot
from dicode.tokenizer.config import TokenizerConfig
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

SIZE = 64
CLIPS_AT_ONCE = 40  # of a batch of videos
STORY_SHARE = 10  # one in so many of the other sets' scripts
STORY_CONTEXT = 2  # key frames: the last one and the next, since shots of the training clips begin with the last one
SHUFFLES = 3  # other scripts that a generated video is compared with
ON_SHEET = 3  # videos of each set
SHUFFLED = "generated, shuffled"
CASES = ("real", "reconstruction", "generated", SHUFFLED)


class Scripted(NamedTuple):
    """A validation video of a set, and what a model is to make of it."""

    name: str
    video: CachedVideo
    script: Script
    prompt: Prompt


class ScoredVideo(NamedTuple):
    """Its scores by case, several of the shuffled one; the objects of the generated video, and frames for the sheet."""

    scripted: Scripted
    scores: dict[str, list[dict[str, Any]]]
    tracks: list[Track]
    frames: dict[str, Video]


def check_scripts(config: TokenizerConfig, cache: FrameCache) -> None:
    """Raise `ValueError` for a cache without scripts, and for a model of other clips."""
    if not scripted_of(cache, 1):
        raise ValueError("events: expected a cache of `dicode data blocks`, whose validation videos have scripts")
    found = (config.size, config.fps, config.tail_frame)
    if found != (SIZE, FPS, CLIP_FRAMES):
        raise ValueError(f"events: expected a model of size, fps and clip {(SIZE, FPS, CLIP_FRAMES)}, got {found}")


def scripted_of(cache: FrameCache, count: int) -> list[Scripted]:
    """Up to `count` validation videos of each set that have a script, a tenth of `story`, by set."""
    by_set: dict[str, list[CachedVideo]] = defaultdict(list)
    for video in cache.columns.having(VALIDATION):
        if "script" in video.extra:
            by_set[video.extra.get("set", "")].append(video)
    counts = {name: -(-count // STORY_SHARE) if name == "story" else count for name in SETS}
    chosen = {name: spread_numbers(len(by_set[name]), most) for name, most in counts.items()}
    return [_scripted(name, by_set[name][i]) for name, numbers in chosen.items() for i in numbers]


def _scripted(name: str, video: CachedVideo) -> Scripted:
    script, prompt = Script.parse(video.extra["script"]), video.caption
    if name != "story":
        return Scripted(name, video, script, prompt)
    lengths_s = [clause.clips * CLIP_FRAMES / FPS for clause in script.clauses]
    shots = [Shot(text, length_s) for text, length_s in zip(video.extra["shots"], lengths_s, strict=True)]
    return Scripted(name, video, script, shots)


def clips_of_scripts(cache: FrameCache, count: int) -> int:
    """Clips of all videos to generate, those of exchanged clauses too."""
    return sum(one.script.clips * (1 + (one.name == "swaps")) for one in scripted_of(cache, count))


def evaluate_events(
    model: DiCoDe, cache: FrameCache, seed: int = 0, count: int = 100
) -> tuple[dict[str, Any], Image.Image]:
    """Shares of clauses, sequences and orders that are right, by set and case, with 95 % intervals over videos.

    `real` is what the scorer itself misses, `reconstruction` the tokenizer's ceiling, and `generated, shuffled` chance:
    generated videos compared with the scripts of others of their set, of as many clips. Up to `count` scripts of each
    set. Those of `story` are generated as storyboards, whose shots go on from the last key frame alone.
    """
    groups: dict[tuple[str, int], list[Scripted]] = defaultdict(list)
    for one in scripted_of(cache, count):
        groups[one.name, one.script.clips].append(one)
    scored: list[ScoredVideo] = []
    for those in tracked([*groups.values()], "videos of a set and length"):
        own: list[ScoredVideo] = []
        at_once = max(1, CLIPS_AT_ONCE // those[0].script.clips)
        for start in range(0, len(those), at_once):
            own += _scored(model, cache, those[start : start + at_once], seed, first=len(scored) + start)
        _shuffle(own)
        scored += own
    figures: dict[str, Any] = {**shares(scored, seed), **sequences(scored, seed), "swap": swap_figures(scored, seed)}
    figures |= {"story_context_key_frames": STORY_CONTEXT, "n": len(scored)}
    return figures, _sheet(scored)


def _scored(model: DiCoDe, cache: FrameCache, part: Sequence[Scripted], seed: int, first: int) -> list[ScoredVideo]:
    """A batch of videos of one set and length; the first of them is sample `first`."""
    clips, indices = part[0].script.clips, list(range(first, first + len(part)))
    rows = [cache.clip_rows(one.video, 0.0, clips * CLIP_FRAMES + 1, float(FPS)) for one in part]
    real = torch.stack([cache.frames[own] for own in rows])
    decoded = model.tokenizer.decode(model.tokenizer.encode(real), seed=seed, sample_indices=indices)
    videos = {"real": real.numpy()[:, :-1], "reconstruction": _whole(decoded)}
    videos["generated"] = generated(model, [one.prompt for one in part], clips, seed + 4, indices)
    exchanged = None
    if part[0].name == "swaps":
        texts = [one.video.extra["swapped_caption"] for one in part]
        exchanged = generated(model, texts, clips, seed + 4, indices)
    scored = []
    for i, one in enumerate(part):
        frames = {case: own[i] for case, own in videos.items()}
        tracks = {case: tracks_of(own) for case, own in frames.items()}
        scores = {case: [score_tracks(own, len(frames[case]), one.script)] for case, own in tracks.items()}
        if exchanged is not None:
            scores["exchanged"] = [score(exchanged[i], Script.parse(one.video.extra["swapped"]))]
        scored.append(ScoredVideo(one, scores, tracks["generated"], frames if i < ON_SHEET else {}))
    return scored


def generated(model: DiCoDe, prompts: Sequence[Prompt], clips: int, seed: int, indices: Sequence[int]) -> np.ndarray:
    """Videos of so many clips, uint8 `b f h w c`."""
    options: dict[str, Any] = {"seed": seed, "sample_indices": list(indices)}
    if isinstance(prompts[0], str):
        options["seconds"] = clips * CLIP_FRAMES / FPS
    else:
        options["context_key_frames"] = STORY_CONTEXT
    return _whole(model.generate_batch(prompts, **options))


def _whole(clips: Iterator[FrameStack]) -> np.ndarray:
    return torch.cat([clip.cpu() for clip in clips], dim=1).numpy()


def _shuffle(scored: Sequence[ScoredVideo]) -> None:
    """Add the scores of generated videos by the scripts of others, all of one set and length."""
    for i, one in enumerate(scored):
        others = [scored[(i + k) % len(scored)].scripted.script for k in range(1, min(SHUFFLES, len(scored) - 1) + 1)]
        frames = one.scripted.script.clips * CLIP_FRAMES
        one.scores[SHUFFLED] = [score_tracks(one.tracks, frames, other) for other in others]


Count = tuple[int | float, int | float]  # how many are right, of how many
Counted = Callable[[Mapping[str, Any]], Count]  # of a score


def shares(scored: Sequence[ScoredVideo], seed: int = 0) -> dict[str, dict[str, Score]]:
    """Of clauses and of their attributes that are right, of objects that last; and of clauses of each event."""
    metrics: dict[str, Counted] = {
        "clauses_right": partial(_clauses, key="all"),
        "colour_right": partial(_clauses, key="colour"),
        "shape_right": partial(_clauses, key="shape"),
        "event_right": partial(_clauses, key="event"),
        "objects_kept": lambda score: (score["kept"], score["joins"]),
    }
    figures: dict[str, dict[str, Score]] = {metric: {} for metric in (*metrics, "right_by_event")}
    sets = _by_set(scored)
    for metric, counted in metrics.items():
        for name, those in sets.items():
            for case in CASES[:-1] if metric == "objects_kept" else CASES:
                _add(figures[metric], f"{name}: {case}", _share(those, case, counted, seed))
    for event in EVENTS:
        for case in CASES:
            counted = partial(_clauses, key="all", event=event)
            _add(figures["right_by_event"], f"{event}: {case}", _share(sets.get("seen", []), case, counted, seed))
    return figures


def sequences(scored: Sequence[ScoredVideo], seed: int = 0) -> dict[str, dict[str, Score]]:
    """Of videos of which everything is right, by number of clauses; and the order of clauses."""
    figures: dict[str, dict[str, Score]] = {"sequences_right": {}, "order": {}}
    for name, those in _by_set(scored).items():
        by_length: dict[int, list[ScoredVideo]] = defaultdict(list)
        for one in those:
            by_length[len(one.scripted.script.clauses)].append(one)
        for case in CASES:
            for length, own in sorted(by_length.items()):
                key = f"{name}, {length} {'clauses' if length > 1 else 'clause'}: {case}"
                share = _share(own, case, lambda score: (float(score["exact"]), 1.0), seed)
                _add(figures["sequences_right"], key, share)
            orders = [[score["order"] for score in one.scores[case] if score["order"] is not None] for one in those]
            if any(orders):
                means = [float(np.mean(own)) for own in orders if own]
                figures["order"][f"{name}: {case}"] = mean_score(means, seed)
    return figures


def swap_figures(scored: Sequence[ScoredVideo], seed: int = 0) -> dict[str, Score]:
    """What becomes of a video when the two clauses of its caption are exchanged, with the same noise.

    `both right`: every clause of both videos. `each in its order`: of the pairs with all clauses somewhere in both.
    """
    pairs = [[one.scores["generated"][0], one.scores["exchanged"][0]] for one in scored if "exchanged" in one.scores]
    both = [[(float(all(own["exact"] for own in pair)), 1.0)] for pair in pairs]
    whole = [all(clause["when"] is not None for own in pair for clause in own["clauses"]) for pair in pairs]
    ordered = [all(own["order"] == 1.0 for own in pair) for pair in pairs]
    orders = [[(float(right), float(counts))] for right, counts in zip(ordered, whole, strict=True)]
    figures: dict[str, Score] = {}
    _add(figures, "both right", share_score(both, seed))
    _add(figures, "each in its order", share_score(orders, seed))
    return figures


def _by_set(scored: Sequence[ScoredVideo]) -> dict[str, list[ScoredVideo]]:
    found: dict[str, list[ScoredVideo]] = defaultdict(list)
    for one in scored:
        found[one.scripted.name].append(one)
    return found


def _clauses(score: Mapping[str, Any], key: str, event: str = "") -> Count:
    own = [clause[key] for clause in score["clauses"] if event in ("", clause["event_name"])]
    return sum(own), len(own)


def _share(scored: Sequence[ScoredVideo], case: str, counted: Counted, seed: int) -> Score | None:
    return share_score([[counted(score) for score in one.scores[case]] for one in scored], seed)


def _add(figures: dict[str, Score], key: str, score: Score | None) -> None:
    if score is not None:
        figures[key] = score


def share_score(counts: Sequence[Sequence[Count]], seed: int = 0) -> Score | None:
    """Right over all, each row a video's counts: Wilson's interval where every video counts once or all are alike.

    Otherwise the bootstrap's, over videos. None where nothing is counted.
    """
    from scipy.stats import binomtest

    sums = np.array([np.sum(own, axis=0) for own in counts if len(own)]).reshape(-1, 2)
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        return None
    value = float(sums[:, 0].sum() / sums[:, 1].sum())
    if (sums[:, 1] == 1).all() or value in (0.0, 1.0):
        low, high = binomtest(round(value * len(sums)), len(sums)).proportion_ci(method="wilson")
        return Score(value, (float(low), float(high)), len(sums))
    interval = bootstrap_interval(lambda rows: rows[:, 0].sum() / rows[:, 1].sum(), sums, seed=seed)
    return Score(value, interval, len(sums))


def _sheet(scored: Sequence[ScoredVideo]) -> Image.Image:
    """The first videos of each set, real, through tokens and generated; + and - are clauses right and wrong."""
    rows, labels = [], []
    for name, those in _by_set(scored).items():
        for one in [own for own in those if own.frames][:ON_SHEET]:
            for case, frames in one.frames.items():
                marks = "".join("+" if clause["all"] else "-" for clause in one.scores[case][0]["clauses"])
                rows.append(frames)
                labels.append(f"{name}, {case} {marks} {one.scripted.video.caption}")
    return contact_sheet(rows, labels, columns=12)
