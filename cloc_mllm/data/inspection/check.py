"""`cloc-mllm data check`: every fault of a data set in one pass.

Training stops at the first broken sample, hours in if it must; this goes on to the last one and says where each is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloc_mllm.data.inspection.scan import Scan, ScanOptions, scan
from cloc_mllm.errors import ClocError


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        files: For each file its path, kind of samples, and numbers of samples, regions and broken samples.
        faults: The faults, in the order of the files.
    """

    files: list[dict[str, Any]] = field(default_factory=list)
    faults: list[ClocError] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of samples read."""
        return sum(entry["samples"] for entry in self.files)

    @property
    def broken(self) -> int:
        """Number of samples with at least one fault."""
        return sum(entry["broken"] for entry in self.files)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        faults = [
            {"file": fault.file, "sample": fault.sample, "problem": fault.problem, "remedy": fault.remedy}
            for fault in self.faults
        ]
        return {"files": self.files, "samples": self.samples, "broken": self.broken, "faults": faults}

    def lines(self) -> list[str]:
        """The report as text, a fault or a file a line."""
        lines = [str(fault) for fault in self.faults]
        for entry in self.files:
            kind = entry["kind"] or "unreadable"
            counted = f"{entry['samples']} samples ({kind}), {entry['regions']} regions, {entry['broken']} broken"
            lines.append(f"{entry['file']}: {counted}")
        return lines


def check_data(path: str | Path, progress: bool = True, workers: int = 1) -> CheckReport:
    """Looks at every sample of a file or folder and at every image it names.

    Args:
        path: A file of samples, a folder of such files, or a folder of splits.
        progress: Show a progress bar, if standard error is a terminal.
        workers: Processes; the report is the same for any number.

    Returns:
        All faults; none of them is raised.

    Raises:
        ClocError: There is nothing to check at `path`.
    """
    return report_of(scan(path, ScanOptions(workers=workers, progress=progress)))


def report_of(found: Scan) -> CheckReport:
    """The faults that a scan found."""
    report = CheckReport()
    for file, part in zip(found.files.files, found.parts, strict=True):
        entry = {"file": str(file), "kind": part.kind, "samples": part.samples, "regions": part.regions}
        report.files.append({**entry, "broken": part.broken})
        report.faults += part.faults
    return report
