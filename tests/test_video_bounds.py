"""What a video file can do to whoever reads it: nothing that takes long, much memory, or another program."""

import json
import os
import socket
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_video_io import animated_image, grey_frames, steady, which, write_video

from dicode.video import read as read_module
from dicode.video import timed
from dicode.video.read import VideoReadError, check_frames, native_frames, read_video


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.gif"])
def test_a_clock_that_jumps_is_refused_and_a_slide_of_minutes_is_not(tmp_path, name):
    def written(gap_s: int) -> Path:
        if name == "a.gif":
            return animated_image(tmp_path / name, grey_frames(2), [gap_s * 1000, 100])
        times_ms, end_ms = [0, gap_s * 1000], gap_s * 1000 + 100
        return write_video(tmp_path / name, grey_frames(2), "libx264", "yuv420p", times_ms, end_ms)

    slide = read_video(written(590), fps=0.1, size=8)
    assert which(slide.frames) == [0] * 59 + [1]
    path = written(640)
    for read in (read_video, native_frames):
        with pytest.raises(VideoReadError, match=r"frame 0, at 0 s, stays for 640 s; expected at most 600 s"):
            read(path)


def test_a_clock_that_runs_backwards_is_refused(tmp_path):
    frames = grey_frames(8)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 24, 32, "yuvj420p"
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            for packet in stream.encode(frame):
                packet.pts = 40 if i == 3 else packet.pts
                container.mux(packet)
    with pytest.raises(VideoReadError, match=r"runs backwards: frame 4 is to appear at 0.400 s.* at 4.000 s"):
        native_frames(tmp_path / "a.mkv")


@pytest.mark.parametrize("fps", [float("nan"), float("inf"), -3, 0, 1e-12, 1e9, "8", True, None, [8]])
def test_a_rate_that_is_none_is_refused(tmp_path, fps):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "metadata.json").write_text(json.dumps({"fps": fps}))
    for read in (read_video, native_frames):
        with pytest.raises(VideoReadError, match=r"metadata.json: fps: expected a positive rate from 1/600 to 1000"):
            read(tmp_path)
    if isinstance(fps, float):
        with pytest.raises(ValueError, match=r"^fps: expected a positive rate"):
            read_video(tmp_path / "0.png", fps=fps)


def test_claimed_sizes_are_refused_before_a_picture_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(timed, "MOST_PIXELS", 1000)
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.webp", save_all=True)
    write_video(tmp_path / "a.mkv", grey_frames(1, 30, 40), "ffv1", "bgr0", [0], 100)
    monkeypatch.setattr(Image.Image, "load", None)
    for name in ("a.png", "a.webp", "a.mkv"):
        for read in (read_video, native_frames):
            with pytest.raises(VideoReadError, match=r"claims pictures of 40x30; expected at most 1,000 pixels"):
                read(tmp_path / name)


def test_many_empty_pictures_of_a_small_file_are_refused_before_they_are_drawn(tmp_path, monkeypatch):
    frames = [Image.new("P", (400, 400)) for _ in range(9)]
    for i, frame in enumerate(frames):
        frame.putpixel((i, 0), 1)
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    monkeypatch.setattr(timed, "FREE_WORK", 10**6)
    monkeypatch.setattr(timed, "MOST_WORK", 2)
    with pytest.raises(VideoReadError, match=r"a.gif: .* bytes that unfold to more than 1 million pixels"):
        read_video(path, size=8)
    monkeypatch.setattr(timed, "MOST_WORK", 2**18)
    assert len(read_video(path, size=8, fps=None).frames) == 9


def test_a_strip_is_not_blown_up_to_gigabytes(tmp_path):
    Image.new("L", (60_000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(VideoReadError, match=r"pictures of 7680000x128"):
        read_video(tmp_path / "strip.png", size=128)
    assert read_video(tmp_path / "strip.png", size=128, fit="pad").frames.shape == (1, 128, 128, 3)
    with pytest.raises(ValueError, match="size: expected sides"):
        read_video(tmp_path / "strip.png", size=100_000)


def test_frames_held_are_bounded_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(read_module, "MOST_BYTES", 24 * 32 * 3 * 10)
    path = steady(tmp_path / "a.mp4", 20)
    expected = r"11 frames of 32x24.*up to 1.0 s.*read them smaller \(size.*or a span"
    for read in (native_frames, lambda path, **span: read_video(path, 10.0, **span)):
        with pytest.raises(VideoReadError, match=expected):
            read(path)
        with pytest.raises(VideoReadError, match="11 frames"):
            read(path, start_s=0.5)
    assert len(read_video(path, 10.0, start_s=0.5, end_s=1.5).frames) == 10
    assert len(read_video(path, 10.0, size=12).frames) == 20


def test_the_number_of_frames_is_bounded_however_small_they_are(tmp_path):
    stills = [Image.new("L", (1, 1), i) for i in range(200)]
    stills[0].save(tmp_path / "a.gif", save_all=True, append_images=stills[1:], duration=590_000)
    with pytest.raises(
        VideoReadError, match=r"a.gif: 4,248,000 frames.* expected at most 4,194,304: read it at a lower"
    ):
        read_video(tmp_path / "a.gif", 100.0, size=1)
    assert len(read_video(tmp_path / "a.gif", 0.01, size=1).frames) == 1180


@pytest.mark.parametrize("name", ["0.png", "0.gif", "0.avif"])
def test_no_other_program_is_started_for_what_is_called_an_image(tmp_path, monkeypatch, name):
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen.__init__", started)
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nnewpath\nshowpage\n%%EOF\n"
    (tmp_path / name).write_text(eps)
    with pytest.raises(VideoReadError, match=f"{name}: not a readable image .its content is that of no image"):
        read_video(tmp_path)
    with pytest.raises(VideoReadError, match="of another kind"):
        read_video(tmp_path / name)


def test_pipes_sockets_and_devices_are_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(tmp_path / "b.mp4"))  # the length of a socket's name is bounded
        for path in (tmp_path / "a.mp4", tmp_path / "b.mp4", Path("/dev/zero")):
            for read in (read_video, native_frames):
                with pytest.raises(VideoReadError, match="found a pipe, a socket or a device"):
                    read(path)
    (tmp_path / "frames").mkdir()
    os.mkfifo(tmp_path / "frames" / "0.png")
    with pytest.raises(VideoReadError, match=r"0.png: not a readable image .no regular file"):
        read_video(tmp_path / "frames")


def test_facts_of_a_file_are_those_of_its_frames(tmp_path):
    animated_image(tmp_path / "a.gif", grey_frames(3), [100, 200, 300])
    uneven = write_video(tmp_path / "a.mkv", grey_frames(3), "libx264", "yuv420p", [0, 100, 700], 1000)
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (7, 5)).save(folder / f"{i}.png")
    for path in (tmp_path / "a.gif", uneven, folder, folder / "0.png"):
        for start_s, end_s in ((0.0, None), (0.05, 0.11)):
            frames, _, period_s = native_frames(path, start_s=start_s, end_s=end_s)
            found = check_frames(path, 8, start_s, end_s)
            assert (found.num_frames, found.height, found.width) == frames.shape[:3]
            assert found.duration_s == period_s
            assert not found.hdr
    Image.new("L", (60_000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(VideoReadError, match=r"pictures of 7680000x128"):
        check_frames(tmp_path / "strip.png", 128)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.gif"])
def test_a_span_is_the_slice_of_the_whole(tmp_path, name):
    count, frames = 60, np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    times_ms = [100 * i + (37 if i % 3 == 1 and name != "a.avi" else 0) for i in range(count)]  # uneven
    if name == "a.gif":
        path = animated_image(tmp_path / name, frames, [10 * (t // 10) for t in np.diff([*times_ms, 6000]).tolist()])
    else:
        codec = "mpeg4" if name == "a.avi" else "libx264"
        often = {} if name == "a.avi" else {"g": "7", "x264-params": "open-gop=1:scenecut=0"}  # to seek to
        path = write_video(tmp_path / name, frames, codec, "yuv420p", times_ms, 6000, codec_options=often)
    whole, starts_s, period_s = native_frames(path)
    ends_s = np.append(starts_s[1:], period_s)
    for start_s, end_s in [(0.0, 1.0), (0.55, 0.7), (3.1, 4.437), (4.9, None), (5.7, 99.0)]:
        span, times_s, length_s = native_frames(path, start_s=start_s, end_s=end_s)
        kept = np.flatnonzero((ends_s - 1e-3 > start_s) & (starts_s + 1e-3 < (end_s or 99)))
        np.testing.assert_array_equal(span, whole[kept])
        np.testing.assert_allclose(times_s, (starts_s[kept] - start_s).clip(0), atol=1e-9)
        assert length_s == pytest.approx(min(end_s or 99, period_s) - start_s)
    same = read_video(path, 8.0, start_s=4.0).frames
    np.testing.assert_array_equal(same, read_video(path, 8.0).frames[32:])
    with pytest.raises(VideoReadError, match=r"expected frames from 7 s on; the file lasts [56]"):
        native_frames(path, start_s=7.0)
    with pytest.raises(ValueError, match="expected 0 ≤ start_s < end_s"):
        native_frames(path, start_s=2.0, end_s=1.0)
