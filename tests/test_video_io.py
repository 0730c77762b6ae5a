"""Reading: whatever people call a video, at any rate, comes out as the frames that are shown at i/fps."""

import json
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dicode.video.container import container_frames
from dicode.video.read import VideoReadError, check_frames, native_frames, read_metadata, read_video

GREYS = [20 + 30 * i for i in range(8)]  # frame i is told by its grey, which survives any codec within 3 levels
TIMES_MS = [0, 40, 300, 340, 700, 1500]  # uneven, in whole GIF ticks
END_MS = 2000


def grey_frames(count: int, height: int = 24, width: int = 32) -> np.ndarray:
    greys = np.array([20 + (30 * i) % 231 for i in range(count)], dtype=np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (count, height, width, 3)).copy()


def which(frames: np.ndarray) -> list[int]:
    """The numbers of the frames of `grey_frames`, read off their grey."""
    return [round((float(frame.mean()) - 20) / 30) for frame in frames]


def shown_at(times_ms: Sequence[int], end_ms: int, fps: float) -> list[int]:
    """The slow, exact path: the last frame not later than i/fps, for every i/fps before the end."""
    moments = [Fraction(1000 * i) / Fraction(fps) for i in range(int(end_ms * fps / 1000) + 2)]
    return [max(k for k, t in enumerate(times_ms) if t <= m) for m in moments if m < end_ms]


def write_video(
    path: Path,
    frames: np.ndarray,
    codec: str,
    pixels: str,
    times_ms: Sequence[int],
    end_ms: int,
    *,
    matrix: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
) -> Path:
    """Write frames at given times with PyAV alone, so that reading is not tested against our own writer."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=1000, options=codec_options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix:
            stream.set_display_matrix(matrix)
        ends = dict(zip(times_ms, [*times_ms[1:], end_ms], strict=True))
        for time_ms, picture in [*zip(times_ms, frames, strict=True), (None, None)]:
            frame = None
            if picture is not None:
                frame = av.VideoFrame.from_ndarray(picture, "rgba" if picture.shape[-1] == 4 else "rgb24")
                frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            for packet in stream.encode(frame):
                packet.duration = ends[packet.pts] - packet.pts
                container.mux(packet)
    return path


def steady(path: Path, count: int, fps: int = 10, **settings) -> Path:
    times_ms = [round(1000 * i / fps) for i in range(count)]
    return write_video(path, grey_frames(count), "libx264", "yuv420p", times_ms, round(1000 * count / fps), **settings)


def animated_image(path: Path, frames: np.ndarray, delays_ms: list[int]) -> Path:
    images = [Image.fromarray(frame) for frame in frames]
    exact = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=delays_ms, loop=0, **exact)
    return path


def uneven_video(path: Path) -> Path:
    codecs = {".mp4": ("libx264", "yuv420p"), ".webm": ("libvpx-vp9", "yuv420p"), ".mkv": ("ffv1", "bgr0")}
    codecs[".mov"] = ("png", "rgb24")
    frames = grey_frames(len(TIMES_MS))
    if path.suffix in codecs:
        return write_video(path, frames, *codecs[path.suffix], TIMES_MS, END_MS)
    return animated_image(path, frames, np.diff([*TIMES_MS, END_MS]).tolist())


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".mov", ".gif", ".webp", ".apng"])
def test_frames_are_those_shown_at_each_moment_of_an_uneven_video(tmp_path, suffix):
    path = uneven_video(tmp_path / f"uneven{suffix}")
    for fps in (3.0, 8.0, 25.0):  # fewer and more frames than the file has
        video = read_video(path, fps=fps)
        assert video.fps == fps
        assert which(video.frames) == shown_at(TIMES_MS, END_MS, fps)
    frames, times_s, period_s = native_frames(path)
    assert which(frames) == list(range(6))
    np.testing.assert_allclose(times_s, np.array(TIMES_MS) / 1000, atol=1e-9)
    assert period_s == pytest.approx(END_MS / 1000)


@pytest.mark.parametrize("fps", [12.0, 24.0, 30.0, 60.0])
def test_rounded_timestamps_neither_drop_nor_double_a_frame(tmp_path, fps):
    frames = grey_frames(30, 2, 2) + np.arange(30, dtype=np.uint8)[:, None, None, None] // 8
    times_ms = [round(1000 * i / fps) for i in range(30)]
    path = write_video(tmp_path / "rounded.mkv", frames, "ffv1", "bgr0", times_ms, round(30_000 / fps))
    np.testing.assert_array_equal(read_video(path, fps=fps).frames, frames)
    native = read_video(path, fps=None)
    np.testing.assert_array_equal(native.frames, frames)
    assert native.fps == pytest.approx(fps, rel=1e-3)


def test_a_span_starts_and_ends_where_it_is_asked_to(tmp_path):
    path = uneven_video(tmp_path / "uneven.mkv")
    span = read_video(path, fps=10.0, start_s=0.25, end_s=0.75)  # 0.25, 0.35, … 0.65
    assert which(span.frames) == [1, 3, 3, 3, 3]
    assert which(read_video(path, fps=None, start_s=0.25, end_s=0.75).frames) == [1, 2, 3, 4]
    assert which(read_video(path, fps=4.0, start_s=1.6).frames) == [5, 5]


def test_animated_images_run_at_the_rate_browsers_show_them(tmp_path):
    path = animated_image(tmp_path / "hasty.gif", grey_frames(3), [10, 0, 50])
    np.testing.assert_allclose(native_frames(path)[1], [0, 0.1, 0.2])


@pytest.mark.parametrize(
    "matrix",
    [
        (a, b, c, d)
        for a, b, c, d in np.ndindex(3, 3, 3, 3)
        if abs((a - 1) * (d - 1) - (b - 1) * (c - 1)) == 1
        and abs(a - 1) + abs(b - 1) == 1
        and abs(c - 1) + abs(d - 1) == 1
    ],
)
def test_rotation_flag_turns_the_frames(tmp_path, matrix):
    a, b, c, d = (int(number) - 1 for number in matrix)
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    unit = 1 << 16
    flags = [a * unit, b * unit, 0, c * unit, d * unit, 0, 0, 0, 1 << 30]
    path = write_video(tmp_path / "turned.mov", picture[None], "png", "rgb24", [0], 100, matrix=flags)
    # By definition: the pixel at (x, y) is shown at (ax + cy, bx + dy), moved back to start at 0.
    moved = {(a * x + c * y, b * x + d * y): picture[y, x] for y in range(4) for x in range(6)}
    left, top = min(x for x, _ in moved), min(y for _, y in moved)
    width, height = (6, 4) if a else (4, 6)
    expected = [[moved[left + x, top + y] for x in range(width)] for y in range(height)]
    np.testing.assert_array_equal(read_video(path).frames[0], expected)


def test_photo_orientation_turns_the_image(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = 6  # show turned a quarter clockwise
    image.save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_video(tmp_path / "photo.png").frames[0], np.rot90(picture, -1))


def test_oblong_pixels_are_shown_square(tmp_path):
    path = write_video(
        tmp_path / "dv.mov", grey_frames(2, 20, 18), "png", "rgb24", [0, 100], 200, aspect=Fraction(4, 3)
    )
    assert read_video(path).frames.shape == (2, 20, 24, 3)
    frames = list(container_frames(path))  # the file is closed now
    assert [frame.render().shape for frame in frames] == [(20, 24, 3)] * 2


@pytest.mark.parametrize("name", ["a.mov", "a.webm", "a.gif", "a.webp", "a.apng", "a.png"])
def test_transparency_is_laid_over_white(tmp_path, name):
    rgba = np.zeros((2, 16, 24, 4), dtype=np.uint8)
    rgba[..., :3] = (200, 40, 60)
    rgba[:, :, :8, 3] = 255
    half = 0 if name.endswith("gif") else 102  # a GIF pixel is there or not
    rgba[:, :, 8:16, 3] = half
    rgba[1, :8, :, :3] = (20, 30, 220)
    codecs = {"a.mov": ("png", "rgba"), "a.webm": ("libvpx-vp9", "yuva420p")}
    if name in codecs:
        write_video(tmp_path / name, rgba, *codecs[name], [0, 125], 250)
    elif name == "a.png":
        rgba = rgba[:1]
        Image.fromarray(rgba[0]).save(tmp_path / name)
    else:
        animated_image(tmp_path / name, rgba, [120, 120])
    expected = 255 + (rgba[..., :3].astype(float) - 255) * rgba[..., 3:] / 255
    frames = read_video(tmp_path / name).frames
    assert frames.shape == expected.shape
    middle = np.ix_(range(len(rgba)), [3, 12], [4, 12, 20])  # away from blurred edges
    np.testing.assert_allclose(frames[middle], expected[middle], atol=9 if name == "a.webm" else 1)


@pytest.mark.parametrize("pixels", ["gray", "yuv420p10le", "rgb48le", "yuvj420p"])
def test_grey_deep_and_full_range_pictures_become_8_bit_rgb(tmp_path, pixels):
    codec = "mjpeg" if pixels == "yuvj420p" else "ffv1"
    path = write_video(tmp_path / "grey.mkv", grey_frames(3, 23, 31)[:, :, :30], codec, pixels, [0, 100, 200], 300)
    video = read_video(path, fps=10.0)
    np.testing.assert_allclose(video.frames, grey_frames(3, 23, 30), atol=2 if codec == "mjpeg" else 1)


def test_every_kind_of_still_image_is_one_frame_of_its_colours(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(picture)
    grey = np.asarray(image.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(tmp_path / "palette.png")
    image.save(tmp_path / "colour.webp", lossless=True)
    image.convert("L").convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    expected = {
        "grey16.png": grey[..., None],
        "grey.png": grey[..., None],
        "palette.png": picture,
        "colour.webp": picture,
    }
    expected["print.jpg"] = grey[..., None]
    for name, colours in expected.items():
        for fps in (8.0, 30.0, None):
            frames = read_video(tmp_path / name, fps=fps).frames
            assert frames.shape == (1, 5, 7, 3)
            np.testing.assert_allclose(frames[0], np.broadcast_to(colours, (5, 7, 3)), atol=3 if "jpg" in name else 0)


def test_odd_sizes_are_read_exactly(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (2, 47, 63, 3), dtype=np.uint8)
    path = write_video(tmp_path / "odd.mkv", frames, "ffv1", "bgr0", [0, 125], 250)
    np.testing.assert_array_equal(read_video(path).frames, frames)


@pytest.mark.parametrize("colours", [1, 2, 5])  # BT.709, unnamed (BT.601), BT.601
def test_colours_are_read_by_the_matrix_the_file_names(tmp_path, colours):
    colour = np.array([200, 60, 30], dtype=np.uint8)
    red, green, blue = colour.astype(float)
    kr, kb = (0.2126, 0.0722) if colours == 1 else (0.299, 0.114)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    values = (
        16 + 219 / 255 * luma,
        128 + 112 / 255 * (blue - luma) / (1 - kb),
        128 + 112 / 255 * (red - luma) / (1 - kr),
    )
    frame = av.VideoFrame(16, 16, "yuv444p")
    for plane, value in zip(frame.planes, values, strict=True):
        plane.update(bytes([round(value)]) * plane.buffer_size)
    frame.pts, frame.time_base = 0, Fraction(1, 8)
    with av.open(str(tmp_path / "c.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv444p"
        stream.codec_context.colorspace = frame.colorspace = colours
        container.mux([*stream.encode(frame), *stream.encode(None)])
    np.testing.assert_allclose(read_video(tmp_path / "c.mkv").frames[0, 8, 8], colour, atol=2)


def test_shrinking_averages_areas_as_pillow_does(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    scaled = np.asarray(Image.fromarray(picture).resize((24, 16), Image.Resampling.BILINEAR)).astype(int)
    cropped = read_video(tmp_path / "a.png", size=16).frames[0]
    np.testing.assert_allclose(cropped, scaled[:, 4:20], atol=1)
    padded = read_video(tmp_path / "a.png", size=(20, 24), fit="pad").frames[0]
    np.testing.assert_allclose(padded[2:18], scaled, atol=1)
    assert (padded[[0, 1, 18, 19]] == 255).all()


@pytest.mark.parametrize(("height", "width"), [(7, 301), (301, 7), (1, 1), (33, 32)])
def test_any_shape_fits_any_size(tmp_path, height, width):
    Image.new("RGB", (width, height), (9, 90, 200)).save(tmp_path / "a.png")
    cropped = read_video(tmp_path / "a.png", size=(32, 48)).frames
    assert cropped.shape == (1, 32, 48, 3)
    assert (cropped == (9, 90, 200)).all()
    assert read_video(tmp_path / "a.png", size=(32, 48), fit="pad").frames.shape == (1, 32, 48, 3)


def test_a_folder_is_read_in_natural_order_at_its_rate(tmp_path):
    folder = tmp_path / "frames.d"
    folder.mkdir()
    for number, frame in zip([1, 2, 10, 11], grey_frames(4), strict=True):
        Image.fromarray(frame).save(folder / f"frame{number}.png")
    (folder / "notes.txt").write_text("no frame")
    assert which(read_video(folder).frames) == [0, 1, 2, 3]
    (folder / "metadata.json").write_text(json.dumps({"fps": 4}))
    assert which(read_video(folder).frames) == [0, 0, 1, 1, 2, 2, 3, 3]
    (folder / "metadata.json").write_text(json.dumps({"fps": 16}))
    assert which(read_video(folder).frames) == [0, 2]
    Image.new("RGB", (9, 9)).save(folder / "frame12.png")
    with pytest.raises(VideoReadError, match=r"frame 4 is 9x9, the first one 32x24"):
        read_video(folder, fps=16.0)
    assert read_video(folder, fps=16.0, size=8).frames.shape == (5, 8, 8, 3)


@pytest.mark.parametrize("key", ["FPS", "Fps", " fps", "frame_rate", "frameRate", "frames per second"])
def test_another_name_for_the_rate_of_a_folder_is_refused(tmp_path, key):
    Image.fromarray(grey_frames(1)[0]).save(tmp_path / "0.png")
    (tmp_path / "metadata.json").write_text(json.dumps({"prompt": "gps", key: 24}))
    with pytest.raises(VideoReadError, match=rf"metadata.json: unknown key '{key}' \(did you mean 'fps'\?\)"):
        read_video(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps({"fps": 24, key: 25, "gps": 1}))
    assert read_video(tmp_path, fps=None).fps == 24


def test_names_that_ffmpeg_would_take_for_something_else_are_read(tmp_path):
    for name in ("a:b.mp4", "50%03d.mp4", "ünï 'x'.mp4"):
        path = steady(tmp_path / "plain.mp4", 2).rename(tmp_path / name)
        assert len(read_video(path, fps=10.0).frames) == 2
        assert read_metadata(path) == {}


def bad_file(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a video\n" * 100)
    elif kind == "terminal art":  # FFmpeg draws a .txt as a video of a terminal
        (path := path.with_suffix(".txt")).write_text("not a video\n" * 100)
    elif kind == "playlist":  # FFmpeg would open the files it names
        path.write_text(f"ffconcat version 1.0\nfile '{steady(folder / 'other.mp4', 3)}'\n")
    elif kind == "sound":
        with wave.open(str(path), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(8000))
    elif kind == "folder without images":
        path.mkdir()
        (path / "notes.txt").write_text("no frame")
    elif kind == "folder with a bad image":
        path.mkdir()
        Image.new("RGB", (8, 8)).save(path / "0.png")
        (path / "1.png").write_bytes(b"\x89PNG")
    elif kind == "cut before its index":
        steady(path, 20)
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == "cut image":
        Image.effect_noise((64, 64), 80).save(path, format="PNG")
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "no such file"),
        ("empty", "empty file"),
        ("text", "of another kind"),
        ("terminal art", "of another kind"),
        ("playlist", "of another kind"),
        ("noise", "of another kind"),
        ("sound", "found only audio"),
        ("folder without images", "expected a folder of frame images"),
        ("folder with a bad image", "1.png: not a readable image"),
        ("cut before its index", "cut off early|of another kind"),
        ("cut image", "damaged"),
    ],
)
def test_what_is_no_video_is_refused_by_name(tmp_path, kind, said):
    path = bad_file(tmp_path, kind)
    with pytest.raises(VideoReadError, match=said) as caught:
        read_video(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_of_two_pictures_that_move_and_stand_the_moving_one_is_read(tmp_path, suffix):
    path = tmp_path / f"cover{suffix}"
    with av.open(str(path), "w") as container:
        cover, film = (container.add_stream("libx264", rate=8) for _ in range(2))
        for stream in (cover, film):
            stream.height, stream.width, stream.pix_fmt = 24, 32, "yuv420p"
        for stream, frames in ((cover, grey_frames(1)), (film, grey_frames(8))):
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode(None))
    assert which(read_video(path, fps=8.0).frames) == list(range(8))
    assert check_frames(path, 8).num_frames == 8


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.webm", "cut.gif"])
def test_a_file_that_breaks_off_is_refused_unless_its_part_is_wanted(tmp_path, name):
    path = tmp_path / name
    frames = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    if name.endswith("gif"):
        animated_image(path, frames, [100] * 40)
    else:
        codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
        options = {"movflags": "+faststart"} if name.endswith("mp4") else {}
        write_video(path, frames, codec, "yuv420p", [100 * i for i in range(40)], 4000, options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(VideoReadError, match=r"breaks off after \d+ frames") as caught:
        read_video(path, fps=10.0)
    count = int(str(caught.value).split("after ")[1].split()[0])
    assert 5 < count < 30
    part = read_video(path, fps=10.0, allow_partial=True).frames
    assert len(part) in (count, count + 1)  # a frame lost before the break leaves its time to the one before
    assert np.abs(part[0].astype(int) - frames[0]).mean() < 60


def test_too_short_a_video_is_refused_with_what_there_is(tmp_path):
    path = steady(tmp_path / "short.mp4", 5)
    with pytest.raises(VideoReadError, match=r"short.mp4: too short.*at least 17 frame.*8 fps.*got 4 in 0.5 s"):
        read_video(path, min_frames=17)
    with pytest.raises(VideoReadError, match=r"expected frames from 2 s on; the file lasts 0.5 s"):
        read_video(path, start_s=2.0)
