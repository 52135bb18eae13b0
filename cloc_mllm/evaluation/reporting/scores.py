"""The score of every item behind a report's metrics, in `scores.npz` beside it, for comparisons between models."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.scoring.metrics import Items, Metric

SCORES_FILE = "scores.npz"
_PARTS = ("scores", "images", "classes", "weights", "keys")


def write_scores(metrics: Mapping[str, Metric], folder: str | PathLike[str]) -> Path | None:
    """Write the items of all metrics that have some; where none has, a file of earlier ones is removed.

    Returns:
        The file; None if no metric is a mean over items.
    """
    arrays = {}
    for name, metric in metrics.items():
        if metric.items is None or not len(metric.items.scores):
            continue
        arrays[f"{name}/scores"] = metric.items.scores
        arrays[f"{name}/images"] = np.array(metric.items.images)
        if metric.items.classes is not None:
            arrays[f"{name}/classes"] = np.array(metric.items.classes)
        if metric.items.weights is not None:
            arrays[f"{name}/weights"] = metric.items.weights
        if metric.items.keys is not None:
            arrays[f"{name}/keys"] = np.array(metric.items.keys)
    path = Path(folder) / SCORES_FILE
    if not arrays:
        path.unlink(missing_ok=True)
        return None
    np.savez_compressed(path, allow_pickle=False, **arrays)
    return path


def read_scores(folder: str | PathLike[str]) -> dict[str, Items]:
    """Read the items behind a report's metrics.

    Args:
        folder: The report's folder.

    Raises:
        ClocError: There is no such file, or it is not one that :func:`write_scores` wrote.
    """
    path = Path(folder) / SCORES_FILE
    remedy = "Run the suite again: cloc-mllm eval writes it beside report.json."
    try:
        with np.load(path, allow_pickle=False) as file:
            names = dict.fromkeys(key.rpartition("/")[0] for key in file.files)
            found = {
                name: {part: file[f"{name}/{part}"] for part in _PARTS if f"{name}/{part}" in file.files}
                for name in names
            }
        return {
            name: Items(
                parts["scores"],
                tuple(parts["images"].tolist()),
                tuple(parts["classes"].tolist()) if "classes" in parts else None,
                parts.get("weights"),
                tuple(parts["keys"].tolist()) if "keys" in parts else None,
            )
            for name, parts in found.items()
        }
    except FileNotFoundError as error:
        raise ClocError("there are no scores of single items to compare", file=path, remedy=remedy) from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ClocError(f"cannot read the scores of single items ({error})", file=path, remedy=remedy) from error
