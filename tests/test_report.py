"""The report is one file that needs no other, and shows each figure as its result has it."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dicode.evaluate.report import page, summary, write_report

SHEET = Image.new("RGB", (30, 20), (200, 30, 60))
RESULT: dict[str, Any] = {
    "values": {
        "text_control": {"share": 0.4375, "interval": [0.25, 0.625], "n": 32},
        "FVD-EffLite0": {
            "generated": {"value": 812.0, "interval": [700.0, 924.0], "n": 12},
            "few": {"value": 9.5, "interval": None, "n": 3},
        },
        "diversity": None,
        "token_rate": {"tokens": 8.0},
    },
    "n": 32,
    "seed": 7,
    "command": "dicode evaluate 'a<b>' --prompts 32",
    "commit": "abc123",
    "uncommitted_changes": True,
    "device": "cpu: Z80",
    "date": "2026-01-02",
    "notes": "made with one network",
}


class Reader(HTMLParser):
    """Collects text and sources, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def test_page_needs_no_other_file_and_no_script() -> None:
    text = page("tiny", {"generation": RESULT}, {"generation": SHEET})
    reader = read(text)
    assert not reader.tags & {"script", "link", "iframe"} and "@import" not in text and "url(" not in text
    (source,) = reader.sources
    head, _, data = source.partition(",")
    assert head == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == SHEET.size
    assert 'name="viewport"' in text and "prefers-color-scheme:dark" in text


def test_page_tells_each_figure_with_interval_and_how_it_was_made() -> None:
    reader = read(page("tiny", {"generation": RESULT}, {}))
    told = " ".join(reader.text.split())
    assert "text control 0.438 0.25 to 0.625 32" in told
    assert "generated 812 700 to 924 12" in told and "few 9.5 none 3" in told
    assert "diversity none" in told and "token rate, tokens 8" in told
    assert "not the network of published figures" in told and "made with one network" in told
    for fact in ("a<b>", "abc123 with uncommitted changes", "cpu: Z80", "seed 7", "2026-01-02"):
        assert fact in told


def test_summary_has_the_models_own_figures_that_are_not_blind() -> None:
    blind = {"generated": {"value": 3.0, "interval": None, "n": 12, "blind": True}}
    lines = summary({**RESULT["values"], "FVD-TinyVT": blind, "blind": {"TinyVT": "it ranks at chance"}})
    assert [line.split() for line in lines] == [
        ["text", "control", "0.438", "(0.25", "to", "0.625)"],
        ["FVD-EffLite0", "812", "(700", "to", "924)"],
    ]


def test_dots_stand_where_their_values_are() -> None:
    values = {"a": (0.0, None), "b": (5.0, [2.5, 10.0]), "c": (10.0, None)}
    scores = {name: {"value": value, "interval": interval, "n": 9} for name, (value, interval) in values.items()}
    drawn = page("tiny", {"generation": {**RESULT, "values": {"IS-X": scores}}}, {})
    at = [float(x) for x in re.findall(r'circle cx="([\d.]+)"', drawn)]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], abs=0.2)
    ((start, end),) = re.findall(r'd="M([\d.]+) \d+H([\d.]+)" stroke="var\(--mark\)"', drawn)
    assert float(start) == pytest.approx((at[0] + at[1]) / 2, abs=0.2) and float(end) == pytest.approx(at[2], abs=0.2)


def test_curve_of_drift_lies_over_its_band_of_chance() -> None:
    drift = {"distance": 8.0, "interval": None, "by_window": [4.0, 8.0], "chance": 6.0, "chance_interval": [4.0, 8.0]}
    figure = {"ratio": 1.0, "interval": None, "n": 2}
    part = {"frames": [480], "join_score": figure, "motion": figure, "drift": {"FVD-X": drift}}
    drawn = page("tiny", {"long": {**RESULT, "values": {"joins": {"chained": part}}}}, {})
    line = re.findall(r'polyline points="([^"]+)"', drawn)[0]
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    top, height = (float(re.findall(rf'rect [^>]*{name}="([\d.]+)"', drawn)[0]) for name in (" y", "\n height"))
    assert (points[0][1], points[1][1]) == (pytest.approx(top + height, abs=0.2), pytest.approx(top, abs=0.2))


def test_report_of_no_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the results of one part at least, got none"):
        write_report(tmp_path / "new" / "report.html", "tiny", {}, {})
    write_report(tmp_path / "new" / "report.html", "tiny", {"speed": RESULT}, {})
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]


def test_page_of_long_videos_says_what_its_figures_compare() -> None:
    drift = {"distance": 185.0, "interval": [159.0, 210.0], "by_window": [171.0, 185.0], "chance": 131.0}
    part = {
        "frames": [480, 480],
        "join_score": {"score": 0.75, "interval": [0.68, 0.85], "n": 2},
        "motion": {"ratio": 1.05, "interval": [0.93, 1.17], "n": 2},
        "drift": {"FVD-EffLite0": {**drift, "chance_interval": [121.0, 144.0], "clips": 40}},
    }
    cost = {"joins": "chained", "time_ratio": {"value": 0.99, "interval": [0.86, 1.07], "n": 5}}
    text = read(page("tiny", {"long": {**RESULT, "values": {"joins": {"chained": part}, "cost": cost}}}, {})).text
    told = " ".join(text.split())
    assert "drift-EffLite0 Distance of clips at the end of videos" in told
    assert "chained 185 159 to 210 2" in told  # value, interval, videos
    assert "motion_over_time Frame difference at the end of videos over that at their beginning" in told
    assert "time ratio 0.99 0.86 to 1.07 5" in told and "of real ones" not in told
