"""Data sets of clips: lists of every kind, notes, folders as people have them, what is refused, and the split."""

import csv
import io
import json
import logging
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from synthetic import write_dataset
from upath import UPath

from dicode.data import lists
from dicode.data.index import check_files, read_data, read_index
from dicode.data.prompts import read_prompts
from dicode.data.records import ClipRecord, validation_split
from dicode.video.read import VideoReadError, native_frames


def put(folder: Path, files: dict[str, str | bytes | None]) -> Path:
    """Write files; None: an empty one."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content or b"")
    return folder


def shown(folder: Path) -> dict[str, tuple[str, ...]]:
    return {record.file: record.captions for record in read_index(folder)}


def test_jsonl_index_keeps_captions_and_all_else(tmp_path, caplog):
    rows = [
        {"file": "videos/a.gif", "caption": " ice  vortex\n", "expanded": "a vortex of ice", "lab": "x1", "take": 3},
        {"file": "videos/b.mp4", "caption": None, "score": float("nan")},
        {"file": "c.mp4", "caption": ["x", "y", "x"], "start_s": "1.5", "end_s": 2, "validation": 1.0},
    ]
    (tmp_path / "captions.jsonl").write_text("﻿" + json.dumps(rows[0]) + "\n\n" + "\n".join(map(json.dumps, rows[1:])))
    with caplog.at_level(logging.WARNING):
        first, second, third = read_index(tmp_path)
    assert first.path == tmp_path / "videos" / "a.gif"
    assert first.captions == ("ice vortex", "a vortex of ice")
    assert first.extra == {"lab": "x1", "take": 3}
    assert (second.captions, second.extra, second.validation) == ((), {"score": None}, None)
    assert (third.captions, third.start_s, third.end_s, third.validation) == (("x", "y"), 1.5, 2.0, True)
    assert "1 of 3 clips have no caption" in caplog.text
    assert read_index(tmp_path / "captions.jsonl") == [first, second, third]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", '﻿file,caption,scene\n"a.mp4","fire, then ""ice""",hall\n\nb.mp4,,\n'),
        ("captions.tsv", 'file_name\ttext\tscene\na.mp4\t"fire, then ""ice"""\thall\nb.mp4\t\t\n'),
        ("metadata.csv", 'video,prompt,scene\r\na.mp4,"fire, then ""ice""",hall\r\nb.mp4,"",\r\n'),
        (
            "metadata.jsonl",
            '{"file_name": "a.mp4", "text": "fire, then \\"ice\\"", "scene": "hall"}\n{"path": "b.mp4"}',
        ),
        (
            "captions.json",
            '[{"file": "a.mp4", "caption": "fire, then \\"ice\\"", "scene": "hall"}, {"video": "b.mp4"}]',
        ),
        ("captions.json", '{"a.mp4": {"prompt": ["fire, then \\"ice\\""], "scene": "hall"}, "b.mp4": ""}'),
    ],
)
def test_lists_of_every_kind_tell_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    first, second = read_index(tmp_path)
    assert (first.path, first.caption, first.extra) == (tmp_path / "a.mp4", 'fire, then "ice"', {"scene": "hall"})
    assert (second.path.name, second.captions) == ("b.mp4", ())


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("captions.jsonl", '{"file": "a.mp4"}\n{"file"', "line 2: not JSON"),
        ("captions.jsonl", "[1]", "line 1: expected an object"),
        ("captions.jsonl", '{"caption": "fire"}', "expected text for 'file'.*file_name.* got the keys caption"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": 3}', "line 1: expected text, or a list.*'caption', got 3"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": "a", "caption": "b"}', "'caption' is given twice"),
        ("captions.jsonl", '{"file": "a.mp4", "captoin": "a"}', "line 1: unknown key 'captoin'.*'caption'"),
        ("captions.jsonl", '{"file": "a.mp4", "start_s": "soon"}', "seconds from 0 on for 'start_s', got 'soon'"),
        ("captions.jsonl", '{"file": "a.mp4", "start_s": NaN}', "seconds from 0 on for 'start_s', got nan"),
        ("captions.jsonl", '{"file": "a.mp4", "start_s": 3, "end_s": 2}', "expected end_s after start_s, got 3 and 2"),
        ("captions.jsonl", '{"file": "a.mp4", "validation": "maybe"}', "expected true or false for 'validation'"),
        ("captions.jsonl", '{"file": "a.mp4", "validation": 0.5}', "expected true or false for 'validation', got 0.5"),
        ("captions.jsonl", '{"file": "a.mp4", "validation": 2}', "expected true or false for 'validation', got 2"),
        ("captions.jsonl", '{"file": "a\\u0000.mp4"}', "is no text"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": "\\ud800"}', "'caption' holds half a character"),
        ("captions.jsonl", '{"file": "a.mp4", "x": ' + "[" * 100_000 + "}", "line 1: not JSON"),
        ("captions.jsonl", '{"file": "a.mp4", "x": 1' + "0" * 5000 + "}", "line 1: not JSON"),
        ("captions.jsonl", "\n", "found no clip"),
        ("captions.jsonl", b'{"file": "a.mp4"}\n{"file": "b.mp4", "caption": "caf\xe9"}', "line 2: not UTF-8"),
        ("captions.jsonl", '{"file": "a.mp4"}'.encode("utf-16-le"), "line 1: holds a NUL character, as UTF-16"),
        ("captions.csv", "name,words\na,b\n", "expected columns file and caption, got"),
        ("captions.csv", "name,text\na,b\n", "line 2: expected text for 'file' .*got the keys name, text"),
        ("captions.jsonl", '{"video": {"bytes": "' + "x" * 9999 + '"}}', "expected text for 'file' .{,250}$"),
        ("captions.jsonl", '{"file": "nosuch://a/b.mp4"}', "line 1: 'nosuch://a/b.mp4' names no file"),
        ("captions.csv", "file;caption\na.mp4;b\n", "separated by ',', not by ';'"),
        ("captions.csv", "file,caption,caption\na.mp4,b,c\n", "line 1: the column 'caption' is there twice"),
        ("captions.csv", b"file,caption\na.mp4,caf\xe9\n", "line 2: not UTF-8"),
        ("captions.csv", "file,caption\na.mp4,red, round fire\n", "line 2: more values than columns .3, 2."),
        ("captions.csv", "file,caption\nb.mp4,x\na.mp4\n", "line 3: fewer values than columns .1, 2."),
        ("captions.csv", 'file,caption\na.mp4,"a red fire\nb.mp4,blue ice\n', "line 2: not CSV .*left open"),
        ("captions.csv", 'file,caption\na.mp4,"a red fire\nb.mp4,blue ice"\n', "line 2: .*holds a row .*left open"),
        ("captions.csv", 'file,caption\na.mp4,"a red fire\nb.mp4,"blue ice"\n', "line 2: not CSV"),
        ("captions.csv", 'file,caption\na.mp4, "a red fire"\n', "line 2: a space before a double quote"),
        ("captions.csv", 'file,caption\na.mp4, "a red, round fire"\n', "line 2: more values than columns"),
        ("captions.csv", 'caption,file\n"red fire,a.mp4\nblue ice",b.mp4\n', "line 2: .*holds a row .'red fire,a.mp4'"),
        ("captions.tsv", 'text\tfile\tx\n"red\tA.GIF\t1\nice\tb.mp4\t2\nblue"\tc.mp4\t3\n', "holds a row .'red.tA.GIF"),
        ("captions.csv", "File,Caption\na.mp4,red\n", "expected columns file and caption, got .*did you mean 'file'"),
        ("captions.csv", "File,caption\na.mp4,red\n", "got the keys File, caption .did you mean 'file'"),
        ("captions.jsonl", '{"fiel": "a.mp4", "caption": "a"}', "got the keys fiel, caption .did you mean 'file'"),
        ("captions.jsonl", '{"Video_Path": "a.mp4", "caption": "a"}', "keys Video_Path.* .did you mean 'video_path'"),
        ("captions.jsonl", '{"file": "a.mp4", "TEXT": "a"}', "line 1: unknown key 'TEXT' .did you mean 'text'"),
        ("captions.jsonl", '{"file": "a.mp4", "VALIDATION": 1}', "unknown key 'VALIDATION' .did you mean 'validation'"),
        ("captions.jsonl", '{"file": "a.mp4", "END_MS": 1}', "unknown key 'END_MS' .did you mean 'end_s'"),
        ("captions.csv", f"file,caption\na.mp4,{'x' * 200_000}\n", "line 2: not CSV .field larger"),
        ("captions.json", '{"a.mp4": 3}', "'a.mp4': expected text, or a list of texts, for 'caption', got 3"),
        ("captions.json", '[{"file": "a.mp4"}, 3]', "entry 1 .counting from 0.: expected an object"),
        ("captions.parquet", b"PAR1", "not a Parquet file"),
        ("captions.xml", "<a/>", "expected a .jsonl, .csv.* or .tar file"),
    ],
)
def test_a_damaged_list_is_refused_by_file_and_line(tmp_path, name, text, said):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(VideoReadError, match=said) as caught:
        read_index(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('file_name,text\na,"red fire\nb,blue"\n', "b,blue"),
        ('file_name,text\na,"red fire\nv/c,ice\nb,blue"\n', "v/c,ice"),
        ('text,file_name\n"red fire,a\nblue",b\n', "red fire,a"),
        ('x,text,n,file_name\n1,"red fire,2,a\n1,blue",3,b\n', "red fire,2,a"),
        ('x,file_name,n,text\n1,a,2,"red\n1,b,2,blue"\n', "1,b,2,blue"),
        ('text,file_name\n"red fire,noted\nblue",b\n', "red fire,noted"),
    ],
)
def test_a_row_of_a_folder_of_frames_that_a_quote_has_swallowed_is_found(tmp_path, text, line):
    put(tmp_path, {f"{name}/{i}.png": None for name in ("a", "b", "v/c") for i in range(2)} | {"noted": None})
    put(tmp_path, {"metadata.csv": text})
    with pytest.raises(VideoReadError, match=f"line 2: a text in quotes that holds a row .'{line}'"):
        read_index(tmp_path)


def test_a_caption_of_several_lines_with_names_in_it_is_one(tmp_path):
    put(tmp_path, {"a/0.png": None, "v/c.mp4": None, "b/0.png": None})
    texts = ["red fire, a\nv, then\nb", "a, b,\n..., b", "ice, b.mp4", "x" * 300 + ", a\n" + "y" * 300 + ", b\n, b"]
    rows = [("file_name", "text"), *(("v/c.mp4", text) for text in texts)]
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (record,) = read_index(tmp_path)
    assert record.captions == tuple(" ".join(text.split()) for text in texts)


def test_rows_of_parquet_are_bounded(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    held = pyarrow.array([f"{i}.mp4" for i in range(9)] * 300).dictionary_encode()
    table = pyarrow.table({"file": held, "caption": ["red"] * len(held)})
    parquet.write_table(table, tmp_path / "captions.parquet", row_group_size=2000)
    assert [record.file for record in read_index(tmp_path)] == [f"{i}.mp4" for i in range(9)]
    found = lists.rows(tmp_path / "captions.parquet")
    assert next(found) == (f"{tmp_path}/captions.parquet, row 0", {"file": "0.mp4", "caption": "red"})
    monkeypatch.setattr(lists, "MOST_ROWS", 2699)
    with pytest.raises(VideoReadError, match=r"captions\.parquet: expected at most 2,699 rows, got 2,700"):
        read_index(tmp_path)


def test_words_that_mean_something_elsewhere_are_named(tmp_path, caplog):
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "a.mp4", "caption": "x", "start": 3, "Split": "test", "scene": 1}'
    )
    with caplog.at_level(logging.WARNING):
        (record,) = read_index(tmp_path)
    assert (record.start_s, record.validation, record.extra["start"]) == (0.0, None, 3)
    assert "start (did you mean start_s?), Split (did you mean validation?)" in caplog.text


def test_lines_of_one_file_become_one_clip_of_one_split(tmp_path):
    rows = [{"file": f"{'./' * (i % 2)}{'ab'[i % 2]}.mp4", "caption": f"caption {i}"} for i in range(17)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = read_index(tmp_path)
    assert first.captions == tuple(f"caption {i}" for i in range(0, 17, 2)) and len(second.captions) == 8
    assert validation_split([first, second]) == [True, False]
    rows = [{"file": "a.mp4", "start_s": i, "end_s": i + 1} for i in range(9)] + [{"file": "b.mp4"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert validation_split(read_index(tmp_path)) == [True] * 9 + [False]  # spans of one video stay together
    rows = [{"file": "a.mp4", "validation": True}, {"file": "a.mp4", "caption": "x", "validation": False}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(VideoReadError, match=r"a.mp4: one line says that it is for validation, another"):
        read_index(tmp_path)


def test_the_split_is_every_fifteenth_video_whatever_the_folder_is_called_or_what_lines_say(tmp_path):
    for folder in ("droid", "other"):
        (tmp_path / folder).mkdir()
        rows = [
            {"file": f"{i}.mp4", "caption": "x"} | ({"lab": "z" if i % 4 else "q"} if folder == "droid" else {})
            for i in range(31)
        ]
        rows[1]["validation"], rows[15]["validation"] = True, False
        (tmp_path / folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = [*read_index(tmp_path / "droid"), *read_index(tmp_path / "other")]
    assert [i for i, held in enumerate(validation_split(records)) if held] == [0, 1, 30, 31, 32, 61]
    chosen = [i for i, held in enumerate(validation_split(records, ("lab", "q"))) if held]
    assert chosen == [0, 1, 4, 8, 12, 16, 20, 24, 28, 31, 32, 61]  # a set whose lines have no lab keeps the rule
    with pytest.raises(ValueError, match="--validation-by lab=w: no line has that"):
        validation_split(records, ("lab", "w"))


def test_notes_beside_clips(tmp_path):
    put(
        tmp_path,
        {"a.mp4": None, "a.txt": "﻿a  fox\n", "A2.MP4": None, "A2.TXT": "two", "b.mp4": None, "b.mp4.txt": "bee",
        "c.webm": None, "c.json": '{"fps": 25}', "c.txt": "see", "d.mov": None, "d.json": '{"caption": null, "x": 1}',
        "e.gif": None, "e.json": '{"prompt": "made", "validation": true}', "f.mp4": None, "f.txt": b"caf\xe9",
        "g.mp4": None, "g.json": "{", "h.wmv": None, "h.txt": "ü".encode("utf-16"), "notes.pdf": None,
        "videos/i.mp4": None, "labels/i.txt": "eye"},
    )  # fmt: skip
    records = {record.file: record for record in read_index(tmp_path)}
    found = {file: record.captions for file, record in records.items() if not record.fault}
    assert found == {
        "A2.MP4": ("two",), "a.mp4": ("a fox",), "b.mp4": ("bee",), "c.webm": ("see",), "d.mov": (), "e.gif": ("made",),
        "videos/i.mp4": ("eye",),
    } | ({"h.wmv": ("ü",)} if "h.wmv" in records else {})  # fmt: skip
    assert records["e.gif"].validation is True and records["d.mov"].extra == {"x": 1}
    assert (
        "f.mp4: the text beside it cannot be read" in records["f.mp4"].fault and "not UTF-8" in records["f.mp4"].fault
    )
    assert "not JSON" in records["g.mp4"].fault


def test_lists_in_subfolders_are_read_and_what_is_not_read_is_named(tmp_path):
    put(
        tmp_path,
        {"fire/captions.jsonl": '{"file": "a.mp4", "caption": "fire"}', "fire/a.mp4": None, "fire/b.mp4": None,
        "fire/metadata.csv": "file_name,text\n", "fire/more/captions.csv": "file,caption\n", "ice.mp4": None,
        "train.csv": "a,b\n", "pairs/prompts.txt": "one\ntwo\n", "pairs/videos.txt": "1.mp4\n2.mp4\n",
        "packed/x.tar.gz": b""},
    )  # fmt: skip
    found = read_data(tmp_path)
    captions = {record.file: record.captions for record in found.records if not record.fault}
    assert captions == {"fire/a.mp4": ("fire",), "ice.mp4": (), "pairs/1.mp4": ("one",), "pairs/2.mp4": ("two",)}
    assert found.lists == ["fire/captions.jsonl", "pairs/prompts.txt + videos.txt"]
    assert [name.split(" ")[0] for name in found.unread] == ["fire/metadata.csv", "fire/more/captions.csv", "train.csv"]
    assert found.left_out["videos and archives that no list names"] == 1
    (packed,) = [record.fault for record in found.records if record.fault]
    assert "x.tar.gz: a compressed archive" in packed and "unpack it" in packed
    put(tmp_path, {"pairs/prompts.txt": "one\n"})
    with pytest.raises(VideoReadError, match="expected as many lines in both, got 1 and 2"):
        read_index(tmp_path)


def test_hidden_files_and_pictures_beside_videos_are_no_clips(tmp_path):
    put(
        tmp_path,
        {"clip.mp4": None, "clip.txt": "a clip", "clip.jpg": None, "sheet.png": None, "._clip.mp4": None,
        ".thumbs/clip.jpg": None, "photos/one.jpg": None, "photos/two.png": None, "photos/two.txt": "second"},
    )  # fmt: skip
    moving = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    moving[0].save(tmp_path / "moving.webp", save_all=True, append_images=moving[1:])
    moving[0].save(tmp_path / "still.webp")
    found = read_data(tmp_path)
    assert {record.file: record.captions for record in found.records} == {
        "clip.mp4": ("a clip",),
        "moving.webp": (),
        "photos/one.jpg": (),
        "photos/two.png": ("second",),
    }
    assert found.left_out == {"hidden files and folders": 2, "images beside videos": 3}
    put(
        tmp_path,
        {"thumbs/clip.jpg": None, "clip/0001.png": None, "clip/0002.png": None, "a.rmvb": None, "list.txt": ""},
    )
    again = read_data(tmp_path)
    assert [record.file for record in again.records] == [record.file for record in found.records]
    assert again.left_out["folders with the frames of a video that is read"] == again.left_out[".rmvb files"] == 1
    assert again.left_out["images beside videos"] == 4 and again.unread == ["list.txt (no clip has that name)"]


def test_a_folder_of_numbered_images_is_one_video(tmp_path):
    for i in range(4):
        put(
            tmp_path,
            {f"v1/{i:04}.png": None, f"v2/frame{i}.jpg": None, f"photos/{i * i * 99}.png": None},
        )
    put(tmp_path, {"v1.txt": "a video", "v2/metadata.json": '{"prompt": "made"}'})
    assert shown(tmp_path / "v1") == {"v1": ()} and shown(tmp_path)["v1"] == ("a video",)
    assert shown(tmp_path)["v2"] == ("made",)
    assert len(read_index(tmp_path)) == 2 + 4  # numbers with gaps are names of pictures
    put(tmp_path / "more", {f"{i}.png": None for i in range(8)} | {"sheet.png": None})
    (mixed,) = read_index(tmp_path / "more")
    assert mixed.fault.endswith("numbered images, and others (sheet.png): move those, or list each image")


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX names and pipes")
def test_names_links_and_pipes_that_cannot_be_read_are_listed(tmp_path):
    put(tmp_path, {"ok.mp4": None})
    (tmp_path / os.fsdecode(b"bad\xff.mp4")).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    found = read_data(tmp_path)
    assert {record.file: record.fault.rpartition(": ")[2] for record in found.records} == {
        "bad\\xff.mp4": "its name is not UTF-8; rename it",
        "gone.mp4": "expected a file, got a link to nothing",
        "ok.mp4": "",
        "pipe.mp4": "expected a file, got a pipe, socket or device",
    }
    assert found.left_out == {"links to folders that are read already": 1}
    with pytest.raises(VideoReadError, match="got a pipe"):
        read_index(tmp_path / "pipe.mp4")


def archive(path: Path, members: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_keys_with_dots_keep_their_own_captions(tmp_path):
    path = archive(
        tmp_path / "dots.tar",
        {"v1.0_001.mp4": "1", "v1.0_001.txt": "a red fire", "v1.0_002.mp4": "2", "v1.0_002.txt": "blue ice",
        "a.mp4": "3", "a.json": '{"fps": 25, "caption": null}', "a.txt": "facts", "a.jpg": "x", "a.seg.png": "x",
        "b.rgb.mp4": "4", "b.meta.json": '{"caption": "by the first dot"}', "b.thumb.jpg": "x",
        "c.left.mp4": "5", "c.right.mp4": "6", "c.txt": "which?", "d.mp4": "7", "d.webm": "8", "d.txt": "dee",
        "e.jpg": "a picture", "e.txt": "alone"},
    )  # fmt: skip
    found = read_data(path)
    assert {r.file.removeprefix("dots.tar/"): r.captions for r in found.records if not r.fault} == {
        "v1.0_001.mp4": ("a red fire",),
        "v1.0_002.mp4": ("blue ice",),
        "a.mp4": ("facts",),
        "b.rgb.mp4": ("by the first dot",),
        "d.mp4": ("dee",),
        "d.webm": ("dee",),
        "e.jpg": ("alone",),
    }
    assert ["c.txt may belong to any of 2 videos" in r.fault for r in found.records if r.fault] == [True, True]
    assert found.left_out == {"images beside videos": 3}
    with found.records[1].opened() as local:
        assert local.read_bytes() == b"2"


def test_members_that_claim_more_than_an_archive_holds_are_damage(tmp_path):
    archive(tmp_path / "a.tar", {"a.mp4": "1", "b.mp4": "2"})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    for size in (b"\x80" + (2**50).to_bytes(11), b"\xff" * 11 + b"\x00", b"7" * 11 + b"\0"):
        with tarfile.open(tmp_path / "a.tar") as tar:
            at = tar.getmember("b.mp4").offset
        data[at + 124 : at + 136] = size
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        (tmp_path / "b.tar").write_bytes(data)
        good, bad = read_index(tmp_path / "b.tar")
        assert good.file == "b.tar/a.mp4" and "not a whole, uncompressed tar" in bad.fault


def test_members_of_an_archive_that_are_no_plain_files_are_clips_or_bad_files(tmp_path):
    def member(name: str, content: bytes = b"", **values: object) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        for key, value in values.items():
            setattr(entry, key, value)
        tar.addfile(entry, io.BytesIO(content))

    sparse = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**21)}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member("./a.mp4", b"1")
        member("./a.txt", b"one")
        member("b.mp4", type=tarfile.LNKTYPE, linkname="./a.mp4")
        member("b.txt", type=tarfile.LNKTYPE, linkname="a.txt")
        member("c.mp4", type=tarfile.LNKTYPE, linkname="b.mp4")
        member("d.mp4", type=tarfile.LNKTYPE, linkname="elsewhere.mp4")
        member("e.MP4", type=tarfile.SYMTYPE, linkname="a.mp4")
        member("f.gif", type=tarfile.FIFOTYPE)
        member("g.mp4", type=tarfile.CHRTYPE)
        member("h.mp4", b"1", pax_headers=sparse)
        member("i.mp4", b"2")
        member("i.txt", type=tarfile.SYMTYPE, linkname="a.txt")
        member("j.mp4/", type=tarfile.DIRTYPE)
        member("readme", type=tarfile.SYMTYPE, linkname="a.txt")
        member("x.tar", b"1")
        member("k.mp4", b"3")
    found = read_data(tmp_path)
    good = [record for record in found.records if not record.fault]
    assert [(record.path.name, record.caption) for record in good] == [
        ("a.mp4", "one"), ("b.mp4", "one"), ("c.mp4", ""), ("k.mp4", ""),
    ]  # fmt: skip
    contents = []
    for record in good:
        with record.opened() as local:
            contents.append(local.read_bytes())
    assert contents == [b"1", b"1", b"1", b"3"]
    assert {r.path.name: r.fault.removeprefix(f"{r.path}: ")[:35] for r in found.records if r.fault} == {
        "d.mp4": "a hard link to 'elsewhere.mp4', whi",
        "e.MP4": "expected a file, got a link; pack w",
        "f.gif": "expected a file, got a pipe or devi",
        "g.mp4": "expected a file, got a pipe or devi",
        "h.mp4": "a sparse file, which cannot be read",
        "i.mp4": "the text beside it cannot be read (",
    }
    assert found.left_out == {"readme files": 1, ".tar files": 1}


@pytest.mark.parametrize("name", ["n" * 300 + ".mp4", "a." + "m" * 300])
def test_a_member_with_a_long_name_is_read_as_any_other(tmp_path, name):
    archive(tmp_path / "a.tar", {"a.mp4": "1", name: "2"})
    (tmp_path / "a.jsonl").write_text("".join(f'{{"file": "memory://long/{n}"}}\n' for n in ("b.mp4", name)))
    (UPath("memory://long") / name).write_bytes(b"2")
    records = [*read_index(tmp_path / "a.tar"), *read_index(tmp_path / "a.jsonl")]
    with records[-1].opened() as copy:
        assert copy.read_bytes() == b"2" and copy.suffix == Path(name).suffix[:16]
    _, bad = check_files(records)
    assert [str(record.path.name) for record, reason in bad if "damaged or of another kind" in reason] == [
        record.path.name for record in records if record.path.name != "b.mp4"
    ]


def test_checking_goes_on_after_bad_files(tmp_path):
    write_dataset(tmp_path, 4)
    records = read_index(tmp_path)
    records[0].path.write_bytes(b"")
    records[2].path.unlink()
    good, bad = check_files(records)
    assert [record for record, _ in good] == [records[1], records[3]]
    assert good[0][1].size == "32×32" and not good[0][1].hdr
    kept, _, seconds = native_frames(records[1].path)
    assert (good[0][1].frames, good[0][1].seconds) == (len(kept), seconds)
    half_s = seconds / 2
    spans = [replace(records[1], start_s=half_s), replace(records[1], end_s=half_s), replace(records[1], start_s=1e3)]
    cut, ((_, late),) = check_files(spans)
    assert [clip.frames for _, clip in cut] == [
        len(native_frames(r.path, start_s=r.start_s, end_s=r.end_s)[0]) for r in spans[:2]
    ]
    assert "expected frames from 1000 s on" in late
    assert [record for record, _ in bad] == [records[0], records[2]]
    assert "empty file" in bad[0][1]
    assert "no such file" in bad[1][1]


def lerobot(folder: Path, version: str, **info: object) -> dict[str, object]:
    features = {
        "observation.images.top": {"dtype": "video"},
        "observation.images.wrist": {"dtype": "video"},
        "action": {"dtype": "float32"},
    }
    values = {"codebase_version": version, "chunks_size": 2, "features": features, **info}
    put(folder, {"meta/info.json": json.dumps(values)})
    return values


def test_folders_of_lerobot_give_a_clip_an_episode_and_camera(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    two, three = tmp_path / "two", tmp_path / "three"
    lerobot(two, "v2.1", video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4")
    lines = [{"episode_index": i, "tasks": [f"pick {i}"], "length": 9} for i in range(3)]
    put(two, {"meta/episodes.jsonl": "\n".join(map(json.dumps, lines))})
    records = read_index(two)
    assert len(records) == 6 and records[4].captions == ("pick 2",)
    assert records[5].file == "videos/chunk-001/observation.images.wrist/episode_000002.mp4"
    assert validation_split(records) == [True, True, False, False, False, False]
    lerobot(three, "v3.0", video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")
    rows = []
    for i in range(2):
        row: dict[str, object] = {"episode_index": i, "tasks": [f"push {i}"]}
        for camera in ("top", "wrist"):
            key = f"videos/observation.images.{camera}"
            row |= {
                f"{key}/chunk_index": 0,
                f"{key}/file_index": 1,
                f"{key}/from_timestamp": 2.5 * i,
                f"{key}/to_timestamp": 2.5 * i + 2.5,
            }
        rows.append(row)
    (three / "meta/episodes/chunk-000").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), three / "meta/episodes/chunk-000/file-000.parquet")
    records = read_index(tmp_path)[:4]
    assert [(r.caption, r.start_s, r.end_s) for r in records] == [("push 0", 0.0, 2.5)] * 2 + [("push 1", 2.5, 5.0)] * 2
    assert records[1].file == "three/videos/observation.images.wrist/chunk-000/file-001.mp4"
    assert records[1].extra == {"episode_index": 0, "camera": "observation.images.wrist"}
    lerobot(three, "v9.0", video_path="x")
    with pytest.raises(VideoReadError, match=r"expected codebase_version v2 or v3, got 'v9\.0'"):
        read_index(three)


def test_a_hundred_thousand_lines_are_read_once_each(tmp_path, monkeypatch):
    """Time is for benchmarks: what is counted is that no file is touched for a line that has its caption."""
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("file", "caption"), *((f"{i}.mp4", f"clip, {i}") for i in range(5000))])
    touched: list[object] = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: (touched.append(path), real(path, *a, **k))[1])
    assert len(read_index(tmp_path)) == 5000
    assert len(touched) < 100


def test_records_are_told_apart_by_paths_as_text(tmp_path):
    records = [ClipRecord(tmp_path / name, (), tmp_path) for name in ("a/../b.mp4", "b.mp4")]
    assert records[0].video == records[1].video


def test_a_table_of_prompts_needs_no_files(tmp_path):
    (tmp_path / "prompts.csv").write_text('prompt,style\n"a spark, red",oil\n')
    assert read_prompts(tmp_path / "prompts.csv") == [("a spark, red", {"style": "oil"})]
