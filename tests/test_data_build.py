"""Building a cache: the same bytes whoever does the work and however often it stops; scenes, copies, bad files."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from synthetic import draw_clip
from test_cli import spoilt_clips as spoilt_clips  # a fixture

from dicode.cli.app import main
from dicode.data import build
from dicode.data import cache as shards
from dicode.data.build import COLOUR_LEVELS, CacheOptions, build_cache, look_of, repeats, scenes
from dicode.data.cache import FrameCache
from dicode.data.index import check_files, read_index
from dicode.data.parallel_map import _start_ray
from dicode.data.records import ClipRecord, described
from dicode.files import place, put_text
from dicode.video.read import VideoReadError, native_frames
from dicode.video.write import FORMATS, VideoWriter

OPTIONS = CacheOptions(size=16, files_per_shard=2)
# A worker that kills itself in the second unit, the first time; then the command as anybody would run it.
DEADLY = """
import os, signal, sys
from dicode.cli.app import main
from dicode.data import build

whole, mark = build.make_shard, sys.argv[1]

def dies_once(unit):
    if unit.number == 1 and not os.path.exists(mark):
        open(mark, "x").close()
        unit.output.mkdir(exist_ok=True)
        (unit.output / ".shard-00001.safetensors.x.part").touch()  # as if it was about to write
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(unit)

build.make_shard = dies_once
sys.exit(main(sys.argv[2:]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_processes_make_the_bytes_that_one_process_makes(tmp_path: Path, spoilt_clips: Path) -> None:
    records = read_index(spoilt_clips)
    build_cache(records, tmp_path / "serial", OPTIONS)
    build_cache(records, tmp_path / "processes", OPTIONS, workers=2)
    assert contents(tmp_path / "serial") == contents(tmp_path / "processes")
    assert {"shard-00000.safetensors", "shard-00002.json", "quarantine.jsonl"} < contents(tmp_path / "serial").keys()


def test_ray_makes_the_same_shards_though_a_worker_is_killed_midway(tmp_path: Path, drawn_clips: Path) -> None:
    pytest.importorskip("ray.data")
    build_cache(read_index(drawn_clips), tmp_path / "serial", OPTIONS)
    command = ["data", "cache", str(drawn_clips), "-o", str(tmp_path / "ray"), "--ray", "local", "--workers", "3"]
    command += ["--size", "16", "--files-per-shard", "2"]
    # By itself Ray lets its workers wait for whatever else the machine does: six minutes beside two trainings.
    settings = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[1])}
    argv = [sys.executable, "-c", DEADLY, str(tmp_path / "mark"), *command]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 clips (1 for validation), 120 frames of 16×16" in done.stdout
    assert (tmp_path / "mark").exists()
    assert contents(tmp_path / "serial") == contents(tmp_path / "ray")


SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.mark.parametrize(
    ("failures", "error"),
    [
        ([SLOW, "RPC error: Deadline Exceeded"], None),
        ([SLOW] * 6, r"--ray local: Ray did not start in 6 attempts, .*; --workers alone does without it"),
        (["no such thing"], "no such thing"),
    ],
)
def test_ray_that_is_slow_to_start_is_started_again(
    monkeypatch: pytest.MonkeyPatch, failures: list[str], error: str | None
) -> None:
    """Ray gives itself half a minute, which on a machine with twenty other programs is too short."""
    left, ended = list(failures), []

    def start(*_: object, **options: object) -> None:
        assert options["num_cpus"] == 2
        if left:
            raise Exception(left.pop(0))

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=start, shutdown=lambda: ended.append(1)))
    with pytest.raises(Exception, match=error) if error else nullcontext():
        _start_ray(2)
    assert not left and len(ended) == len(failures)


def test_a_killed_process_says_what_to_do_and_the_same_command_continues(tmp_path: Path, drawn_clips: Path) -> None:
    script = tmp_path / "deadly.py"  # a file, since processes started anew import it
    script.write_text(DEADLY.replace("sys.exit(main", "if __name__ == '__main__': sys.exit(main"))
    command = ["data", "cache", str(drawn_clips), "-o", str(tmp_path / "cache"), "--workers", "2"]
    command += ["--size", "16", "--files-per-shard", "2"]
    argv = [sys.executable, str(script), str(tmp_path / "mark"), *command]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "a worker process was killed" in done.stderr and not (tmp_path / "cache/index.json").exists()
    for folder in ("cache", "serial"):
        build_cache(read_index(drawn_clips), tmp_path / folder, OPTIONS)
    assert contents(tmp_path / "cache") == contents(tmp_path / "serial")


def test_a_stopped_run_goes_on_with_the_shards_that_are_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_cache(read_index(drawn_clips), tmp_path / "whole", OPTIONS)
    made: list[int] = []
    read = build._clips

    def clips(record: ClipRecord, options: CacheOptions) -> object:
        made.append(int(record.path.stem))
        if made == [0, 1, 2]:
            raise KeyboardInterrupt
        return read(record, options)

    monkeypatch.setattr(build, "_clips", clips)
    command = ["data", "cache", str(drawn_clips), "-o", str(tmp_path / "cache"), "--size", "16"]
    command += ["--files-per-shard", "2"]
    assert main(command) == 130
    assert "finished shards are kept; the same command continues" in capsys.readouterr().err
    assert sorted(contents(tmp_path / "cache")) == ["shard-00000.json", "shard-00000.safetensors"]
    (tmp_path / "cache" / ".shard-00001.safetensors.x.part").touch()  # of a process that could not clean up
    assert main(command) == 0
    assert made == [0, 1, 2, 2, 3, 4, 5]
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert main(command) == 0 and len(made) == 7


def test_only_what_changed_is_made_again(tmp_path: Path, drawn_clips: Path) -> None:
    clips, cache = tmp_path / "clips", tmp_path / "cache"
    shutil.copytree(drawn_clips, clips)
    build_cache(read_index(clips), cache, OPTIONS)
    save_file({"values": torch.zeros(2)}, cache / "shard-00000.tokens-12.safetensors")
    of_all = cache / f"rendered-{'0' * 16}-{'0' * 16}.safetensors"
    save_file({"latents": torch.zeros(2)}, of_all)
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("shard-*")}
    shutil.copy(clips / "videos/0000.mp4", clips / "videos/0004.mp4")
    build_cache(read_index(clips), cache, OPTIONS)
    after = {path.name: path.stat().st_mtime_ns for path in cache.glob("shard-*")}
    assert {name for name in before if before[name] != after[name]} == {"shard-00002.json", "shard-00002.safetensors"}
    assert not of_all.exists()
    build_cache(read_index(clips)[:3], cache, OPTIONS)
    assert sorted(path.name for path in cache.glob("shard-*.json")) == ["shard-00000.json", "shard-00001.json"]
    assert (cache / "shard-00000.tokens-12.safetensors").exists()
    build_cache(read_index(clips)[:3], cache, CacheOptions(size=8, files_per_shard=2))
    assert not (cache / "shard-00000.tokens-12.safetensors").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda note: note | {"number": -5},
        lambda note: note | {"number": 2},
        lambda note: note | {"shard": note["shard"] | {"frames": 39}},
        lambda note: note | {"shard": None},
        lambda note: note | {"entries": [note["entries"][0] | {"record": 9}, note["entries"][1]]},
        lambda note: note | {"entries": [{"video": {**note["entries"][0]["video"], "count": 99}}]},
        lambda note: note | {"entries": [{"video": {**note["entries"][0]["video"], "period_s": 0}}]},
        lambda note: note | {"entries": note["entries"][:1]},
        lambda note: "[" * 100_000,
        lambda note: "\udcff",
    ],
)
def test_a_damaged_note_of_a_shard_is_made_again(tmp_path: Path, drawn_clips: Path, damage) -> None:
    records = read_index(drawn_clips)
    build_cache(records, tmp_path / "cache", OPTIONS)
    whole, note = contents(tmp_path / "cache"), tmp_path / "cache" / "shard-00001.json"
    damaged = damage(json.loads(note.read_text()))
    text = damaged if isinstance(damaged, str) else json.dumps(damaged)
    note.write_text(text, errors="surrogateescape")
    build_cache(records, tmp_path / "cache", OPTIONS)
    assert contents(tmp_path / "cache") == whole


def test_captions_and_split_change_without_the_shards(tmp_path: Path, drawn_clips: Path) -> None:
    clips, cache = tmp_path / "clips", tmp_path / "cache"
    shutil.copytree(drawn_clips, clips)
    build_cache(read_index(clips), cache, OPTIONS)
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("shard-*")}
    rows = [json.loads(line) for line in (clips / "captions.jsonl").read_text().splitlines()]
    (clips / "videos/0000.mp4").write_bytes(b"")  # the split is over what can be read
    rows[2] |= {"caption": ["new", "words"], "validation": True, "lab": "x"}
    (clips / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build_cache(read_index(clips), cache, OPTIONS)
    videos = {video.file: video for video in FrameCache.load(cache).videos}
    assert [file for file, video in videos.items() if video.validation] == ["videos/0001.gif", "videos/0002.mp4"]
    assert (videos["videos/0002.mp4"].captions, videos["videos/0002.mp4"].extra) == (("new", "words"), {"lab": "x"})
    assert {p.name for p in cache.glob("shard-*") if p.stat().st_mtime_ns != before[p.name]} == {
        "shard-00000.json",
        "shard-00000.safetensors",
    }


def test_spans_of_a_file_are_cut_and_15_frames_a_second_stay(tmp_path: Path) -> None:
    for name, fps in (("15", 15.0), ("30", 30.0), ("24", 24.0), ("25", 25.0)):
        film(tmp_path / f"{name}.mp4", (1.0, 1.0, 1.0), fps=fps)
    rows = [{"file": "15.mp4", "start_s": 1, "end_s": 2}, {"file": "15.mp4", "start_s": "2.0"}, {"file": "30.mp4"}]
    rows += [{"file": "24.mp4"}, {"file": "25.mp4"}, {"file": "25.mp4", "end_s": 9}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (made,) = build_cache(read_index(tmp_path), tmp_path / "cache", CacheOptions(size=16))
    cache = FrameCache.load(tmp_path / "cache")
    found = [(v.file, v.start_s, v.count, round(v.period_s, 3)) for v in cache.videos]
    spans = [("15.mp4", 1.0, 15, 1.0), ("15.mp4", 2.0, 15, 1.0)]
    assert found == [*spans, ("30.mp4", 0.0, 45, 3.0), ("24.mp4", 0.0, 36, 3.0), ("25.mp4", 0.0, 38, 3.0)]
    assert "its line has end_s 9, and the file ends at 3 s" in made.bad[0].reason
    _, bad = check_files(read_index(tmp_path))  # `data index` calls bad what `data cache` does
    assert [reason for _, reason in bad] == [file.reason for file in made.bad]
    whole = native_frames(tmp_path / "15.mp4", 16)[0]
    assert np.abs(cache.frames[:15].numpy().astype(int) - whole[15:30]).mean() < 1


def test_a_frame_that_is_replaced_in_a_folder_of_frames_is_noticed(tmp_path: Path) -> None:
    with VideoWriter(f"{tmp_path}/v/", 8.0) as writer:
        writer.write(draw_clip(1, 4, 16)[0])
    options = CacheOptions(size=16)
    build_cache(read_index(tmp_path / "v"), tmp_path / "cache", options)
    before = FrameCache.load(tmp_path / "cache").frames[:].clone()
    frame = sorted((tmp_path / "v").glob("*.png"))[2]
    Image.new("RGB", (16, 16), "red").save(tmp_path / "new.png")
    time_ns = (tmp_path / "v").stat().st_mtime_ns
    frame.write_bytes((tmp_path / "new.png").read_bytes())
    os.utime(tmp_path / "v", ns=(time_ns, time_ns))
    build_cache(read_index(tmp_path / "v"), tmp_path / "cache", options)
    after = FrameCache.load(tmp_path / "cache").frames[:]
    assert [bool((a != b).any()) for a, b in zip(before, after, strict=True)] == [False, False, True, False]


FOREIGN = {
    "a model": {"model.safetensors": {"weight": 3}, "config.json": "{}"},
    "a model in shards": {"shard-00000.safetensors": {"weight": 3}, "shard-00001.safetensors": {"weight": 3}},
    "an index of another kind": {"index.json": '{"weight_map": {}}'},
    "a text": {"thesis.txt": "years of work"},
    "a shard's note": {"shard-00000.json": '{"my": "notes"}'},
    "lines of another kind": {"copies.jsonl": '{"mine": 1}\n'},
    "lines beside ours": {"quarantine.jsonl": '{"file": "a", "reason": "b"}\nnotes\n'},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_no_cache_is_made_among_foreign_files(tmp_path: Path, drawn_clips: Path, kind: str) -> None:
    for name, held in FOREIGN[kind].items():
        if isinstance(held, dict):
            save_file({key: torch.zeros(size) for key, size in held.items()}, tmp_path / name)
        else:
            (tmp_path / name).write_text(held)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds files that no cache has"):
        build_cache(read_index(drawn_clips), tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="holds files that no cache has"):
        FrameCache((), torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1)).save(tmp_path)
    assert contents(tmp_path) == before


def test_foreign_files_in_a_cache_stay(tmp_path: Path, drawn_clips: Path) -> None:
    cache = tmp_path / "cache"
    build_cache(read_index(drawn_clips), cache, OPTIONS)
    mine = {f"{name}.safetensors": {"w": torch.zeros(2)} for name in ("mine", "rendered-mine", "EffLite0-weights")}
    for name, tensors in mine.items():
        save_file(tensors, cache / name)
    (cache / "shard-list.txt").write_text("notes")
    held = {name: content for name, content in contents(cache).items() if name in (*mine, "shard-list.txt")}
    build_cache(read_index(drawn_clips)[:2], cache, CacheOptions(size=8, files_per_shard=1))
    (cache / "index.json").write_text("damaged")
    build_cache(read_index(drawn_clips)[:1], cache, CacheOptions(size=8, files_per_shard=1))
    assert held.items() <= contents(cache).items()
    FrameCache.load(cache).save(cache)
    assert held.items() <= contents(cache).items()
    for name in ("shard-00009.json", "copies.jsonl"):  # where a cache may come to write
        (cache / name).write_text('{"mine": 1}')
        with pytest.raises(ValueError, match=rf"holds files that no cache has .*{name}"):
            build_cache(read_index(drawn_clips), cache, OPTIONS)
        assert (cache / name).read_text() == '{"mine": 1}'
        (cache / name).unlink()


def test_a_full_disk_keeps_what_is_done_and_calls_no_file_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "cache", str(drawn_clips), "-o", str(tmp_path / "cache"), "--size", "16"]
    command += ["--files-per-shard", "2"]
    with monkeypatch.context() as patch:
        real, made = shards.save_file, []

        def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
            made.append(path)
            if len(made) > 1:
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            real(tensors, path)

        patch.setattr(shards, "save_file", full)
        assert main(command) == 2
    err = capsys.readouterr().err
    assert "no space is left there; finished shards are kept" in err and err.count("\n") == 1
    assert sorted(contents(tmp_path / "cache")) == ["shard-00000.json", "shard-00000.safetensors"]
    assert main(command) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--size", "100000"], "--size"),
        (["--max-fps", "nan"], "--max-fps"),
        (["--dedupe", "-1"], "--dedupe"),
        (["--workers", "0"], "--workers"),
        (["--scenes", "inf"], "--scenes"),
        (["--files-per-shard", "0"], "--files-per-shard"),
        (["--validation-by", "lab"], "--validation-by: expected KEY=VALUE"),
        (["--validation-by", "lab=x"], "--validation-by lab=x: no line has that"),
        (["-o", ""], "-o: expected the name of a folder, got ''"),
    ],
)
def test_flags_out_of_range_are_named_before_any_work(tmp_path, monkeypatch, drawn_clips, capsys, flags, said):
    monkeypatch.setattr(build, "_clips", None)  # which any work would call
    assert main(["data", "cache", str(drawn_clips), "-o", str(tmp_path / "cache"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_files_are_quarantined_with_their_reasons(tmp_path: Path, spoilt_clips: Path) -> None:
    made = build_cache(read_index(spoilt_clips), tmp_path / "cache", OPTIONS)
    lines = [json.loads(line) for line in (tmp_path / "cache/quarantine.jsonl").read_text().splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["0002.mp4", "0003.gif"]
    assert "empty file" in lines[0]["reason"] and "no such file" in lines[1]["reason"]
    assert made[1].shard is None  # both of its files are bad
    assert FrameCache.load(tmp_path / "cache").frames.shape == (80, 16, 16, 3)
    with pytest.raises(VideoReadError, match=r"none of 2 files can be read; see .*quarantine.jsonl"):
        build_cache(read_index(spoilt_clips)[2:4], tmp_path / "cache", OPTIONS)
    assert not (tmp_path / "cache/index.json").exists()


def test_files_elsewhere_and_texts_in_other_encodings_stop_nothing(tmp_path: Path, drawn_clips: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for name in ("a", "b"):
        shutil.copy(drawn_clips / "videos/0000.mp4", loose / f"{name}.mp4")
    (loose / "a.txt").write_bytes("café".encode("latin-1"))
    (loose / "b.txt").write_text("café")
    made = build_cache(read_index(loose), tmp_path / "cache", OPTIONS)
    assert [entry.video.captions for entry in made[0].entries] == [("café",)]
    assert "a.mp4: the text beside it cannot be read" in made[0].bad[0].reason
    elsewhere = (drawn_clips / "videos/0001.gif").as_posix()
    (loose / "captions.jsonl").write_text(json.dumps({"file": elsewhere}) + "\n" + json.dumps({"file": "b.mp4"}))
    made = build_cache(read_index(loose), tmp_path / "cache", OPTIONS)
    assert [entry.video.file for entry in made[0].entries] == [elsewhere, "b.mp4"]


def film(path: Path, seconds: tuple[float, ...], shift: int = 0, fps: float = 10.0) -> None:
    """Scenes of one moving shape each, on grounds of different colours."""
    grounds = ((250, 240, 230), (20, 60, 40), (90, 30, 120), (200, 180, 20))
    with VideoWriter(path, fps) as writer:
        for i, length_s in enumerate(seconds):
            frames, _ = draw_clip(i + shift, round(length_s * fps), 48)
            white = (frames == 255).all(-1, keepdims=True)
            writer.write(np.where(white, np.uint8(grounds[(i + shift) % 4]), frames))


def test_films_are_cut_into_scenes_and_short_ones_left_out(tmp_path: Path) -> None:
    film(tmp_path / "film.mp4", (2.0, 0.5, 3.0))
    film(tmp_path / "one.mp4", (1.5,))
    options = CacheOptions(size=32, scenes=1.0)
    records = [ClipRecord(tmp_path / name, ("a film",), tmp_path, validation=True) for name in ("film.mp4", "one.mp4")]
    build_cache(records, tmp_path / "cache", options)
    videos = FrameCache.load(tmp_path / "cache").videos
    found = [(v.file, round(v.start_s, 3), v.count, round(v.period_s, 3), v.validation) for v in videos]
    assert found == [
        ("film.mp4", 0.0, 20, 2.0, True),
        ("film.mp4", 2.5, 30, 3.0, True),
        ("one.mp4", 0.0, 15, 1.5, True),
    ]
    assert [v.first for v in videos] == [0, 20, 50]
    (bad,) = build_cache([*records, records[1]], tmp_path / "long", CacheOptions(size=32, scenes=1.8))[0].bad[:1]
    assert "its longest scene lasts 1.50 s" in bad.reason
    with pytest.raises(ValueError, match="loops, scenes"):
        CacheOptions(scenes=1.0, loops=True)


def test_motion_is_no_cut() -> None:
    frames, _ = draw_clip(3, 40, 32)
    assert scenes(frames) == [(0, 40)]
    assert scenes(frames[:1]) == [(0, 1)]


def copies(folder: Path) -> list[ClipRecord]:
    """Six films; 2 and 5 show the same as 0 and 1, of other size and quality; 4 differs from 3 in its colour alone."""
    coarse = replace(FORMATS[".mp4"], codec_options={**FORMATS[".mp4"].codec_options, "crf": "36"})
    for i, (shift, scale) in enumerate([(0, 1), (1, 1), (0, 2), (2, 1), (2, 1), (1, 1)]):
        frames, _ = draw_clip(shift, 20, 48)
        frames[..., :10, :, :] = 40 * shift
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(FORMATS, ".mp4", coarse if i == 5 else FORMATS[".mp4"])
            with VideoWriter(folder / f"{i}.mp4", 10.0, scale=scale) as writer:
                writer.write(frames[..., ::-1].copy() if i == 4 else frames)
    return [ClipRecord(folder / f"{i}.mp4", ("x",), folder) for i in range(6)]


@pytest.mark.parametrize("files_per_shard", [2, 4])
def test_copies_are_left_out_whatever_the_shards(tmp_path: Path, files_per_shard: int) -> None:
    options = CacheOptions(size=32, dedupe=6, files_per_shard=files_per_shard)
    build_cache(copies(tmp_path), tmp_path / "cache", options)
    cache = FrameCache.load(tmp_path / "cache")
    assert [video.file for video in cache.videos] == ["0.mp4", "1.mp4", "3.mp4", "4.mp4"]
    assert len(cache.frames) == 80 and [video.first for video in cache.videos] == [0, 20, 40, 60]
    name = tmp_path.name
    assert [json.loads(line) for line in (tmp_path / "cache/copies.jsonl").read_text().splitlines()] == [
        {"source": name, "file": "2.mp4", "start_s": 0.0, "repeats": f"{name}/0.mp4"},
        {"source": name, "file": "5.mp4", "start_s": 0.0, "repeats": f"{name}/1.mp4"},
    ]


def test_leaving_copies_out_can_be_changed_and_repeated(tmp_path: Path) -> None:
    records = copies(tmp_path)
    for bits in (6, 0):
        build_cache(records, tmp_path / f"fresh-{bits}", CacheOptions(size=32, dedupe=bits, files_per_shard=2))
    assert contents(tmp_path / "fresh-6") != contents(tmp_path / "fresh-0")
    for bits in (6, 0, 0, 6, 6):
        build_cache(records, tmp_path / "cache", CacheOptions(size=32, dedupe=bits, files_per_shard=2))
        assert contents(tmp_path / "cache") == contents(tmp_path / f"fresh-{bits}")


def test_looks_are_compared_as_numbers_say() -> None:
    """Beside the slow way: three hashes of 64 bits and three thumbnails, each within its limit."""
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 2, (60, 24 + 144), dtype=np.uint8)
    looks = [row.tobytes().hex() for row in raw]
    expected: dict[int, int] = {}
    for i in range(60):
        for j in (j for j in range(i) if j not in expected):
            bits = [np.unpackbits(raw[i, k : k + 8] ^ raw[j, k : k + 8]).sum() for k in (0, 8, 16)]
            if max(bits) <= 3 and np.abs(raw[i, 24:].astype(int) - raw[j, 24:]).max() <= COLOUR_LEVELS:
                expected[i] = j
                break
    assert repeats(looks, 3) == expected and 0 < len(expected) < 60
    assert repeats([look_of(draw_clip(1, 9, 32)[0])] * 3, 0) == {1: 0, 2: 0}


def test_stores_are_read_and_written_as_folders_are(tmp_path: Path, drawn_clips: Path) -> None:
    source, target = place("memory://bucket/drawn"), place("memory://bucket/cache")
    for path in drawn_clips.rglob("*"):
        if path.is_file():
            copy = source / path.relative_to(drawn_clips).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (source / "videos/0002.mp4").write_bytes(b"no video")
    command = ["data", "cache", str(source), "-o", str(target), "--size", "16", "--files-per-shard", "2"]
    assert main([*command, "--dedupe", "0"]) == main([*command, "--dedupe", "0"]) == 1
    clips = tmp_path / "drawn"
    shutil.copytree(drawn_clips, clips)
    (clips / "videos/0002.mp4").write_bytes(b"no video")
    build_cache(read_index(clips), tmp_path / "cache", CacheOptions(size=16, files_per_shard=2, dedupe=0))
    here = {name: text for name, text in contents(tmp_path / "cache").items() if not name.startswith(("shard-0", "q"))}
    there = {path.name: path.read_bytes() for path in target.iterdir()}
    for name in [*here, *(f"shard-0000{i}.safetensors" for i in range(3))]:
        assert there[name] == (tmp_path / "cache" / name).read_bytes(), name
    quarantine = json.loads(there["quarantine.jsonl"])
    assert quarantine["file"] == f"{source}/videos/0002.mp4" and quarantine["reason"].startswith(quarantine["file"])
    assert main(["data", "verify", str(target)]) == 0
    assert main(["data", "index", str(source)]) == 1
    with pytest.raises(ValueError, match="copy the cache to this machine first"):
        FrameCache.load(str(target))
    assert FrameCache.load(f"file://{tmp_path}/cache").videos


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cache", "CLIPS", "-o", "OUT", "--ray", "127.0.0.1:9"], "--ray 127.0.0.1:9: no cluster answers there"),
        (
            ["cache", "CLIPS", "-o", "OUT", "--ray", "nowhere"],
            "--ray: expected HOST:PORT, auto or local, got 'nowhere'",
        ),
        (["cache", "", "-o", "OUT"], "expected at least one folder of clips, got ''"),
        (["index", " "], "expected at least one folder of clips, got ' '"),
        (["check", "OUT", "--json", "CLIPS"], "expected the name of a file"),
        (["sheet", "CLIPS", "-o", "CLIPS/x.png"], "x.png: is a folder, a pipe or a device"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_any_work(
    tmp_path, monkeypatch, drawn_clips, capsys, arguments, said
):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setitem(sys.modules, "ray.data", SimpleNamespace())
    clips = tmp_path / "clips"
    (clips / "x.png").mkdir(parents=True)
    shutil.copy(next(drawn_clips.rglob("*.mp4")), clips)
    names = {"CLIPS": str(clips), "OUT": str(tmp_path / "out"), "CLIPS/x.png": str(clips / "x.png")}
    assert main(["data", *(names.get(word, word) for word in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_no_folder_or_device_is_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileExistsError, match=f"{name}: is a folder, a pipe or a device"):
            put_text(tmp_path / name, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


@pytest.mark.parametrize(
    ("module", "flags", "extra"),
    [
        ("ray", ["--ray", "local"], "cluster"),
        ("scenedetect", ["--scenes", "1"], "data"),
        ("imagehash", ["--dedupe", "4"], "data"),
    ],
)
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_clips: Path, capsys: pytest.CaptureFixture[str],
    module: str, flags: list[str], extra: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["data", "cache", str(drawn_clips), "-o", str(tmp_path / "cache"), *flags]) == 2
    assert f"pip install 'dicode[{extra}]'" in capsys.readouterr().err


def test_keys_and_values_of_lines_are_valid_text(tmp_path: Path) -> None:
    record = described({"caption": "x", "\ud800": {"a\udfff": "\ud800"}}, "line 1", tmp_path, tmp_path / "a.mp4")
    assert record.extra == {"?": {"a?": "?"}}
