"""What the benchmarks share: every measurement in a process of its own, a table on the screen, a JSON file beside it.

A benchmark script calls itself: with `--case` it measures one case and prints one line of JSON; without, it starts
itself once for each case, one after the other, so that no case profits from, or pays for, what another left in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also runs from a clone that is not installed

MIB = 2**20


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark takes.

    Args:
        description: The script's docstring.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each case; the median counts")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a case may take")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser


def machine() -> dict[str, Any]:
    """Return what the figures were measured on: ratios carry over to other machines, absolute figures do not."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Time some work and take the most memory it held beyond what was held before.

    Args:
        work: What to do; its inputs exist already.
        repeats: How often it is timed; the median counts.

    Returns:
        `seconds`, the median, and `peak_mib`, on a GPU of its allocator, else of the process's resident set.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else _largest_resident()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    after = torch.cuda.max_memory_allocated() if on_gpu else _largest_resident()
    return {"seconds": sorted(seconds)[len(seconds) // 2], "peak_mib": (after - before) / MIB}


def _largest_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_case(script: str, case: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Measure one case in a process of its own.

    Args:
        script: The benchmark's own file.
        case: Passed to it as JSON after `--case`.
        timeout: Seconds.

    Returns:
        The case and what it measured; or, if it failed, the case and `failed`, the reason.
    """
    command = [sys.executable, script, "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {**case, "failed": f"not done after {timeout:g} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {**case, "failed": lines[-1] if done.returncode > 0 else f"killed by signal {-done.returncode}"}
    return {**case, **json.loads(done.stdout.strip().splitlines()[-1])}


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells as a Markdown table, the first row as its head."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\n".join(lines))


def write_report(out: Path, name: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write what was measured, and where, as `OUT/NAME.json`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": machine(), "results": list(results)}, indent=1) + "\n")
    print(f"\n{path}")
