"""Reports of inspections as one HTML file each, which carries its pictures and charts inside it and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from PIL import Image

from cloc_mllm.data.inspection.charts import bar_chart, binned
from cloc_mllm.data.inspection.faults import SampleView
from cloc_mllm.data.inspection.leaks import LeakReport
from cloc_mllm.data.inspection.scan import SampleFiles
from cloc_mllm.data.inspection.sheet import Pen, draw_sample, open_first, title_of
from cloc_mllm.data.inspection.statistics import Inspection, fault_kind
from cloc_mllm.errors import ClocError

SHOWN_FAULTS = 2000
_WORST, _GROUPS, _IN_GROUP, _SAMPLES, _HITS = 12, 8, 4, 12, 8
_THUMBNAIL, _TITLE = 192, 300
_SCRIPT = """
for (const box of document.querySelectorAll("[data-filter]")) {
  const rows = document.querySelectorAll("#" + box.dataset.filter + " tbody tr");
  const told = document.getElementById(box.dataset.filter + "-told");
  const words = box.querySelector("input"), kind = box.querySelector("select");
  const apply = () => {
    let shown = 0;
    const wanted = words.value.toLowerCase();
    for (const row of rows) {
      const fits = (!kind.value || row.dataset.kind === kind.value) && row.textContent.toLowerCase().includes(wanted);
      row.hidden = !fits;
      shown += fits;
    }
    told.textContent = shown + " of " + rows.length + " listed";
  };
  words.addEventListener("input", apply);
  kind.addEventListener("change", apply);
  apply();
}
"""


def render(template: str, **values: Any) -> str:
    """Fill in a template; every text is escaped, and no script but the page's own filter can run.

    Args:
        template: Name of a file in this package.
        values: What it shows.
    """
    environment = Environment(
        loader=PackageLoader("cloc_mllm.data.inspection", "."),
        autoescape=select_autoescape(default_for_string=True, default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"thousands": lambda number: f"{number:,}", "percent": lambda share: f"{100 * share:.1f} %"}
    allowed = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return environment.get_template(template).render(script=Markup(_SCRIPT), script_hash=allowed, **values)


def write_page(out: str | Path, page: str) -> Path:
    """Write a page.

    Raises:
        ClocError: It cannot be written there.
    """
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClocError(f"cannot write the page: {reason}", file=out, remedy="Name a writable .html file.") from error
    return path


def write_report(inspection: Inspection, out: str | Path, command: str = "") -> Path:
    """Write the report of an inspection.

    Args:
        inspection: What was found.
        out: The file to write.
        command: The command that made it, to be shown.

    Raises:
        ClocError: It cannot be written there.
    """
    files, found, faults = inspection.scan.files, inspection.statistics, inspection.faults.faults
    worst = sorted(inspection.scan.worst.items(), key=lambda item: (-item[1], item[0]))
    listed = _listed_faults(inspection)
    spread = range(0, len(files), max(1, len(files) // _SAMPLES))
    page = render(
        "stats.html.j2",
        command=command,
        report=found,
        files=inspection.faults.files,
        samples=inspection.faults.samples,
        broken=inspection.faults.broken,
        faults=listed,
        all_faults=len(faults),
        kinds=sorted({fault["kind"] for fault in listed}),
        charts=[Markup(chart) for chart in _charts(found) if chart],
        worst=_pictures(files, [(number, f"{count} faults") for number, count in worst[: 4 * _WORST]], _WORST),
        groups=_duplicate_groups(files, found["duplicates"]),
        shown=_pictures(files, [(number, "") for number in spread], _SAMPLES),
    )
    return write_page(out, page)


def _listed_faults(inspection: Inspection) -> list[dict[str, Any]]:
    """The faults to be listed: those of the samples with most of them first, then in the order of the files."""
    faults = inspection.faults.faults
    of_sample: dict[tuple[str | None, str | None], int] = {}
    for fault in faults:
        of_sample[fault.file, fault.sample] = of_sample.get((fault.file, fault.sample), 0) + 1
    order = sorted(range(len(faults)), key=lambda k: (-of_sample[faults[k].file, faults[k].sample], k))
    rows = [(faults[k], of_sample[faults[k].file, faults[k].sample]) for k in order[:SHOWN_FAULTS]]
    return [
        {
            "file": f.file,
            "sample": f.sample,
            "problem": f.problem,
            "remedy": f.remedy,
            "kind": fault_kind(f.problem),
            "n": n,
        }
        for f, n in rows
    ]


def _charts(found: Mapping[str, Any]) -> list[str]:
    """Charts of lengths, regions and pictures; empty strings where there is nothing to draw."""
    charts = []
    for group, texts in found["texts"].items():
        unit = "tokens" if "tokens" in texts else "words"
        limit = texts.get("token_limit")
        bars, marked = binned(_whole(texts[unit]["histogram"]), limit)
        over = f", {texts['over_limit']:,} above {limit}" if limit is not None else ""
        charts.append(bar_chart(f"{group}: {unit}{over}", bars, unit, marked if limit is not None else None))
    regions = found["regions"]
    bars, _ = binned(_whole(regions["per_sample"]["histogram"]))
    charts.append(bar_chart("regions in a sample", bars, "regions"))
    charts.append(bar_chart("boxes by COCO's sizes", list(regions["coco_sizes"].items()), "area: < 32², < 96² pixels"))
    shares = [(_ends(part, percent=True), part["count"]) for part in regions["share_of_picture"]]
    charts.append(bar_chart("boxes by their share of the picture", shares, "% of the area"))
    aspects = [(_ends(part), part["count"]) for part in regions["width_by_height"]]
    charts.append(bar_chart("boxes by width / height", aspects, "width / height"))
    if "scores" in regions:
        bins = [(f"{k / 20:.2f}", count) for k, count in enumerate(regions["scores"]["histogram"])]
        charts.append(bar_chart("scores of regions", bins, "score"))
    sizes = [(f"{size['width']}×{size['height']}", size["count"]) for size in found["pictures"]["sizes"][:6]]
    charts.append(bar_chart("most frequent sizes of pictures", sizes, "width × height in pixels"))
    return charts


def _whole(histogram: Mapping[str, int]) -> dict[int, int]:
    return {int(value): count for value, count in histogram.items()}


def _ends(part: Mapping[str, Any], percent: bool = False) -> str:
    """How an interval is written below its bar."""
    low, high = (None if part[end] is None else f"{part[end] * (100 if percent else 1):g}" for end in ("from", "below"))
    return f"< {high}" if low is None else f"≥ {low}" if high is None else f"{low}–{high}"


def _duplicate_groups(files: SampleFiles, duplicates: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The largest groups of both kinds, with the first pictures of each."""
    shown = []
    for kind, title in (("exact", "the same bytes"), ("near", "looks alike")):
        for group in duplicates[kind]["listed"][:_GROUPS]:
            numbers = [
                (picture["number"], f"{picture['distance']} bits away" if k and kind == "near" else "")
                for k, picture in enumerate(group["pictures"][:_IN_GROUP])
            ]
            title_of_group = f"{group['count']} pictures, {title}"
            shown.append({"title": title_of_group, "pictures": _pictures(files, numbers, _IN_GROUP)})
    return shown


def _pictures(files: SampleFiles, numbers: Sequence[tuple[int, str]], most: int) -> list[dict[str, str]]:
    """Samples that can be drawn, as pictures for the page, each with where it stands and a remark."""
    drawn: list[dict[str, str]] = []
    for number, remark in numbers:
        if len(drawn) == most:
            break
        try:
            sample, folder = files.read(number)
            view = SampleView.of(sample, folder)
            picture = draw_sample(open_first(view, folder), view, Pen(size=11), _THUMBNAIL, caption=False)
        except ClocError:
            continue  # the table of faults has it; there is nothing to draw
        place = files.place(number)
        shown = {"data": data_uri(picture), "file": place.file or "", "sample": place.name, "remark": remark}
        drawn.append({**shown, "title": title_of(sample)[:_TITLE]})
    return drawn


def data_uri(picture: Image.Image) -> str:
    """Return a picture as the text an `<img>` takes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def write_leaks(report: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]], out: str | Path) -> Path:
    """Write the report of a search for leaks.

    Args:
        report: As `LeakReport.to_dict` returns it.
        pictures: Pairs to show, as `leak_pictures` returns them.
        out: The file to write.

    Raises:
        ClocError: It cannot be written there.
    """
    hits = report["pictures"]["hits"][:SHOWN_FAULTS]
    kinds = sorted({hit["kind"] for hit in hits})
    return write_page(out, render("leaks.html.j2", report=report, hits=hits, kinds=kinds, pairs=pictures))


def leak_pictures(report: LeakReport) -> list[dict[str, Any]]:
    """Leaked pictures beside the training pictures they are, as far as they can be drawn; each kind of leak first once.

    Args:
        report: What leaked.
    """
    pairs = [(each, hit) for each in report.sets for hit in each.pictures]
    of_kind: dict[str, int] = {}
    ranks = []
    for _, hit in pairs:
        of_kind[hit.kind] = of_kind.get(hit.kind, 0) + 1
        ranks.append(of_kind[hit.kind])
    shown = []
    for k in sorted(range(len(pairs)), key=lambda k: (ranks[k], k))[:_HITS]:
        each, hit = pairs[k]
        here = each.scan.pictures.first_sample(hit.evaluation)
        there = report.training.pictures.first_sample(hit.training)
        pictures = _pictures(each.scan.files, [(here, "evaluation")], 1)
        pictures += _pictures(report.training.files, [(there, "training")], 1)
        away = "" if hit.distance is None else f", {hit.distance} bits apart"
        shown.append({"title": f"{hit.kind}{away}", "pictures": pictures})
    return shown
