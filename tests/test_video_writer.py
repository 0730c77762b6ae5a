"""Writing: files that play, are whole or absent, say how they came about, and come out the same twice."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from synthetic import draw_clip

from dicode import __version__
from dicode.video import write as writer_module
from dicode.video.read import read_metadata, read_video
from dicode.video.write import FORMATS, VideoWriter

NAMES = ["out.mp4", "out.webm", "out.gif", "frames/", "frames"]
STREAMED = ["out.mp4", "out.webm", "frames/"]
METADATA = {
    "prompt": 'ein Wirbel "aus" Eis ❄ ' + "sehr lang " * 60,
    "seed": 7,
    "guidance": 1.5,
    "more": {"a": [1, None]},
    "dicode": "0.0",  # else the writer adds the version to the .json
}


def write(path: str | Path, clips: Iterable[np.ndarray], **settings) -> Path:
    with VideoWriter(path, **settings) as writer:
        for clip in clips:
            writer.write(clip)
    return writer.path


def contents(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def decoded(path: Path) -> tuple[np.ndarray, list[float]]:
    """What a player sees, through PyAV alone: frames, and when each is shown in seconds."""
    if path.is_dir():
        frames = [np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))]
        return np.stack(frames), [index / 8 for index in range(len(frames))]
    with av.open(str(path)) as container:
        shown = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)]
    return np.stack([frame for frame, _ in shown]), [time for _, time in shown]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Ctrl-C while frame `index` is written."""
    for sink in ("MovieSink", "FolderSink"):
        write_frame = getattr(writer_module, sink).write

        def interrupted(self, frame, at, write_frame=write_frame) -> None:
            if at == index:
                raise KeyboardInterrupt
            write_frame(self, frame, at)

        monkeypatch.setattr(writer_module, sink, type(sink, (getattr(writer_module, sink),), {"write": interrupted}))


def decoded_gif(path: Path) -> tuple[np.ndarray, list[int]]:
    """A GIF through Pillow: frames and delays in milliseconds."""
    frames, delays_ms = [], []
    with Image.open(path) as image:
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            delays_ms.append(image.info["duration"])
    return np.stack(frames), delays_ms


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_back(tmp_path, name):
    frames, _ = draw_clip(seed=3, num_frames=20, size=36)
    video = read_video(write(f"{tmp_path}/{name}", [frames[:7], frames[7:]], fps=12.5), fps=12.5)
    assert video.frames.shape == frames.shape
    assert read_video(tmp_path / name, fps=None).fps == pytest.approx(12.5)
    error = np.abs(video.frames.astype(int) - frames)
    if name.startswith(("out.gif", "frames")):
        assert error.max() == 0
    else:
        assert error.mean() < 4  # colour at half resolution blurs the edges
        assert error[:, :4].mean() < 0.5  # the white ground stays white


def test_mp4_plays_in_browsers(tmp_path):
    path = write(tmp_path / "a.mp4", [draw_clip(0, 16, 32)[0]])
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index comes first, so that playing starts while loading
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        assert (stream.colorspace, stream.color_primaries, stream.color_trc, stream.color_range) == (1, 1, 1, 1)
        assert container.duration == 2_000_000


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_colours_neither_drift_nor_shift_when_copied_again_and_again(tmp_path, monkeypatch, name):
    fine = replace(FORMATS[f".{name[2:]}"], codec_options={**FORMATS[f".{name[2:]}"].codec_options, "crf": "4"})
    monkeypatch.setitem(FORMATS, f".{name[2:]}", fine)
    frames = np.empty((2, 32, 96, 3), dtype=np.uint8)
    frames[:] = np.repeat(np.array([[30, 200, 90], [250, 10, 10], [128, 128, 128]], dtype=np.uint8), 32, axis=0)
    copies = [frames.astype(int)]
    for _ in range(6):
        copies.append(read_video(write(tmp_path / name, [copies[-1].astype(np.uint8)])).frames.astype(int))
    far = [column for column in range(96) if min(abs(column - 31.5), abs(column - 63.5)) > 11]
    assert np.abs(copies[-1] - frames)[:, :, far].max() <= 3
    blurred = np.abs(copies[1] - frames).max(axis=(0, 1, 3))  # colour at half resolution: one pixel to either side
    assert np.flatnonzero(blurred > 6).tolist() == [31, 32, 63, 64]


@pytest.mark.parametrize(("name", "shape"), [("a.mp4", (48, 64)), ("a.webm", (47, 63)), ("a.gif", (47, 63))])
def test_odd_sizes_are_kept_where_the_format_can_and_else_repeat_their_edge(tmp_path, name, shape):
    frames = np.full((3, 47, 63, 3), 90, dtype=np.uint8)
    frames[:, -1:] = frames[:, :, -1:] = 200
    read = read_video(write(tmp_path / name, [frames])).frames
    assert read.shape[1:3] == shape
    assert np.abs(read[:, 46:, :].astype(int) - 200).max() < 12
    assert np.abs(read[:, :44, :60].astype(int) - 90).max() < 12


def test_scale_enlarges_pixels_to_squares(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    read = read_video(write(f"{tmp_path}/frames/", [frames], scale=3)).frames
    np.testing.assert_array_equal(read, np.kron(frames, np.ones((1, 3, 3, 1), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("fps", "delays"), [(8.0, [12, 13] * 8), (10.0, [10] * 16), (30.0, [3, 3, 4] * 5 + [3]), (7.0, None)]
)
def test_gif_frames_appear_when_they_should(tmp_path, fps, delays):
    delays_ms = decoded_gif(write(tmp_path / "a.gif", [draw_clip(0, 16, 16)[0]], fps=fps))[1]
    starts_ms = np.cumsum([0, *delays_ms])
    exact_ms = 1000 * np.arange(17) / fps
    assert ((starts_ms <= exact_ms + 1e-6) & (starts_ms > exact_ms - 10)).all()
    assert delays is None or delays_ms == [10 * delay for delay in delays]


def test_gif_colours_are_exact_up_to_256_and_close_beyond(tmp_path):
    rng = np.random.default_rng(0)
    few = rng.integers(0, 256, (4, 256, 3), dtype=np.uint8)  # other colours in every frame
    few = np.stack([palette[rng.permutation(1024) % 256].reshape(32, 32, 3) for palette in few])
    np.testing.assert_array_equal(decoded_gif(write(tmp_path / "few.gif", [few]))[0], few)
    ramp = np.stack(np.meshgrid(np.arange(64) * 4, np.arange(64) * 4, [100], indexing="ij"), -1).astype(np.uint8)
    ramp = ramp.reshape(1, 64, 64, 3).repeat(2, axis=0)
    error = np.abs(decoded_gif(write(tmp_path / "many.gif", [ramp]))[0].astype(int) - ramp)
    assert error.mean() < 6


@pytest.mark.parametrize("name", NAMES)
def test_the_same_frames_give_the_same_bytes_in_one_piece_or_many(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    frames = np.concatenate([noise, draw_clip(1, 12, 64)[0][:, :48]])
    for run, pieces in {"one": [frames], "two": [frames[:1], frames[1:13], frames[13:]]}.items():
        (tmp_path / run).mkdir()
        write(f"{tmp_path}/{run}/{name}", pieces, metadata=METADATA)
    stem = name.strip("/")
    assert contents(tmp_path / "one" / stem) == contents(tmp_path / "two" / stem)


@pytest.mark.parametrize("name", NAMES)
def test_metadata_is_in_the_file_and_beside_it(tmp_path, name):
    path = write(f"{tmp_path}/{name}", [draw_clip(0, 3, 16)[0]], metadata=METADATA)
    if name.startswith("frames"):
        assert read_metadata(path) == {"fps": 8.0, **METADATA}
        return
    beside = path.with_suffix(".json")
    assert json.loads(beside.read_text(encoding="utf-8")) == METADATA
    beside.unlink()
    assert read_metadata(path) == METADATA
    assert len(read_video(path).frames) == 3
    bare = write(tmp_path / f"bare{path.suffix}", [draw_clip(0, 3, 16)[0]])
    assert read_metadata(bare) == {}
    bare.with_suffix(".json").write_text('{"seed": 3}')
    assert read_metadata(bare) == {"seed": 3}


def test_players_see_the_prompt_as_title(tmp_path):
    path = write(tmp_path / "a.mp4", [draw_clip(0, 3, 16)[0]], metadata={"prompt": "an ice vortex"})
    with av.open(str(path)) as container:
        assert container.metadata["title"] == "an ice vortex"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there_before(tmp_path, name, failure):
    clip = draw_clip(0, 30, 32)[0]
    path = write(f"{tmp_path}/{name}", [clip], metadata={"seed": 1})
    before = {file.name: contents(file) for file in tmp_path.iterdir()}

    def clips() -> Iterator[np.ndarray]:
        yield from [255 - clip] * 4
        raise failure

    with pytest.raises(failure):
        write(f"{tmp_path}/{name}", clips(), metadata={"seed": 2})
    assert {file.name: contents(file) for file in tmp_path.iterdir()} == before
    assert write(f"{tmp_path}/{name}", [clip[:9]], metadata={"seed": 2}) == path  # and can be replaced after
    assert len(read_video(path).frames) == 9
    assert read_metadata(path)["seed"] == 2
    assert {file.name for file in tmp_path.iterdir()} == set(before)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_so_far_can_be_kept(tmp_path, name):
    clip = draw_clip(0, 8, 32)[0]
    with VideoWriter(f"{tmp_path}/{name}") as writer, contextlib.suppress(KeyboardInterrupt):
        try:
            writer.write(clip)
            assert not writer.path.exists()
            raise KeyboardInterrupt
        finally:
            writer.close()
    assert len(read_video(writer.path).frames) == writer.num_frames == 8
    with pytest.raises(ValueError, match="already closed"):
        writer.write(clip)


@pytest.mark.parametrize("name", NAMES)
def test_no_frames_make_an_error_and_no_file(tmp_path, name):
    with pytest.raises(ValueError, match="no frames were written"), VideoWriter(f"{tmp_path}/{name}"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_leaves_no_part(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a.mp4", [draw_clip(0, 3, 16)[0]])
    assert list(tmp_path.iterdir()) == []


def test_impossible_requests_are_refused_before_anything_is_generated(tmp_path):
    refused = [
        (ValueError, "ending in .mp4, .webm, .gif.*got '.avi'", {"path": "a.avi"}),
        (ValueError, "expected a name of at most 239 bytes", {"path": "a" * 240 + ".mp4"}),
        (ValueError, "positive rate from .*, got 0", {"path": "a.mp4", "fps": 0.0}),
        (ValueError, "at most 50 frames", {"path": "a.gif", "fps": 60.0}),
        (ValueError, "until it is whole; write .mp4, .webm or a folder", {"path": "a.gif", "stream": True}),
        (ValueError, "from 1 to 64, got 0", {"path": "a.mp4", "scale": 0}),
        (ValueError, "from 1 to 64, got 100000", {"path": "a.mp4", "scale": 100_000}),
        (ValueError, "ending in .mp4, .webm without loss", {"path": "a.gif", "lossless": True}),
        (ValueError, "JSON", {"path": "a.mp4", "metadata": {"loss": float("nan")}}),
        (TypeError, "JSON", {"path": "a.mp4", "metadata": {"model": object()}}),
        (FileNotFoundError, "no such folder", {"path": "missing/a.mp4"}),
    ]
    for error, said, settings in refused:
        with pytest.raises(error, match=said):
            VideoWriter(**{**settings, "path": tmp_path / settings["path"]})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "wedding.jpg").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"wedding\.jpg"):
        VideoWriter(folder)
    assert (folder / "wedding.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize("names", [["000000.png"], ["000000.png", "metadata.json"], ["metadata.json"]])
def test_frames_and_notes_of_somebody_else_are_never_replaced(tmp_path, names):
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in names:
        (folder / name).write_text('{"fps": 8}')
    with pytest.raises(FileExistsError, match="holds files that dicode did not write"):
        VideoWriter(folder)
    assert sorted(file.name for file in folder.iterdir()) == names


@pytest.mark.parametrize("text", ['{"my": "notes"}', "no json", "[" * 100_000, '["dicode"]'])
def test_a_json_of_somebody_else_beside_the_file_is_never_replaced(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileExistsError, match=r"a.json: would be replaced and was not written by dicode"):
        VideoWriter(tmp_path / "a.mp4", metadata={"seed": 1})
    write(tmp_path / "a.mp4", [draw_clip(0, 2, 16)[0]])  # without metadata nothing is in the way
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(draw_clip(0, 2, 16)[0])
        with pytest.raises(FileExistsError, match="not written by dicode"):
            writer.note(seed=1)
    assert (tmp_path / "a.json").read_text() == text
    assert {file.name for file in tmp_path.iterdir()} == {"a.mp4", "a.json"}


def test_pipes_are_not_written_to(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "frames")
    for path in (tmp_path / "a.mp4", tmp_path / "frames", Path("/dev/null")):
        with pytest.raises(FileExistsError, match="is a"):
            VideoWriter(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
@pytest.mark.parametrize("stream", [False, True])
def test_without_loss_every_bit_comes_back(tmp_path, name, stream):
    frames = np.random.default_rng(0).integers(0, 256, (6, 33, 47, 3), dtype=np.uint8)
    frames[4:] = frames[3]
    path = write(tmp_path / name, [frames[:2], frames[2:]], lossless=True, stream=stream, metadata={"seed": 1}, scale=2)
    np.testing.assert_array_equal(read_video(path).frames, frames.repeat(2, axis=1).repeat(2, axis=2))
    assert read_metadata(path) == {"seed": 1, "scale": 2}


def test_frames_of_another_kind_or_size_are_refused(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4")
    for wrong in (np.zeros((1, 16, 16, 4), dtype=np.uint8), np.zeros((1, 0, 16, 3), dtype=np.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 frames \(f, h, w, 3\)"):
            writer.write(wrong)
    with pytest.raises((ValueError, TypeError), match=r"float64|f64"):  # TypeError where types are checked
        writer.write(np.zeros((1, 16, 16, 3)))
    writer.write(np.zeros((1, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"\(16, 16, 3\), as before, got \(16, 18, 3\)"):
        writer.write(np.zeros((1, 16, 18, 3), dtype=np.uint8))
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stream", [False, True])
def test_memory_does_not_grow_with_the_length_of_the_video(tmp_path, stream):
    program = """
import resource, sys
import numpy as np
from dicode.video.write import VideoWriter
with VideoWriter(sys.argv[1], stream=sys.argv[2] == "True") as writer:
    for clip in range(24):
        writer.write(np.full((16, 256, 256, 3), clip, dtype=np.uint8))  # 3 MiB
        if clip == 7:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "a.mp4"), str(stream)]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kib < 16 * 1024  # the 16 clips after are 48 MiB


def test_bytes_do_not_depend_on_what_lay_in_memory(tmp_path):
    """glibc fills new memory with a byte of MALLOC_PERTURB_; what an encoder reads before it writes then shows."""
    script = (
        "import sys\n"
        "import numpy as np\n"
        "from dicode.video.write import VideoWriter\n"
        "for suffix in ('.mp4', '.webm', '.gif', '_live.mp4', '_live.webm'):\n"
        "    with VideoWriter(sys.argv[1] + suffix, scale=2, stream='live' in suffix) as writer:\n"
        "        moving = np.arange(16)[:, None] + np.arange(32)\n"
        "        clip = (8 * moving[:, None, :, None] + np.arange(32)[:, None, None] * [1, 3, 5]).astype(np.uint8)\n"
        "        for clip in (clip, 255 - clip): writer.write(clip)\n"
    )
    for filling in ("1", "85", "255"):
        (tmp_path / filling).mkdir()
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / filling / "out")],
            env={**os.environ, "MALLOC_PERTURB_": filling},
            check=True,
        )
    first, second, third = (contents(tmp_path / filling) for filling in ("1", "85", "255"))
    assert set(first) == {"out.mp4", "out.webm", "out.gif", "out_live.mp4", "out_live.webm"}
    assert first == second == third


@pytest.mark.parametrize("name", STREAMED)
def test_a_streamed_video_holds_every_frame_after_every_write(tmp_path, name):
    frames = np.concatenate([draw_clip(seed, 20, 32)[0] for seed in (1, 2)])
    with VideoWriter(f"{tmp_path}/{name}", metadata=METADATA, stream=True) as writer:
        writer.write(frames[:0])
        assert not writer.path.exists()
        for start, stop in [(0, 1), (1, 8), (8, 24), (24, 24), (24, 27), (27, 40)]:
            writer.write(frames[start:stop])
            seen, times_s = decoded(writer.path)
            assert times_s == [index / 8 for index in range(stop)]
            assert np.abs(seen.astype(int) - frames[:stop]).mean(axis=(1, 2, 3)).max() < 4
            assert len(read_video(writer.path).frames) == stop
            assert {**read_metadata(writer.path), "fps": 8.0} == {"fps": 8.0, **METADATA}
            assert name == "frames/" or json.loads(writer.path.with_suffix(".json").read_text("utf-8")) == METADATA
    np.testing.assert_array_equal(decoded(writer.path)[0], seen)  # packed anew at the end, not encoded anew


def test_a_streamed_video_ends_as_an_ordinary_one(tmp_path):
    clip = draw_clip(0, 16, 32)[0]
    for suffix in (".mp4", ".webm"):
        path = write(tmp_path / f"a{suffix}", [clip[:5], clip[5:]], metadata=METADATA, stream=True)
        with av.open(str(path)) as container:
            assert container.duration == 2_000_000
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # as browsers like it
    assert b"moof" not in data
    assert read_metadata(tmp_path / "a.mp4") == METADATA
    assert {file.name for file in tmp_path.iterdir()} == {"a.mp4", "a.webm", "a.json"}


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_frames_give_the_same_bytes_in_one_piece_or_many(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    frames = np.concatenate([noise, draw_clip(1, 24, 64)[0][:, :48]])
    for run, pieces in {"one": [frames], "many": [frames[:1], frames[1:13], frames[13:19], frames[19:]]}.items():
        (tmp_path / run).mkdir()
        write(f"{tmp_path}/{run}/{name}", pieces, metadata=METADATA, stream=True)
    stem = name.strip("/")
    assert contents(tmp_path / "one" / stem) == contents(tmp_path / "many" / stem)


@pytest.mark.parametrize("name", STREAMED)
def test_a_streamed_video_replaces_the_old_one_with_its_first_whole_clip(tmp_path, monkeypatch, name):
    clip = draw_clip(0, 12, 32)[0]
    path = write(f"{tmp_path}/{name}", [clip], metadata={"seed": 1})
    before = {file.name: contents(file) for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            write(f"{tmp_path}/{name}", [clip[:9]], metadata={"seed": 2}, stream=True)
    assert {file.name: contents(file) for file in tmp_path.iterdir()} == before
    with VideoWriter(f"{tmp_path}/{name}", metadata={"seed": 2}, stream=True) as writer:
        writer.write(clip[:3])
        assert len(decoded(path)[0]) == 3
        assert read_metadata(path)["seed"] == 2


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt, "within a clip"])
def test_a_streamed_video_that_is_stopped_stays_and_is_finished(tmp_path, monkeypatch, name, ending):
    clip = draw_clip(0, 12, 32)[0]
    num_frames = 10 if ending == "within a clip" else 7
    interrupt_at(monkeypatch, 10)
    with (
        contextlib.suppress(RuntimeError, KeyboardInterrupt),
        VideoWriter(f"{tmp_path}/{name}", metadata=METADATA, stream=True) as writer,
    ):
        writer.write(clip[:7])
        writer.note(stopped=True)
        if ending == "within a clip":
            writer.write(clip[7:])
        raise ending
    assert len(decoded(writer.path)[0]) == writer.num_frames == num_frames
    assert name != "out.mp4" or b"moof" not in writer.path.read_bytes()
    beside = writer.path / "metadata.json" if writer.path.is_dir() else writer.path.with_suffix(".json")
    noted = {**METADATA, "stopped": True}
    assert json.loads(beside.read_text("utf-8")) == ({"fps": 8.0, **noted} if writer.path.is_dir() else noted)
    left = [file for file in tmp_path.rglob("*") if file.suffix != ".png" and file.name != writer.path.name]
    assert left == [beside]


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
def test_what_was_streamed_outlives_a_failing_disk_and_the_first_error_is_raised(tmp_path, monkeypatch, name):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    def clips() -> Iterator[np.ndarray]:
        yield draw_clip(0, 7, 32)[0]
        monkeypatch.setattr("os.fsync", full)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        write(tmp_path / name, clips(), stream=True)
    assert "No space left" in raised.value.__notes__[0]
    assert len(decoded(tmp_path / name)[0]) == 7
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
def test_what_was_streamed_outlives_a_killed_process(tmp_path, name):
    script = """
import os, signal, sys
import numpy as np
from dicode.video.write import VideoWriter
writer = VideoWriter(sys.argv[1], stream=True)
for seed in range(3):
    writer.write(np.full((5, 32, 32, 3), 50 * seed, dtype=np.uint8))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=False)
    assert len(decoded(tmp_path / name)[0]) == 15


@pytest.mark.parametrize("name", NAMES)
def test_notes_are_beside_the_file_and_not_in_it(tmp_path, name):
    with VideoWriter(f"{tmp_path}/{name}", metadata=METADATA) as writer:
        writer.note(frames_delivered=1)
        writer.write(draw_clip(0, 3, 16)[0])
        writer.note(frames_delivered=3, prompt="said later")
        with pytest.raises(TypeError, match="JSON"):
            writer.note(model=object())
    noted = {**METADATA, "frames_delivered": 3, "prompt": "said later"}
    if name.startswith("frames"):
        assert read_metadata(writer.path) == {"fps": 8.0, **noted}
    else:
        assert json.loads(writer.path.with_suffix(".json").read_text(encoding="utf-8")) == noted
        assert read_metadata(writer.path) == METADATA
    with pytest.raises(ValueError, match="already closed"):
        writer.note(late=True)


def test_notes_alone_make_a_json_too(tmp_path):
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(draw_clip(0, 3, 16)[0])
        writer.note(stopped=True)
    assert read_metadata(tmp_path / "a.mp4") == {"stopped": True, "dicode": __version__}
