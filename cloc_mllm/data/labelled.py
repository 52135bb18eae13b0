"""Images with one class each, for zero-shot classification: a folder of folders, or samples with a `label`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from cloc_mllm.data.dataset import open_image
from cloc_mllm.data.readers import open_samples, sample_name
from cloc_mllm.errors import ClocError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
SAMPLES_FILE = "labels.jsonl"


class LabelledImages:
    """Images and their classes.

    Args:
        path: A folder with one folder of pictures a class, whose names are the class names (`_` read as a space); a
            .jsonl, .json or .parquet file of samples with `image` and `label`; or a folder that holds `labels.jsonl`.
        most: How many images to take, spread evenly over all, which are in order of their classes; ``None``: all.

    Attributes:
        classes: Names of the classes, sorted.
        labels: The class of each image, as its place in `classes`.
        ids: What tells each image from the others: where it lies below `path`, or its file and sample.
        total: How many images there are, taken or not.

    Raises:
        ClocError: There is nothing there, a class has no picture, or a sample names no class.
    """

    def __init__(self, path: str | Path, most: int | None = None) -> None:
        self.path = Path(path)
        folders = sorted(p for p in self.path.iterdir() if p.is_dir()) if self.path.is_dir() else []
        of_folders = bool(folders) and not (self.path / SAMPLES_FILE).is_file()
        named = self._of_folders(folders) if of_folders else self._of_samples()
        self.classes = sorted({name for name, *_ in named})
        if len(self.classes) < 2:
            raise ClocError(f"holds {len(self.classes)} classes: at least two are needed to tell apart", file=self.path)
        number = {name: k for k, name in enumerate(self.classes)}
        named.sort(key=lambda item: item[0])
        self.total = len(named)
        count = len(named) if most is None else min(most, len(named))
        taken = [named[k * len(named) // count] for k in range(count)]
        self.labels = [number[name] for name, *_ in taken]
        self._images = [rest for _, *rest in taken]
        self.ids = [
            str(Path(file).relative_to(self.path)) if of_folders else f"{Path(file).name}: {sample}"
            for *_, file, sample in taken
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:
        """The RGB image at an index; `ClocError` if it cannot be read."""
        image, folder, file, sample = self._images[index]
        return open_image(image, folder, file, sample)

    def _of_folders(self, folders: list[Path]) -> list[tuple]:
        named: list[tuple] = []
        for folder in folders:
            pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not pictures:
                raise ClocError("this class has no picture", file=folder, remedy="Remove the folder, or fill it.")
            name = folder.name.replace("_", " ")
            named += [(name, picture.name, picture.parent, str(picture), picture.stem) for picture in pictures]
        return named

    def _of_samples(self) -> list[tuple]:
        source = open_samples(self.path, SAMPLES_FILE)
        named: list[tuple] = []
        for index in range(len(source)):
            raw = source[index]
            file, place = source.where(index)
            name = sample_name(raw, place)
            label = raw.get("label")
            if not isinstance(label, str) or not label.strip():
                raise ClocError(
                    f"the class of a sample is {label!r}", file=file, sample=name, remedy="Give it 'label', a name."
                )
            named.append((label, raw.get("image"), source.folder(index), file, name))
        return named
