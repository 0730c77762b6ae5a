"""Data sets of clips: their index and captions, bad files among them, key frames, contact sheets, drawn clips."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from dicode.data.index import check_files, is_validation, read_index
from dicode.tokenizer.joins import key_frame_indices
from dicode.video.io import VideoReadError, read_video
from dicode.video.sheet import contact_sheet, save_sheet
from dicode.video.synthetic import draw_clip, write_dataset


def test_jsonl_index_keeps_lines_captions_and_all_else(tmp_path, caplog):
    rows = [
        {"file": "videos/a.gif", "caption": " ice  vortex\n", "expanded": "a vortex of ice", "lab": "x1", "take": 3},
        {"file": "videos/b.mp4", "caption": None},
    ]
    (tmp_path / "captions.jsonl").write_text(json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1]) + "\n")
    with caplog.at_level(logging.WARNING):
        first, second = read_index(tmp_path)
    assert first.path == tmp_path / "videos" / "a.gif"
    assert first.captions == ("ice vortex", "a vortex of ice")
    assert first.extra == {"lab": "x1", "take": 3}
    assert (second.caption, second.captions, second.line) == ("", (), 2)  # the blank line counts
    assert "1 of 2 clips have no caption" in caplog.text
    assert read_index(tmp_path / "captions.jsonl") == [first, second]


def test_csv_and_text_files_serve_as_captions(tmp_path):
    (tmp_path / "list.csv").write_text(
        '﻿file,caption,scene\na.mp4,"fire, then ice",kitchen\nb.mp4,,\n', encoding="utf-8"
    )
    first, second = read_index(tmp_path / "list.csv")
    assert (first.path.name, first.caption, first.extra) == ("a.mp4", "fire, then ice", {"scene": "kitchen"})
    assert (second.caption, second.line) == ("", 1)
    loose = tmp_path / "loose"
    (loose / "sub").mkdir(parents=True)
    for name in ("clip10.mp4", "clip9.gif", "sub/clip1.webm", "notes.pdf"):
        (loose / name).touch()
    (loose / "clip9.txt").write_text("a fox\n")
    found = [(record.path.name, record.caption, record.line) for record in read_index(loose)]
    assert found == [("clip9.gif", "a fox", 0), ("clip10.mp4", "", 1), ("clip1.webm", "", 2)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("captions.jsonl", '{"file": "a.mp4"}\n{"file"', "line 2: not JSON"),
        ("captions.jsonl", "[1]", "line 1: expected an object"),
        ("captions.jsonl", '{"caption": "fire"}', "expected text for 'file', got None"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": 3}', "expected text for 'caption', got 3"),
        ("captions.jsonl", "\n", "found no clip"),
        ("captions.csv", "name,text\na,b\n", "columns file and caption"),
        ("captions.jsonl", b'{"file": "a.mp4"}\n{"file": "b.mp4", "caption": "caf\xe9"}', "line 2: not JSON in UTF-8"),
        ("captions.csv", b"file,caption\na.mp4,caf\xe9\n", "not UTF-8"),
        ("captions.xml", "<a/>", "expected a .jsonl, .csv or .tar file"),
    ],
)
def test_a_damaged_index_is_refused_by_file_and_line(tmp_path, name, text, said):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(VideoReadError, match=said) as caught:
        read_index(tmp_path / name)
    assert name in str(caught.value)


def test_the_validation_split_is_one_lab_of_droid_and_every_fifteenth_line_elsewhere(tmp_path):
    for folder in ("droid", "other"):
        (tmp_path / folder).mkdir()
        rows = [{"file": f"{i}.mp4", "caption": "x", "lab": "f147f077" if i in (2, 15) else "z"} for i in range(31)]
        (tmp_path / folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    chosen = {f: [r.line for r in read_index(tmp_path / f) if is_validation(r)] for f in ("droid", "other")}
    assert chosen == {"droid": [2, 15], "other": [0, 15, 30]}


def test_checking_goes_on_after_bad_files(tmp_path):
    write_dataset(tmp_path, 4)
    records = read_index(tmp_path)
    records[0].path.write_bytes(b"")
    records[2].path.unlink()
    good, bad = check_files(records)
    assert good == [records[1], records[3]]
    assert [file.record for file in bad] == [records[0], records[2]]
    assert "empty file" in bad[0].reason
    assert "no such file" in bad[1].reason
    assert len(check_files(records[1:2], min_frames=99)[1]) == 1


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


def test_drawn_clips_show_what_their_caption_says():
    clips = [draw_clip(seed, 8, 32) for seed in range(72)]
    assert len({caption for _, caption in clips}) == 72
    steps = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
    for frames, caption in clips:
        drawn = (frames != 255).any(axis=-1)
        centres = np.array([np.argwhere(mask).mean(axis=0) for mask in drawn])
        moved = (centres[-1] - centres[0]) / 32
        np.testing.assert_allclose(moved, 0.6 * np.array(steps[caption.split()[-1]]), atol=0.04)
    np.testing.assert_array_equal(draw_clip(5)[0], draw_clip(5)[0])


def test_a_written_data_set_reads_back_as_drawn(tmp_path):
    records = read_index(write_dataset(tmp_path / "toy", 3, num_frames=9, size=24, seed=40))
    for record in records:
        frames, caption = draw_clip(40 + record.line, 9, 24)
        read = read_video(record.path).frames
        assert (record.caption, read.shape) == (caption, frames.shape)
        assert np.abs(read.astype(int) - frames).mean() < 4
