"""Pages of inspections: nothing in a data set can run or load, and what was found is there; charts; contact sheets."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.apps.cli import main
from cloc_mllm.data.inspection.charts import bar_chart, binned
from cloc_mllm.data.inspection.faults import SampleView
from cloc_mllm.data.inspection.page import write_report
from cloc_mllm.data.inspection.sheet import Pen, draw_sample, draw_sheet
from cloc_mllm.data.inspection.statistics import inspect_data
from cloc_mllm.data.inspection.summary import printable, summary_lines
from cloc_mllm.errors import ClocError
from tests.unit.data.inspection.sets import region_samples, smooth_picture, talk, write_lines

EVIL = "</script><script>alert('caption')</script><img src=x onerror=alert(1)>\" onload=\"alert(2)"


class Page(HTMLParser):
    """The elements of a page as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.shown: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and not self.scripts[-1]:
            self.scripts[-1] = data
        else:
            self.shown.append(data)


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A set whose every text, name, id and key wants to run."""
    samples = region_samples(tmp_path, 5)
    samples[0] |= {
        "id": EVIL,
        "caption": EVIL,
        "source": EVIL,
        EVIL: 1,
        "regions": [{"box": [1, 2, 9, 9], "text": EVIL}],
    }
    samples[1]["image"] = f"{EVIL.replace('/', '')}.png"
    samples[2]["regions"] = [{"box": [1, 2, 9, 9], "text": EVIL}] * 2
    samples[3]["image"] = samples[4]["image"]
    smooth_picture(4).resize((128, 96)).save(tmp_path / "near.png")
    near = {"id": EVIL, "image": "near.png", "caption": EVIL, "regions": []}
    talks = [{**talk(EVIL, "p0.png", EVIL, EVIL), "task": EVIL}, {**talk("b", "p0.png"), EVIL: 2}]
    write_lines(tmp_path / "talks.jsonl", talks)
    write_lines(tmp_path / "regions.jsonl", [*samples, near, f"{{{EVIL}"])
    return tmp_path


def check_harmless(page: Page) -> None:
    (script,) = page.scripts
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    assert "alert" not in script
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "link", "base", "form", "a")
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:image/jpeg;base64,") or tag != "img"
        assert "src" not in attributes or tag == "img"


def test_nothing_in_a_set_runs_in_its_report(evil: Path, tmp_path: Path) -> None:
    found = inspect_data(evil, progress=False)
    page = Page(write_report(found, tmp_path / "out" / "report.html", f"cloc-mllm {EVIL}").read_text("utf-8"))
    check_harmless(page)
    shown = "".join(page.shown)
    assert shown.count(EVIL) > 10
    for fault in found.faults.faults:
        assert fault.problem in shown
        assert fault.remedy in shown
    rows = [attributes for tag, attributes in page.tags if tag == "tr" and "data-kind" in attributes]
    assert len(rows) == len(found.faults.faults)
    options = [a for tag, a in page.tags if tag == "option"]
    assert len(options) == 1 + len({row["data-kind"] for row in rows})


def test_the_worst_samples_come_first(tmp_path: Path) -> None:
    samples = region_samples(tmp_path, 4)
    samples[1]["regions"] = [{"box": [1, 2, 900, 9], "text": ""}]
    samples[3]["regions"] = [{"box": [1, 2, 900, 9], "text": "a"}] * 4
    write_lines(tmp_path / "regions.jsonl", samples)
    text = write_report(inspect_data(tmp_path, progress=False), tmp_path / "a.html").read_text("utf-8")
    rows = re.findall(r"<tr data-kind.*?<td>(.*?)</td>", text)
    assert rows == ["s3 (line 4)"] * 4 + ["s1 (line 2)"] * 2
    worst = text.index("The worst that can be drawn")
    assert worst < text.index("4 faults", worst) < text.index("2 faults", worst)


def test_nothing_in_a_set_runs_in_the_report_of_leaks(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = evil / "leaks.html"
    words = ["data", "leaks", str(evil), "--eval", str(evil / "regions.jsonl"), "--min-words", "1", "--html", str(out)]
    assert main([*words, "--report-only"]) == 0
    page = Page(out.read_text("utf-8"))
    check_harmless(page)
    assert "".join(page.shown).count(EVIL) > 3
    assert "alert" in capsys.readouterr().out


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    write_lines(tmp_path / "regions.jsonl", region_samples(tmp_path, 1))
    with pytest.raises(ClocError, match="cannot write the page"):
        write_report(inspect_data(tmp_path, progress=False), tmp_path / "regions.jsonl" / "a.html")


def test_lines_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    samples = region_samples(tmp_path, 1)
    samples[0]["caption"] = "\x1b[2J\u202e\ud800 "
    write_lines(tmp_path / "regions.jsonl", samples)
    lines = summary_lines(inspect_data(tmp_path, progress=False).to_dict())
    assert all(line.isprintable() for line in lines)
    assert any("\\x1b[2J\\u202e\\ud800" in line for line in lines)
    assert printable("a\tb é") == "a\\tb é"


@given(
    st.lists(
        st.tuples(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])), st.integers(0, 9)),
        max_size=40,
    )
)
def test_charts_are_sound_and_show_every_bar(bars: list[tuple[str, int]]) -> None:
    chart = bar_chart("<title> & more", bars, "<x>", marked_from=2)
    if not any(count for _, count in bars):
        assert chart == ""
        return
    root = ElementTree.fromstring(chart)
    drawn = [e for e in root if e.tag == "rect"]
    assert [e[0].text for e in drawn] == [f"{label}: {count}" for label, count in bars]
    heights = [float(e.attrib["height"]) for e in drawn]
    most = max(count for _, count in bars)
    assert all(h == pytest.approx(max(heights) * n / most, abs=0.11) for h, (_, n) in zip(heights, bars, strict=True))
    assert [e.attrib["class"] for e in drawn] == ["bar"] * len(bars[:2]) + ["bar over"] * len(bars[2:])


@given(st.dictionaries(st.integers(0, 5000), st.integers(1, 50)), st.one_of(st.none(), st.integers(0, 600)))
def test_bars_hold_every_number_and_end_at_the_limit(histogram: dict[int, int], edge: int | None) -> None:
    bars, marked = binned(histogram, edge)
    assert sum(count for _, count in bars) == sum(histogram.values())
    if edge is not None and histogram and max(histogram) > edge:
        assert sum(count for _, count in bars[marked:]) == sum(n for value, n in histogram.items() if value > edge)


# -- sheets -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawable(tmp_path: Path) -> Path:
    samples = region_samples(tmp_path, 30)
    write_lines(tmp_path / "regions.jsonl", samples)
    return tmp_path


def test_a_seed_decides_what_is_drawn(drawable: Path) -> None:
    sheets = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert draw_sheet(drawable, drawable / f"{name}.png", 4, seed=seed) == 4
        sheets.append((drawable / f"{name}.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_ids_are_drawn_in_their_order(drawable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "draw", str(drawable), "--cell", "64", "--out", str(drawable / "sheet.png")]
    assert main([*words, "--ids", "s7", "s3"]) == 0
    sheet = Image.open(drawable / "sheet.png")
    for k, seed in enumerate((7, 3)):
        shown = sheet.crop((6 + k * 70, 6 + 30, 70 + k * 70, 6 + 48))
        wanted = smooth_picture(seed).crop((0, 30, 64, 48))
        assert shown.convert("RGB").tobytes() == wanted.tobytes()
    assert main([*words, "--ids", "s7", "none"]) == 2
    assert "sample 'none': no sample has this id" in capsys.readouterr().err
    assert main([*words, "--n", "0"]) == 2
    assert main([*words, "--font", str(drawable / "regions.jsonl")]) == 2
    assert "cannot be read as a font" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["猫がいる", "قطة", "\U0001f408 \ud83d", "a\x00b\x1b\n\u202e", "", " ", "x" * 5000, "ﷺ" * 40]
)
def test_any_text_can_be_drawn(text: str) -> None:
    picture = smooth_picture(1)
    sample: dict[str, Any] = {"image": "a", "caption": text, "regions": [{"box": [60, 40, 64, 48], "text": text}] * 3}
    drawn = draw_sample(picture, SampleView.of(sample, None), Pen(), 128)
    assert drawn.width == 128


def test_what_the_font_lacks_is_told() -> None:
    pen = Pen()
    assert pen.drawable("a cat") == ("a cat", 0)
    assert pen.drawable("né") in (("né", 0), ("ne", 0))
    shown, missing = pen.drawable("a 猫猫")
    assert missing == 2
    assert pen.drawable(shown)[1] == 0
    sample = {"image": "a", "caption": "猫", "regions": []}
    plain = draw_sample(smooth_picture(1), SampleView.of({**sample, "caption": "?"}, None), pen, 256)
    told = draw_sample(smooth_picture(1), SampleView.of(sample, None), pen, 256)
    below = (0, 256 + 1 + pen.line, 256, 256 + 1 + 2 * pen.line)
    assert plain.crop(below).getextrema() == ((255, 255),) * 3
    assert told.crop(below).getextrema() != ((255, 255),) * 3


@given(st.text(max_size=80), st.integers(30, 200), st.integers(1, 3))
def test_lines_fit(text: str, width: int, lines: int) -> None:
    pen = Pen()
    shown = pen.drawable(text)[0]
    found = pen.wrapped(shown, width, lines)
    assert len(found) <= lines
    assert all(pen.width(line) <= width for line in found)
    if "..." not in "".join(found):
        assert " ".join(found).split() == shown.split()


def test_a_page_is_one_file_that_loads_nothing(drawable: Path) -> None:
    text = write_report(inspect_data(drawable, progress=False), drawable / "a.html").read_text("utf-8")
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?!data:)\w", text)
    assert not re.search(r"url\(|@import|https?://", html.unescape(text))
    assert "prefers-color-scheme: dark" in text
