"""Files that are damaged, cut off, or unlike their name: their frames, or an error, never fewer in silence."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_video_io import animated_image, grey_frames, steady, which

from dicode.video.hdr import HLG, PQ, tone_mapped
from dicode.video.read import VIDEO_SUFFIXES, VideoReadError, check_frames, native_frames, read_metadata, read_video
from tests.fuzz import is_fault, videos

MOVIES = [kind for kind, (_, codec, _) in videos.KINDS.items() if codec]


@pytest.mark.parametrize("kind", videos.KINDS)
def test_every_kind_is_read_whole_and_not_when_it_is_cut_off(tmp_path, kind):
    whole = videos.source(kind)
    assert Path(kind).suffix in VIDEO_SUFFIXES
    (tmp_path / kind).write_bytes(whole.data)
    frames, times_s, period_s = native_frames(tmp_path / kind)
    np.testing.assert_array_equal(frames, whole.frames)
    np.testing.assert_allclose(np.diff([*times_s, period_s]), period_s / len(frames), atol=1e-3)
    assert read_metadata(tmp_path / kind) == {}
    (tmp_path / "mislabelled.png").write_bytes(whole.data)
    np.testing.assert_array_equal(native_frames(tmp_path / "mislabelled.png")[0], whole.frames)
    for share in (0.3, 0.61, 0.9):
        (tmp_path / kind).write_bytes(whole.data[: int(share * len(whole.data)) | 1])
        try:
            frames = read_video(tmp_path / kind, fps=None).frames
            np.testing.assert_array_equal(frames, whole.frames)  # what is missing is padding, or an index
            assert kind in ("mpeg1.mpg", "mpeg2.vob", "mpeg2.mxf")
        except VideoReadError:
            pass
        try:
            part = read_video(tmp_path / kind, fps=None, allow_partial=True).frames
        except VideoReadError:
            continue  # the index was at the end
        safe = sum(end <= share * len(whole.data) for end in whole.ends)
        assert safe <= len(part)
        np.testing.assert_array_equal(part[:safe], whole.frames[:safe])


@pytest.mark.slow
def test_two_thousand_damaged_files(tmp_path):
    assert faults(tmp_path, 2000) == []


def test_damaged_files_are_refused_or_give_what_is_undamaged(tmp_path):
    assert faults(tmp_path, 54, seed=7) == []


def test_faults_would_be_found(tmp_path):
    whole = videos.source("a.gif")
    path, size = tmp_path / "a.gif", len(whole.data)
    path.write_bytes(whole.data)
    other = videos.Source(whole.data, 255 - whole.frames, whole.ends)
    found = videos.outcome(videos.Case("a.gif", "flip", 0), other, path, size, size)
    assert found == "wrong: frame 0 differs, 10 are undamaged, 10 were read"
    animated_image(path, whole.frames[:4], [100] * 4)
    found = videos.outcome(videos.Case("a.gif", "truncate", 0), whole, path, size - 1, 0)
    assert found == "wrong: accepted with 4 of 10 frames, 0 undamaged"
    path.write_bytes(b"GIF89a")
    found = videos.outcome(videos.Case("a.gif", "suffix", 0), whole, path, size, size)
    assert found.startswith("wrong: refused, a.gif: expected a video")


def faults(folder: Path, count: int, seed: int = 0) -> list[str]:
    found = []
    for number, case in enumerate(videos.cases(seed, count)):
        (folder / f"{number}").mkdir()
        outcome = videos.run(case, folder / f"{number}")
        found += [f"{case}: {outcome}"] if is_fault(outcome) else []
    return found


def test_frames_without_a_time_are_spread_at_the_frame_rate(tmp_path):
    """As in a Matroska file that was cut: the first frames lie before time 0, where nothing can be said."""
    frames = grey_frames(8)
    for without_time in [{0, 1, 2}, {3, 4}, {6, 7}, set(range(8))]:
        with av.open(str(tmp_path / "a.avi"), "w") as container:
            stream = container.add_stream("mjpeg", rate=8)
            stream.height, stream.width, stream.pix_fmt = 24, 32, "yuvj420p"
            for i, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 8)
                container.mux(stream.encode(frame))
        from dicode.video import container as module

        decoded = module._decoded

        def changed(*given, without_time=without_time, decoded=decoded):
            for i, frame in enumerate(decoded(*given)):
                frame.pts = None if i in without_time else frame.pts
                yield frame

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_decoded", changed)
            shown, times_s, period_s = native_frames(tmp_path / "a.avi")
        assert which(shown) == list(range(8))
        np.testing.assert_allclose(times_s, np.arange(8) / 8)
        assert period_s == pytest.approx(1.0)


def test_a_video_with_frames_before_time_zero_keeps_them(tmp_path):
    frames = grey_frames(8)
    with av.open(str(tmp_path / "a.mkv"), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 24, 32, "yuv420p"
        packets = []
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 8)
            packets += stream.encode(frame)
        for packet in packets + stream.encode(None):
            packet.pts, packet.dts = packet.pts - 375, packet.dts - 375  # milliseconds
            container.mux(packet)
    shown, times_s, period_s = native_frames(tmp_path / "a.mkv")
    assert which(shown) == list(range(8))
    np.testing.assert_allclose(times_s, np.arange(8) / 8, atol=2e-3)
    assert period_s == pytest.approx(1.0, abs=2e-3)


def test_animated_avif_has_all_frames_and_a_still_one_is_a_still(tmp_path):
    path = animated_image(tmp_path / "a.avif", grey_frames(5), [100, 200, 100, 300, 100])
    frames, times_s, period_s = native_frames(path)
    assert which(frames) == list(range(5))
    np.testing.assert_allclose(times_s, [0, 0.1, 0.3, 0.4, 0.7])
    assert period_s == pytest.approx(0.8)
    Image.fromarray(grey_frames(3)[2]).save(tmp_path / "still.avif")
    for fps in (8.0, 30.0, None):
        assert which(read_video(tmp_path / "still.avif", fps=fps).frames) == [2]


def test_photographs_with_a_preview_behind_them_are_stills(tmp_path):
    """Telephones append a smaller JPEG, and say so in an MPF segment; JPEGs in a row are a video."""
    image = Image.fromarray(grey_frames(1)[0])
    image.save(tmp_path / "a.mpo", "MPO", save_all=True, append_images=[image.resize((16, 12))])
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert read_video(tmp_path / "a.jpg").frames.shape == (1, 24, 32, 3)


def test_an_edit_list_cuts_the_video(tmp_path):
    """The first two of eight frames are cut away, as by a telephone's editor; times count from the third."""
    path = steady(tmp_path / "whole.mp4", 8)
    data = bytearray(path.read_bytes())
    at = data.find(b"elst")
    version, entries = data[at + 4], int.from_bytes(data[at + 8 : at + 12], "big")
    assert (version, entries) == (0, 1)
    movie_scale = int.from_bytes(data[data.find(b"mvhd") + 16 : data.find(b"mvhd") + 20], "big")
    media_scale = int.from_bytes(data[data.find(b"mdhd") + 16 : data.find(b"mdhd") + 20], "big")
    start = int.from_bytes(data[at + 16 : at + 20], "big") + media_scale // 5
    data[at + 12 : at + 20] = (6 * movie_scale // 10).to_bytes(4, "big") + start.to_bytes(4, "big")
    path.write_bytes(data)
    frames, times_s, period_s = native_frames(path)
    assert which(frames) == list(range(2, 8))
    np.testing.assert_allclose(times_s, np.arange(6) / 10, atol=1e-3)
    assert period_s == pytest.approx(0.6, abs=2e-3)


COLOURS = [(255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 200, 0), (0, 0, 255), (200, 150, 120), (255, 220, 0)]


def hdr_signal(colours: np.ndarray, transfer: int) -> np.ndarray:
    """Colours of a BT.1886 display whose white is 203 nit as R'G'B' of BT.2020, by the formulas of ITU-R BT.2100."""
    to_xyz_709 = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    to_xyz_2020 = np.array([[0.6370, 0.1446, 0.1689], [0.2627, 0.6780, 0.0593], [0.0000, 0.0281, 1.0610]])
    light = (colours / 255) ** 2.4 @ (np.linalg.inv(to_xyz_2020) @ to_xyz_709).T
    nits = np.maximum(light, 0) * 203
    if transfer == PQ:
        power = (nits / 10_000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    luminance = (nits @ [0.2627, 0.6780, 0.0593] / 1000)[..., None]
    scene = nits / 1000 * np.maximum(luminance, 1e-9) ** (1 / 1.2 - 1)
    bright = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_comes_out_in_the_colours_it_was_graded_from(transfer):
    colours = np.array([*COLOURS, (40, 40, 40), (0, 0, 0)], dtype=float)[None]
    signal = np.round(hdr_signal(colours, transfer).clip(0, 1) * 65535).astype(np.uint16)
    np.testing.assert_allclose(tone_mapped(signal, transfer), colours, atol=5)
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None, :, None].repeat(3, axis=2)
    grey = tone_mapped(ramp, transfer)[0].astype(int)
    assert (np.diff(grey[:, 0]) >= 0).all()  # brighter never comes out darker
    assert grey[0].tolist() == [0, 0, 0]
    assert grey[-1].min() >= 254


@pytest.mark.parametrize("transfer", [PQ, HLG])
@pytest.mark.parametrize("pixels", ["yuv420p10le", "yuv422p10le", "yuv444p10le"])
def test_an_hdr_file_is_read_tone_mapped_and_known_as_one(tmp_path, transfer, pixels):
    colours = np.zeros((32, 32 * len(COLOURS), 3))
    for i, colour in enumerate(COLOURS):
        colours[:, 32 * i : 32 * i + 32] = colour
    signal = hdr_signal(colours, transfer).clip(0, 1)
    luma = signal @ [0.2627, 0.6780, 0.0593]
    blue, red = (signal[..., 2] - luma) / 1.8814, (signal[..., 0] - luma) / 1.4746
    frame = av.VideoFrame(colours.shape[1], 32, pixels)
    for plane, values in zip(frame.planes, (64 + 876 * luma, 512 + 896 * blue, 512 + 896 * red), strict=True):
        rows = np.zeros((plane.height, plane.line_size // 2), dtype="<u2")
        rows[:, : plane.width] = values.round()[:: 32 // plane.height, :: colours.shape[1] // plane.width]
        plane.update(rows.tobytes())
    frame.pts, frame.time_base = 0, Fraction(1, 8)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, colours.shape[1], pixels
        context = stream.codec_context
        context.colorspace = context.color_primaries = frame.colorspace = frame.color_primaries = 9
        context.color_trc = frame.color_trc = transfer
        context.color_range = frame.color_range = 1
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert check_frames(tmp_path / "a.mkv", 8).hdr
    read = read_video(tmp_path / "a.mkv").frames[0]
    middle = np.ix_(range(4, 28), [x for x in range(colours.shape[1]) if 4 <= x % 32 < 28])  # chroma blurs edges
    np.testing.assert_allclose(read[middle], colours[middle], atol=15)  # 10 bits; gamma stretches what is dark


def test_a_still_that_is_heic_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    with pytest.raises(VideoReadError, match=r"a.jpg: is a HEIC image, which is not read; convert it"):
        read_video(tmp_path / "a.jpg")


def test_a_recording_that_begins_within_a_group_of_pictures_is_read(tmp_path):
    """Broadcasts are recorded from anywhere on: what cannot be decoded yet is left out."""
    frames = grey_frames(24, 64, 64)
    path = tmp_path / "a.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    path.write_bytes(data[: 188 * 3] + data[188 * (len(data) // 188 // 3) :])
    assert 0 < len(native_frames(path)[0]) < 24
