"""An index of archives, and the clips that are decoded from it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_archives import FPS, SIZES, damaged, drawn_video, write_archives, write_tar

import dicode.data.archive_index
from dicode.cli.app import main
from dicode.data.archive_index import ArchivedVideos, build_archive_index, is_archive_index
from dicode.data.build import CacheOptions, build_cache
from dicode.data.cache import CacheError, FrameCache
from dicode.data.decoding import ArchivedClip, ClipSpan, DecodedClip, Decoder, archived_clip, decode, decoded_batches
from dicode.data.index import read_index
from dicode.files import place
from dicode.video.read import VideoReadError, check_frames, header_facts

OVER = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives of twelve whole videos of three shapes, and their index."""
    folder = tmp_path_factory.mktemp("stream")
    write_archives(folder, sizes=SIZES)
    return folder


def clip_of(
    shards: ArchivedVideos, number: int, first_s: float, frames: int, fps: float, size: tuple[int, int] = (32, 32)
) -> ArchivedClip:
    return archived_clip(shards, shards.columns, number, ClipSpan(first_s, frames, fps, 6, True), size)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_a_header_gives_what_decoding_all_of_a_file_would(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(drawn_video(4, 2.5, (40, 64), suffix))
    by_header, decoded = header_facts(path, 32), check_frames(path, 32)
    assert by_header._replace(duration_s=0.0) == decoded._replace(duration_s=0.0)
    assert by_header.duration_s == pytest.approx(decoded.duration_s, abs=2e-3)
    assert (by_header.height, by_header.width) == (40, 64) and by_header.num_frames in (60, 61)


def test_an_index_lists_the_videos_of_archives_with_their_texts_shapes_and_split(root: Path) -> None:
    shards = ArchivedVideos.load(root / "index")
    assert is_archive_index(root / "index") and not is_archive_index(root / "tars")
    assert shards.archives == tuple(str((root / f"tars/{n}.tar").resolve()) for n in range(2))
    videos = list(shards.columns)
    assert [video.file for video in videos] == [f"{n * 2 // 12}.tar/{n:03}.mp4" for n in range(12)]
    assert [video.caption.endswith(f"number {n}") for n, video in enumerate(videos)] == [True] * 12
    assert [video.count for video in videos] == [round((2.5 + n % 4) * FPS) for n in range(12)]
    assert [video.period_s for video in videos] == pytest.approx([2.5 + n % 4 for n in range(12)], abs=1e-3)
    shapes = [(int(h), int(w)) for h, w in zip(*(shards.columns.column(s) for s in ("height", "width")), strict=True)]
    assert shapes == [SIZES[n % 3] for n in range(12)]
    assert [len(shards.subset(validation).columns) for validation in (True, False)] == [2, 10]


def test_an_index_is_the_same_for_any_number_of_workers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicode.data.archive_index, "AT_ONCE", 5)
    build_archive_index(read_index(root / "tars"), root / "again", workers=2)
    for name in ("index.json", "videos.safetensors"):
        assert (root / "again" / name).read_bytes() == (root / "index" / name).read_bytes()


def test_an_index_and_its_archives_may_be_copied_together(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy")
    moved = ArchivedVideos.load(tmp_path / "copy/index")
    assert moved.archives == tuple(str((tmp_path / f"copy/tars/{n}.tar").resolve()) for n in range(2))
    build_archive_index(read_index(root / "tars"), tmp_path / "far/index")
    assert ArchivedVideos.load(tmp_path / "far/index").archives[0] == str((root / "tars/0.tar").resolve())


def test_a_clip_has_the_frames_that_a_cache_gives(root: Path, tmp_path: Path) -> None:
    """Also before the beginning, and at the very end, where the last frame is held."""
    build_cache(read_index(root / "tars"), tmp_path / "cache", CacheOptions(size=32, max_fps=1000.0))
    cache, shards = FrameCache.load(tmp_path / "cache"), ArchivedVideos.load(root / "index")
    rng, seen = np.random.default_rng(0), 0
    for number, video in enumerate(cache.videos):
        for fps in (8.0, 9.6, 24.0):
            latest_s = video.period_s - 16 / fps
            for first_s in (-2 / fps, 0.0, rng.uniform(0, latest_s) if latest_s > 0 else 0.0, latest_s):
                if latest_s < 0:
                    continue
                rows = cache.clip_rows(video, first_s, 17, fps)
                frames = decode(clip_of(shards, number, first_s, 17, fps))
                # a frame that begins up to a millisecond later is taken: `read_video` allows for rounded times
                other = cache.clip_rows(video, first_s + 1e-3, 17, fps)
                own = [torch.from_numpy(frame) for frame in frames]
                for i, (frame, row, later) in enumerate(zip(own, rows, other, strict=True)):
                    assert any(torch.equal(frame, cache.frames[int(r)]) for r in (row, later)), (number, fps, i)
                seen += len(frames)
    assert seen > 1500


def test_a_span_of_a_file_is_a_video_of_its_own(root: Path, tmp_path: Path) -> None:
    whole = ArchivedVideos.load(root / "index")
    part = write_archives(tmp_path, sizes=SIZES, start_s=0.25, end_s=2.25)
    assert all(video.period_s == pytest.approx(2.0) and video.count == 48 for video in part.columns)
    later = decode(clip_of(whole, 3, 0.75, 9, 8.0))
    assert np.array_equal(decode(clip_of(part, 3, 0.5, 9, 8.0)), later)
    held = decode(clip_of(part, 3, 0.0, 17, 8.0))
    assert np.array_equal(held[:16], decode(clip_of(whole, 3, 0.25, 16, 8.0)))
    # the last moment is the span's end: its last frame is held, and what follows in the file is not shown
    assert np.array_equal(held[16:], decode(clip_of(whole, 3, 2.25 - 0.5 / FPS, 1, 8.0)))
    assert not np.array_equal(held[16:], decode(clip_of(whole, 3, 2.5, 1, 8.0)))


def test_mirrored_frames_are_the_same_from_right_to_left(root: Path) -> None:
    shards = ArchivedVideos.load(root / "index")
    clip = clip_of(shards, 1, 0.5, 5, 8.0, (24, 40))
    frames = decode(clip)
    assert frames.shape == (5, 24, 40, 3)
    assert np.array_equal(decode(clip._replace(mirrored=True)), frames[:, :, ::-1])


@OVER
def test_batches_are_the_same_for_any_number_of_workers_and_leave_global_randomness_alone(root: Path) -> None:
    shards = ArchivedVideos.load(root / "index")
    asked = [[[clip_of(shards, (3 * b + i) % 12, 0.1 * i, 9, 8.0)] for i in range(3)] for b in range(6)]
    before = torch.get_rng_state()
    alone = list(decoded_batches(asked))
    assert torch.equal(torch.get_rng_state(), before)
    for workers in (1, 2):
        for one, other in zip(alone, decoded_batches(asked, workers), strict=True):
            assert one.keys() == other.keys() == {"frames", "has_context", "frame_stride", "replaced"}
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_clip_stands_in_for_a_damaged_one_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_archives(tmp_path, spoilt=(1, 2))
    clips = [clip_of(shards, number, 1.0, 9, 8.0) for number in (1, 2, 3)]
    found = Decoder()[clips]
    assert isinstance(found, DecodedClip)
    assert found.clip == clips[2] and len(found.faults) == 2
    assert np.array_equal(found.frames, decode(clips[2]))
    batches = list(decoded_batches([[clips, clips[2:]], [clips[1:], clips[2:]]]))
    assert [batch["replaced"].item() for batch in batches] == [1.0, 1.0]
    said = capsys.readouterr().out
    for number in (1, 2):  # once, although the second is met twice
        assert said.count(f"damaged, another clip stands in: {tmp_path}/tars/0.tar/{number:03}.mp4: ") == 1
    for workers in (0, 1):
        with pytest.raises(VideoReadError, match=r"^none of 2 clips that may stand in for each other: .*001\.mp4: "):
            list(decoded_batches([[clips[:2]]], workers))
    # what lies before the damage is good
    assert decode(clip_of(shards, 1, 0.0, 2, 8.0)).shape == (2, 32, 32, 3)


def test_what_cannot_be_opened_is_quarantined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = drawn_video(0, 2.5)
    notes = {"long.json": b'{"caption": "a", "end_s": 9.0}'}
    members = {"good.mp4": good, "cut.mp4": good[:-50], "none.mp4": b"no video", "long.mp4": good, **notes}
    write_tar(tmp_path / "tars/a.tar", {**members, "later.mp4": damaged(good)})
    assert main(["data", "stream", str(tmp_path / "tars"), "-o", str(tmp_path / "index")]) == 3
    out, err = capsys.readouterr()
    assert "2 clips (1 for validation) in 1 archives; 3 bad files" in out and "48×48 (2)" in out
    for name, reason in (("cut", "breaks off"), ("none", "expected a video"), ("long", "its line has end_s 9")):
        assert any(f"a.tar/{name}.mp4" in line and reason in line for line in err.splitlines()), name
    kept = [json.loads(line)["file"] for line in (tmp_path / "index/quarantine.jsonl").read_text().splitlines()]
    assert [Path(file).stem for file in kept] == ["cut", "none", "long"]
    write_tar(tmp_path / "tars/a.tar", {"none.mp4": b"no video"})
    with pytest.raises(VideoReadError, match="none of 1 videos can be opened"):
        build_archive_index(read_index(tmp_path / "tars"), tmp_path / "index")
    assert not (tmp_path / "index/index.json").exists()


def test_wrong_folders_and_changed_archives_are_refused(root: Path, tmp_path: Path, drawn_clips: Path) -> None:
    with pytest.raises(ValueError, match=r"expected videos in \.tar archives, got a file of its own; pack them"):
        build_archive_index(read_index(drawn_clips), tmp_path / "index")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files that no cache has \(notes\.txt\)"):
        build_archive_index(read_index(root / "tars"), tmp_path / "mine")
    with pytest.raises(CacheError, match="is an index of archives, whose videos only a TokenizerRun decodes"):
        FrameCache.load(root / "index")
    with pytest.raises(FileNotFoundError, match=r"or an index of its archives with `dicode data stream`"):
        FrameCache.load(root / "tars")
    own = shutil.copytree(root / "tars", tmp_path / "tars")
    build_archive_index(read_index(own), tmp_path / "index")
    shards = ArchivedVideos.load(tmp_path / "index")
    whole = (own / "1.tar").read_bytes()
    (own / "1.tar").write_bytes(whole[:-20_000])
    with pytest.raises(
        CacheError, match=r"1\.tar: expected an archive of .* bytes, got .* bytes; make the index again"
    ):
        ArchivedVideos.load(tmp_path / "index")
    with pytest.raises(OSError, match=r"1\.tar/011\.mp4: its archive ends before it"):
        decode(clip_of(shards, 11, 0.0, 9, 8.0))
    (own / "1.tar").unlink()
    with pytest.raises(CacheError, match=r"1\.tar: expected an archive of .* bytes, got nothing"):
        ArchivedVideos.load(tmp_path / "index")
    with pytest.raises(FileNotFoundError):  # no other clip stands in
        list(decoded_batches([[[clip_of(shards, 11, 0.0, 9, 8.0), clip_of(shards, 0, 0.0, 9, 8.0)]]]))
    (own / "1.tar").write_bytes(whole)
    held = (tmp_path / "index/videos.safetensors").read_bytes()
    (tmp_path / "index/videos.safetensors").write_bytes(held[:-8])
    with pytest.raises(CacheError, match=r"videos\.safetensors: expected \d+ bytes"):
        ArchivedVideos.load(tmp_path / "index")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("archive", 7, "expected archives from 0 to 1"),
        ("offset", 10**9, "video 4 does not lie within its archive"),
        ("height", 0, "video 4 does not lie within its archive, or has no picture"),
        ("count", 0, "video 4: expected first and count"),
    ],
)
def test_an_index_of_other_numbers_is_refused(root: Path, tmp_path: Path, name: str, value: int, said: str) -> None:
    shutil.copytree(root / "index", tmp_path / "index")
    made = ArchivedVideos.load(root / "index")
    columns = {key: values.copy() for key, values in made.columns.columns.items()}
    columns[name][4] = value
    changed = ArchivedVideos(made.archives, type(made.columns)(columns, made.columns.sources))
    dicode.data.archive_index._write(changed, tmp_path / "index")
    with pytest.raises(CacheError, match=said):
        ArchivedVideos.load(tmp_path / "index")


def test_archives_of_an_object_store_are_read_in_places(root: Path, tmp_path: Path) -> None:
    store = place("memory://clips")
    for path in sorted((root / "tars").iterdir()):
        (store / path.name).parent.mkdir(parents=True, exist_ok=True)
        (store / path.name).write_bytes(path.read_bytes())
    build_archive_index(read_index("memory://clips"), tmp_path / "index")
    remote, local = ArchivedVideos.load(tmp_path / "index"), ArchivedVideos.load(root / "index")
    assert all(archive.startswith("memory://") for archive in remote.archives)
    for number in (0, 7):
        frames = [decode(clip_of(shards, number, 0.5, 9, 8.0)) for shards in (remote, local)]
        assert np.array_equal(*frames)
