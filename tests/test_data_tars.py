"""WebDataset archives: theirs are read, ours are read by them."""

import gc
import io
import json
import shutil
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from drawn_archives import write_tar

from dicode.cli.app import main
from dicode.data.archives import write_tars
from dicode.data.build import CacheOptions, build_cache
from dicode.data.cache import CachedVideo, FrameCache
from dicode.data.index import read_index
from dicode.files import place
from dicode.video.read import read_video

webdataset = pytest.importorskip("webdataset")


@pytest.fixture
def archives(tmp_path: Path, drawn_clips: Path) -> Path:
    """Two archives as `webdataset` writes them: six clips, half with .txt and half with .json."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"{number}.tar")) as writer:
            for record in read_index(drawn_clips)[number::2]:
                video = {record.path.suffix[1:]: record.path.read_bytes(), "png": b"a picture beside it"}
                note = {"txt": record.caption} if number else {"json": {"caption": record.caption, "validation": True}}
                writer.write({"__key__": f"part/{int(record.path.stem):03}.v1", **video, **note})
    return folder


def test_archives_of_webdataset_are_data_sets(tmp_path: Path, drawn_clips: Path, archives: Path) -> None:
    records = read_index(archives)
    assert [record.file for record in records[:2]] == ["0.tar/part/000.v1.mp4", "0.tar/part/002.v1.mp4"]
    original = read_index(drawn_clips)
    assert [r.caption for r in records] == [original[i].caption for i in (0, 2, 4, 1, 3, 5)]
    assert [record.validation for record in records] == [True] * 3 + [None] * 3
    options = CacheOptions(size=16, files_per_shard=4)
    build_cache(records, tmp_path / "of_tars", options)
    build_cache([original[i] for i in (0, 2, 4, 1, 3, 5)], tmp_path / "of_files", options)
    caches = [FrameCache.load(tmp_path / name) for name in ("of_tars", "of_files")]
    assert torch.equal(caches[0].frames[:], caches[1].frames[:])
    assert [record.caption for record in read_index(archives / "1.tar")] == [original[i].caption for i in (1, 3, 5)]


def test_what_is_no_clip_in_a_folder_is_none_in_an_archive(tmp_path: Path, drawn_clips: Path) -> None:
    video = next(drawn_clips.rglob("*.mp4")).read_bytes()
    others = (".thumbs/clip.png", "thumbs/clip.png", "./sheet.jpg", "__MACOSX/other.png", "./._clip.mp4")
    path = write_tar(tmp_path / "a.tar", {"./clip.mp4": video, "./clip.txt": b"a", **dict.fromkeys(others, b"?")})
    assert [(r.path.name, r.caption) for r in read_index(path)] == [("clip.mp4", "a")]
    stills = write_tar(tmp_path / "b.tar", {"1.png": b"?", "1.txt": b"one", "2.jpg": b"?"})
    assert [(r.path.name, r.caption) for r in read_index(stills)] == [("1.png", "one"), ("2.jpg", "")]


def test_an_archive_that_ends_between_two_of_its_files_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.mp4": bytes(100) for i in range(3)})
    with tarfile.open(path) as tar:
        end = tar.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:end])
    *clips, damaged = read_index(path)
    assert [clip.path.name for clip in clips] == ["0.mp4", "1.mp4"]
    assert "its end is missing" in damaged.fault


def test_a_damaged_archive_is_quarantined_and_what_came_before_it_is_read(tmp_path: Path, archives: Path) -> None:
    whole = (archives / "0.tar").read_bytes()
    with tarfile.open(archives / "0.tar") as tar:
        second = tar.getmembers()[3]
    (archives / "0.tar").write_bytes(whole[: second.offset_data])
    (archives / "2.tar").write_bytes(b"no tar" * 999)
    with tarfile.open(archives / "1.tar", "a") as tar:
        for name, content in (("last.mp4", b"no video"), ("other.mp4", b""), ("other.json", b"[1]")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (made,) = build_cache(read_index(archives), tmp_path / "cache", CacheOptions(size=16))
    assert [entry.video.file.split("/")[0] for entry in made.entries] == ["0.tar"] + ["1.tar"] * 3
    reasons = [bad.reason for bad in made.bad]
    assert any(r.startswith(f"{archives}/1.tar/last.mp4: expected a video") for r in reasons)
    assert any(r.startswith(f"{archives}/1.tar/other.mp4: the text beside it cannot be read") for r in reasons)
    assert sum("not a whole, uncompressed tar" in r for r in reasons) == 2


def test_webdataset_reads_what_is_exported_and_so_do_we(tmp_path: Path, drawn_clips: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    build_cache(read_index(drawn_clips), cache, CacheOptions(size=32, files_per_shard=4))
    assert main(["data", "export", str(cache), "-o", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["shard-00000.tar", "shard-00001.tar"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        theirs = list(webdataset.WebDataset(sorted(str(p) for p in out.iterdir()), shardshuffle=False).decode())
        gc.collect()
    held = FrameCache.load(cache)
    assert [sample["__key__"] for sample in theirs][3:5] == ["00000-00003", "00001-00000"]
    for sample, video in zip(theirs, held.videos, strict=True):
        assert (sample["txt"], sample["json"]["validation"]) == (video.captions[0], video.validation)
        (tmp_path / "clip.mp4").write_bytes(sample["mp4"])
        again = torch.from_numpy(read_video(tmp_path / "clip.mp4", fps=None).frames)
        real = held.frames[video.first : video.first + video.count]
        assert again.shape == real.shape and (again.float() - real.float()).abs().mean() < 3
    build_cache(read_index(out), tmp_path / "again", CacheOptions(size=32, files_per_shard=4))
    back = FrameCache.load(tmp_path / "again")
    assert [(v.captions, v.validation, v.count) for v in back.videos] == [
        (v.captions, v.validation, v.count) for v in held.videos
    ]
    second = write_tars(held, place("memory://exported"))
    assert [path.read_bytes() for path in second] == [path.read_bytes() for path in sorted(out.iterdir())]


def test_an_export_is_whole_and_takes_the_place_of_another_only(
    tmp_path: Path, drawn_clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_cache(read_index(drawn_clips)[:1], tmp_path / "cache", CacheOptions(size=16))
    cache = FrameCache.load(tmp_path / "cache")
    (tmp_path / "shard-00000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"is no archive of this command's"):
        write_tars(cache, tmp_path)
    assert (tmp_path / "shard-00000.tar").read_bytes() == b"mine"
    out = tmp_path / "out"
    first = write_tars(cache, out)[0].read_bytes()
    shutil.copy(out / "shard-00000.tar", out / "shard-00009.tar")  # of a larger cache
    assert write_tars(cache, out)[0].read_bytes() == first
    assert [path.name for path in out.iterdir()] == ["shard-00000.tar"]
    monkeypatch.setattr("dicode.data.archives.VideoWriter", None)
    with pytest.raises(TypeError):
        write_tars(cache, out)
    assert (out / "shard-00000.tar").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "shard-00000.tar"]
    (out / "thesis.tex").write_text("x")
    assert main(["data", "export", str(tmp_path / "cache"), "-o", str(out)]) == 2
    assert len(list(out.iterdir())) == 2


def test_frames_at_uneven_times_are_exported_at_a_rate_that_keeps_them(tmp_path: Path) -> None:
    frames = torch.stack([torch.full((16, 16, 3), value, dtype=torch.uint8) for value in (0, 120, 240)])
    video = CachedVideo("x", "a.gif", (), False, False, 0, 3, 1.0)
    FrameCache((video,), frames, torch.tensor([0.0, 0.2, 0.8], dtype=torch.float64)).save(tmp_path / "cache")
    (archive,) = write_tars(FrameCache.load(tmp_path / "cache"), tmp_path / "out")
    with tarfile.open(archive) as tar:
        movie, facts = (tar.extractfile(f"00000-00000.{ending}").read() for ending in ("mp4", "json"))  # type: ignore[union-attr]
    (tmp_path / "clip.mp4").write_bytes(movie)
    shown = read_video(tmp_path / "clip.mp4", fps=None)
    assert shown.fps == pytest.approx(5) and json.loads(facts)["caption"] == ""
    assert [round(level / 120) for level in shown.frames.mean((1, 2, 3))] == [0, 1, 1, 1, 2]
