"""Clips: key frames, contact sheets, data sets of drawn clips."""

import numpy as np
import pytest
from PIL import Image
from synthetic import draw_clip, write_dataset

from dicode.data.index import read_index
from dicode.tokenizer.boundaries import key_frame_indices
from dicode.video.read import read_video
from dicode.video.sheet import contact_sheet, save_sheet


def test_n_clips_have_n_plus_1_key_frames():
    assert key_frame_indices(33) == [0, 16, 32]
    assert key_frame_indices(40) == [0, 16, 32, 39]  # the last clip is shorter, and ends with its last frame
    assert key_frame_indices(32) == [0, 16, 31]  # no frame 32: the last one ends the last clip
    assert key_frame_indices(4, spacing=4) == [0, 3]
    assert key_frame_indices(2) == [0, 1]
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        key_frame_indices(1)


def test_contact_sheet_shows_first_to_last_frame_of_each_clip_in_its_row(tmp_path):
    clips = [draw_clip(seed, 16, 24)[0] for seed in range(3)]
    sheet = np.asarray(contact_sheet(clips, columns=4, scale=2))
    assert sheet.shape == (3 * 50, 4 * 50, 3)
    for row, clip in enumerate(clips):
        for column, index in enumerate([0, 5, 10, 15]):
            cell = sheet[row * 50 : row * 50 + 48, column * 50 : column * 50 + 48]
            np.testing.assert_array_equal(cell[::2, ::2], clip[index])
    save_sheet(tmp_path / "sheet.png", clips, ["one", "zwei ❄", "a caption too long for its place " * 9])
    labelled = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert [(labelled[row * 26 : row * 26 + 26, :150] < 99).any() for row in range(3)] == [True] * 3
    with pytest.raises(ValueError, match="3 clips, 1 labels"):
        contact_sheet(clips, ["one"])
    assert contact_sheet([clips[0], clips[1][:8]], columns=4).height == 2 * 26  # rows of unequal length are fine


def test_a_written_data_set_reads_back_as_drawn(tmp_path):
    records = read_index(write_dataset(tmp_path / "toy", 3, num_frames=9, size=24, seed=40))
    for number, record in enumerate(records):
        frames, caption = draw_clip(40 + number, 9, 24)
        read = read_video(record.path).frames
        assert (record.caption, read.shape) == (caption, frames.shape)
        assert np.abs(read.astype(int) - frames).mean() < 4
