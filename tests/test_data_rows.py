"""A cache in several shards: read as one, computed shard by shard, checked before it is trusted."""

import dataclasses
import json
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from toy_runs import write_cache

from dicode.cli.app import main
from dicode.data import cache as shards
from dicode.data.build import CacheOptions, build_cache
from dicode.data.cache import CacheError, FrameCache, Rows, read_cache_index
from dicode.data.columns import CAPTIONED, VALIDATION, CachedVideo, FrameRows, Videos
from dicode.data.index import read_index


@pytest.fixture
def cache(tmp_path: Path, drawn_clips: Path) -> Path:
    build_cache(read_index(drawn_clips), tmp_path / "cache", CacheOptions(size=16, files_per_shard=2))
    return tmp_path / "cache"


def rows_of(whole: torch.Tensor, sizes: list[int]) -> Rows:
    parts = whole.split(sizes)
    return Rows(lambda number: {"values": parts[number]}, "values", sizes)


@pytest.mark.parametrize(
    "at",
    [
        3,
        [0, 4, 8],
        torch.tensor([[8, 0], [3, 3]]),
        slice(1, 3),
        slice(2, 9, 3),
        slice(None),
        (torch.tensor([[4], [8]]), 1),
        (torch.tensor([[4, 1], [8, 0]]), torch.tensor([[1], [0]])),
        torch.arange(9)[::3],  # whose numbers do not lie beside each other in memory
        torch.tensor([], dtype=torch.long),
    ],
)
def test_rows_of_several_tensors_are_those_of_one(at: object) -> None:
    whole = torch.arange(9 * 2 * 5).reshape(9, 2, 5)
    rows = rows_of(whole, [3, 1, 5])
    assert rows.shape == whole.shape and len(rows) == 9
    assert torch.equal(rows[at], whole[at])


@pytest.mark.parametrize("at", [9, -1, [0, 9]])
def test_a_row_that_is_not_there_is_an_error(at: object) -> None:
    with pytest.raises(IndexError, match="expected rows from 0 to 8"):
        rows_of(torch.zeros(9, 2), [4, 4, 1])[at]


def test_a_cache_in_shards_is_the_one_in_memory(tmp_path: Path, cache: Path, drawn_clips: Path) -> None:
    sharded = FrameCache.load(cache)
    assert len(sharded.files) == 3
    FrameCache(sharded.videos, sharded.frames[:], sharded.times_s[:]).save(tmp_path / "one")
    one = FrameCache.load(tmp_path / "one")
    assert one.videos == sharded.videos and len(one.files) == 1
    video = sharded.videos[3]
    rows = sharded.clip_rows(video, 0.3, 7, 5.0)
    assert torch.equal(rows, one.clip_rows(video, 0.3, 7, 5.0))
    assert torch.equal(sharded.frames[rows], one.frames[rows])


def test_opening_a_cache_takes_no_memory_for_its_frames(tmp_path: Path) -> None:
    write_cache(tmp_path, count=20)
    cache = FrameCache.load(tmp_path)
    assert isinstance(cache.frames, Rows)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no list of memory maps on this system")
    (line,) = (line for line in maps.read_text().splitlines() if str(cache.files[0]) in line)
    first, last = (int(address, 16) for address in line.split()[0].split("-"))
    assert first <= cache.frames.part(0).data_ptr() < last


def test_what_is_computed_of_frames_is_kept_by_shards_and_an_interrupt_loses_one(cache: Path) -> None:
    frames = FrameCache.load(cache)
    seen: list[int] = []

    def mean(part: torch.Tensor) -> torch.Tensor:
        if len(seen) == 2:
            seen.append(0)
            raise KeyboardInterrupt
        seen.append(len(part))
        return part.float().mean((1, 2))

    with pytest.raises(KeyboardInterrupt):
        frames.computed("mean-1234", mean)
    kept = sorted(path.name for path in cache.glob("*mean*"))
    assert kept == ["shard-00000.mean-1234.safetensors", "shard-00001.mean-1234.safetensors"]
    values = frames.computed("mean-1234", mean)
    assert seen == [40, 40, 0, 40]  # two shards, the interrupt, the third
    assert torch.equal(values[:], frames.frames[:].float().mean((1, 2)))
    assert torch.equal(frames.computed("mean-1234", mean)[:], values[:]) and len(seen) == 4
    assert not list(cache.glob(".*"))


def test_a_damaged_shard_is_found_and_made_again(
    cache: Path, drawn_clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = cache / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["data", "verify", str(cache)]) == 1
    assert f"bad: {shard}: expected SHA-256" in capsys.readouterr().out
    shard.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=f"{shard}: expected {len(whole)} bytes, got {len(whole) - 1}"):
        FrameCache.load(cache)
    build_cache(read_index(drawn_clips), cache, CacheOptions(size=16, files_per_shard=2))
    assert shard.read_bytes() == whole
    assert main(["data", "verify", str(cache)]) == 0
    assert f"{cache}: 3 shards, 6 clips; 0 bad shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "expected format 2, got 'list'"),
        ('{"format": 1}', "expected format 2, got 1; make the cache again"),
        ('{"format": 2}', "not an index"),
        ("{", "not an index"),
    ],
)
def test_an_index_of_another_kind_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CacheError, match=said):
        FrameCache.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="make it with `dicode data cache`"):
        FrameCache.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (("shards", 1, "file"), 5, r"index\.json.shards\[1\]\.file: expected str, got 5"),
        (("shards", 1, "frames"), "x", r"shards\[1\]\.frames: expected int, got 'x'"),
        (("shards", 1, "frames"), -1, r"shards\[1\]\.frames: expected 1 or more, got -1"),
        (("shards", 1, "frames"), 10**9, r"videos\.safetensors: its videos have 120 frames, and .* 1,000,000,080;"),
        (("shards", 1, "bytes"), 2.5, r"shards\[1\]\.bytes: expected int"),
        (("shards", 1), None, r"shards\[1\]: expected a section of Shard"),
        (("shards",), [], "index.json.shards: expected 1 to .* values, got 0"),
        (("shards",), {"a": 1}, "index.json.shards: expected a list"),
        (("sources",), [], "index.json.sources: expected 1 to .* values, got 0"),
        (("sources",), [3], r"sources\[0\]: expected str"),
        (("videos", "videos"), 7, r"videos\.safetensors: expected columns of 7 videos, got .*first int64 \(6,\)"),
        (("videos", "file"), None, r"index\.json.videos\.file: expected str"),
        (("videos",), [], r"index\.json.videos: expected a section"),
    ],
)
def test_a_damaged_index_is_one_line_that_names_it(cache: Path, capsys, at: tuple, value: object, said: str) -> None:
    values = json.loads((cache / "index.json").read_text())
    inside = values
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = value
    (cache / "index.json").write_text(json.dumps(values))
    with pytest.raises(CacheError, match=said) as raised:
        FrameCache.load(cache)
    assert str(cache) in str(raised.value) and "\n" not in str(raised.value)
    for command in ("check", "verify"):
        assert main(["data", command, str(cache)]) == 2
        assert str(cache) in capsys.readouterr().err


def test_an_index_of_other_text_is_named(cache: Path) -> None:
    whole = (cache / "index.json").read_bytes()
    for data, said in (
        (b"[" * 100_000, "nested too deeply"),
        (whole.replace(b"drawn", b"dr\xffwn"), "line .*: not UTF-8"),
        (whole.replace(b'"format": 2', b'"format": 2, "format": 2'), "'format' is given twice"),
    ):
        (cache / "index.json").write_bytes(data)
        with pytest.raises(CacheError, match=rf"index\.json: not an index of a cache .*{said}"):
            FrameCache.load(cache)


def test_shards_that_hold_other_frames_than_the_index_says_are_found_where_they_are_read(cache: Path, capsys) -> None:
    values = json.loads((cache / "index.json").read_text())
    values["shards"][1]["frames"], values["shards"][2]["frames"] = 41, 39
    (cache / "index.json").write_text(json.dumps(values))
    frames = FrameCache.load(cache)
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors: expected 41 frames and their times, got frames "):
        frames.frames[50]
    assert main(["data", "verify", str(cache)]) == 2
    out = capsys.readouterr().out
    assert "shard-00001.safetensors: expected 41 frames" in out and "shard-00002.safetensors: expected 39 frames" in out


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("source", 9, "expected source from 0 to 0, got .*source 9"),
        ("source", -1, "expected source from 0 to 0"),
        ("period_s", 0.0, "expected period_s up to 629,145,600, got .*period_s 0"),
        ("period_s", -1.0, "expected period_s"),
        ("period_s", 1e300, "expected period_s"),
        ("period_s", float("nan"), "expected period_s"),
        ("start_s", -1.0, "expected start_s"),
        ("start_s", float("inf"), "expected start_s"),
        ("count", 10**6, "expected first and count within 120 frames"),
        ("count", 0, "expected first and count within 120 frames"),
        ("count", 2**31 - 1, "expected first and count within 120 frames"),
        ("first", -1, "expected first and count within 120 frames"),
        ("first", 2**63 - 1, "expected first and count within 120 frames"),
        ("flags", 9, "expected flags from 0 to 7"),
        ("text_end", 3, "expected text_end above the one before"),
        ("text_end", 10**6, "expected text_end above the one before"),
    ],
)
def test_numbers_of_videos_that_cannot_be_are_refused(cache: Path, name: str, value: float, said: str) -> None:
    path = cache / "videos.safetensors"
    size, tensors = path.stat().st_size, load_file(path)
    tensors[name][3] = value
    path.write_bytes(save({key: tensors[key] for key in tensors}))
    assert path.stat().st_size == size
    with pytest.raises(CacheError, match=rf"videos\.safetensors: video 3: {said}"):
        FrameCache.load(cache)


def test_a_text_of_a_video_that_is_damaged_is_named(cache: Path) -> None:
    path = cache / "videos.safetensors"
    for damage in (b"{", b"\xff"):
        tensors = load_file(path)
        tensors["text"][0] = damage[0]
        path.write_bytes(save(tensors))
        with pytest.raises(ValueError, match=r"cache/videos\.safetensors: the text of video 0 is damaged"):
            read_cache_index(cache)[1][:3][0]
    tensors["first"] = tensors["first"].double()
    path.write_bytes(save(tensors))
    with pytest.raises(CacheError, match=r"videos\.safetensors: expected columns of 6 videos, got .*first float64"):
        FrameCache.load(cache)
    path.write_bytes(bytes([9]) + path.read_bytes()[1:])
    with pytest.raises(CacheError, match=r"videos\.safetensors: not a readable safetensors file"):
        FrameCache.load(cache)


def test_the_index_tells_what_every_shard_is(cache: Path) -> None:
    index = json.loads((cache / "index.json").read_text())
    assert [shard["bytes"] for shard in index["shards"]] == [
        (cache / f"shard-0000{i}.safetensors").stat().st_size for i in range(3)
    ]
    assert [video.first for video in FrameCache.load(cache).videos] == [0, 20, 40, 60, 80, 100]
    assert index["videos"]["videos"] == 6 and index["videos"]["bytes"] == (cache / "videos.safetensors").stat().st_size


def drawn_videos(count: int) -> list[CachedVideo]:
    """Videos of all kinds, whose frames follow each other."""
    videos, first = [], 0
    for i in range(count):
        frames = 1 if i % 5 == 2 else 3 + i % 7
        captions = tuple(f"clip {i} é {j}" for j in range(i % 4))
        extra = {"object": "cup", "ids": [i, None, 1.5]} if i % 3 else {}
        times = (frames / 8, float(i % 2))
        videos.append(
            CachedVideo(f"s{i % 3}", f"{i}.mp4", captions, i % 4 == 0, i % 6 == 1, first, frames, *times, extra)
        )
        first += frames
    return videos


def test_videos_come_back_from_their_columns_and_one_is_made_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = drawn_videos(40)
    drawn[3] = dataclasses.replace(drawn[3], file="\udcff\udcfe.mp4")  # a name that is not UTF-8
    videos = Videos.of(drawn)
    assert list(videos) == drawn and videos == tuple(drawn) and videos[-1] == drawn[-1]
    assert list(videos[3:30:4]) == drawn[3:30:4] and list(videos[np.array([5, 2])]) == [drawn[5], drawn[2]]
    assert list(videos.having(VALIDATION)) == [v for v in drawn if v.validation]
    assert list(videos.having(VALIDATION, False).having(CAPTIONED)) == [
        v for v in drawn if not v.validation and v.captions
    ]
    assert list(videos.lasting(1.0)) == [v for v in drawn if v.lasts(1.0)]
    assert [len(videos.spread(n)) for n in (1, 7, 40, 99)] == [1, 7, 40, 40]
    made: list[int] = []
    monkeypatch.setattr(Videos, "_video", lambda self, number: made.append(number))
    videos.having(VALIDATION, False).lasting(0.5).spread(3)[1]
    assert len(made) == 1


def test_what_lasts_is_a_loop_or_long_enough_and_never_a_still_image() -> None:
    video = drawn_videos(1)[0]
    kinds = [(16, 2.0, False), (16, 1.95, False), (16, 1.9, False), (1, 5.0, False), (1, 5.0, True), (3, 0.3, True)]
    made = [dataclasses.replace(video, count=c, period_s=s, loops=loops) for c, s, loops in kinds]
    assert [v.lasts(2.0) for v in made] == [True, True, False, False, False, True]
    assert list(Videos.of(made).lasting(2.0)) == [v for v in made if v.lasts(2.0)]


def test_rows_of_frames_are_found_without_a_list_of_them() -> None:
    drawn = drawn_videos(40)
    chosen = [v for v in drawn if not v.validation]
    whole = torch.cat([torch.arange(v.first, v.first + v.count) for v in chosen])
    rows = FrameRows(Videos.of(drawn).having(VALIDATION, False))
    assert len(rows) == len(whole) and torch.equal(rows[:], whole) and torch.equal(rows[5:90:7], whole[5:90:7])
    at = torch.randint(len(whole), (3, 50), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows[at], whole[at])
    assert torch.equal(rows.spread(9), whole[torch.linspace(0, len(whole) - 1, 9).round().long()])
    with pytest.raises(IndexError, match=f"expected frames from 0 to {len(whole) - 1}"):
        rows[[len(whole)]]


def test_a_file_of_videos_that_is_another_is_refused(cache: Path) -> None:
    path = cache / "videos.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=f"expected {len(whole)} bytes, got {len(whole) - 1}; make the cache again"):
        FrameCache.load(cache)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CacheError, match="expected SHA-256"):
        read_cache_index(cache, hashes=True)


def test_shards_are_opened_when_they_are_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = shards.read_tensors
    monkeypatch.setattr(shards, "read_tensors", lambda path: opened.append(path.name) or real(path))
    frames = FrameCache.load(cache)
    frames.frames[frames.clip_rows(frames.videos[5], 0.0, 4, 8.0)]
    assert sorted(opened) == ["shard-00000.safetensors", "shard-00002.safetensors", "videos.safetensors"]


def test_processes_that_want_the_same_share_out_what_is_missing(cache: Path) -> None:
    note = cache.parent / "calls"

    def mean(part: torch.Tensor) -> torch.Tensor:
        with note.open("a") as file:
            file.write(f"{len(part)}\n")
        time.sleep(0.1)
        return part.float().mean((1, 2))

    def work(index: int) -> None:
        frames = FrameCache.load(cache)
        assert torch.equal(frames.computed("mean-1", mean)[:], frames.frames[:].float().mean((1, 2)))

    processes = [get_context("fork").Process(target=work, args=(i,)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert note.read_text().splitlines() == ["40"] * 3  # each of three shards by one of them
