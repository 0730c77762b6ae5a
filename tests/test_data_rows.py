"""A cache in several shards: read as one, computed shard by shard, checked before it is trusted."""

import json
from pathlib import Path

import pytest
import torch
from test_training import write_cache

from dicode.cli import main
from dicode.data.build import CacheOptions, build_cache
from dicode.data.index import read_index
from dicode.video.shards import CacheError, FrameCache, Rows


@pytest.fixture
def cache(tmp_path: Path, drawn_clips: Path) -> Path:
    build_cache(read_index(drawn_clips), tmp_path / "cache", CacheOptions(size=16, files_per_shard=2))
    return tmp_path / "cache"


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
    rows = Rows(whole.split([3, 1, 5]))
    assert rows.shape == whole.shape and len(rows) == 9
    assert torch.equal(rows[at], whole[at])


@pytest.mark.parametrize("at", [9, -1, [0, 9]])
def test_a_row_that_is_not_there_is_an_error(at: object) -> None:
    with pytest.raises(IndexError, match="expected rows from 0 to 8"):
        Rows(torch.zeros(9, 2).split(4))[at]


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
    assert first <= cache.frames.parts[0].data_ptr() < last


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
    [("[]", "expected format 1, got 'list'"), ('{"format": 1}', "not an index"), ("{", "not an index")],
)
def test_an_index_of_another_kind_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CacheError, match=said):
        FrameCache.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="make it with `dicode data cache`"):
        FrameCache.load(tmp_path / "nowhere")


def test_the_index_tells_what_every_shard_is(cache: Path) -> None:
    index = json.loads((cache / "index.json").read_text())
    assert [shard["bytes"] for shard in index["shards"]] == [
        (cache / f"shard-0000{i}.safetensors").stat().st_size for i in range(3)
    ]
    assert [video["first"] for video in index["videos"]] == [0, 20, 40, 60, 80, 100]
