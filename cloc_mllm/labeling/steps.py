"""One step of a labelling on one shard: read what the steps before it left, do the work, leave the answers in a file.

Five steps follow each other: `source` looks at every sample and decodes its picture, `captions`, `phrases` and
`detections` call the stages, `shards` filters and writes. What a step leaves is named after a hash of what its answers
depend on, with everything upstream: another detector finds captions and phrases as they were. A file is complete when
it is there, so a step that was stopped is done again and nothing else is; an engine only decides where steps run.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import PIL
import torch
from PIL import Image

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.config import LabelConfig, StageChoice
from cloc_mllm.labeling.files import STATE, Record, read_records, write_json, write_records
from cloc_mllm.labeling.shard_output import done_marker, read_marker, write_shard
from cloc_mllm.labeling.sources import RawSample, SourcePlan, SourceReader, clean_text, problem_of, refused
from cloc_mllm.labeling.stage_options import digest_of
from cloc_mllm.labeling.stages import CAPTIONERS, DETECTORS, PHRASES, Detection, StageError, build_stage

STEPS = ("source", "captions", "phrases", "detections", "shards")
"""In order; each depends on all before it."""
MODEL_STEPS = ("captions", "phrases", "detections")
"""Those that call a stage."""

_FORMAT = 1
_HOPELESS = 32
"""A stage that has failed on so many samples and answered on none is at fault itself."""
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A labelling, as every process that works on it knows it."""

    config: LabelConfig
    plan: SourcePlan

    @property
    def state(self) -> Path:
        """Folder of what is known so far."""
        return Path(self.config.out) / STATE

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.plan.total // self.config.shard)

    def range_of(self, shard: int) -> tuple[int, int]:
        """First sample of a shard, and the one behind its last."""
        start = shard * self.config.shard
        return start, min(start + self.config.shard, self.plan.total)

    def stage_of(self, step: str) -> StageChoice:
        """What was asked of the stage that a step calls."""
        config = self.config
        return {"captions": config.captioner, "phrases": config.phrases, "detections": config.detector}[step]

    def records_file(self, step: str, key: str, shard: int) -> Path:
        """Where a step leaves its answers on a shard."""
        return self.state / f"{step}-{key}" / f"{shard:05d}.jsonl"


class Step:
    """One step, ready to be called for shard after shard; its stage is built once.

    Args:
        job: The labelling.
        name: One of `STEPS`.
        upstream: Keys of the steps before it.
        device: Where its stage's model runs.

    Attributes:
        keys: `upstream`, and this step's own key.

    Raises:
        ClocError: Its stage cannot be built.
    """

    def __init__(self, job: Job, name: str, upstream: Mapping[str, str], device: str = "cpu") -> None:
        self.job, self.name = job, name
        table = {"captions": CAPTIONERS, "phrases": PHRASES, "detections": DETECTORS}.get(name)
        self._stage: Any = None
        if table is not None:
            options = job.stage_of(name)
            self._stage = build_stage(table, options.stage, device, options.options)
        identity = self._identity()
        before = {step: upstream[step] for step in STEPS[: STEPS.index(name)]}
        self.keys = {**before, name: digest_of([name, _FORMAT, identity, before])}
        file = job.state / f"{name}-{self.keys[name]}" / "identity.json"
        if not file.exists():
            write_json(file, identity)
        self._reader = SourceReader(job.plan)
        self._counted: Counter[str] = Counter()
        self._answered = self._failed = 0

    def _identity(self) -> dict[str, Any]:
        """What this step's answers depend on, beside those of the steps before it."""
        config, plan = self.job.config, self.job.plan
        if self._stage is not None:
            # Through JSON, so that what is recorded is what was compared.
            return dict(json.loads(json.dumps(self._stage.identity(), default=str)))
        if self.name == "source":
            return {
                "fingerprint": plan.fingerprint,
                "samples": plan.total,
                "shard": config.shard,
                "pillow": PIL.__version__,
            }
        asked = config.output_options()
        return {name: asked[name] for name in ("filter", "format", "regions")}

    def __call__(self, shard: int) -> dict[str, str]:
        """Do the step on a shard, unless that has been done.

        Args:
            shard: Its number.

        Returns:
            `keys`.

        Raises:
            ClocError: A sample cannot be labelled and `on_bad_sample` is "error", or the stage fails.
        """
        if self.name == "shards":
            self._write(shard)
            return self.keys
        file = self.job.records_file(self.name, self.keys[self.name], shard)
        found = read_records(file)
        if found is None or not self._is_whole(found, shard):
            start = time.perf_counter()
            self._counted.clear()
            records = list(self._records(shard))
            seconds = round(time.perf_counter() - start, 4)
            told = {"seconds": seconds, "samples": len(records), "tally": dict(self._counted)}
            write_records(file, records, told)
        else:
            records = found[0]
        if self.job.config.on_bad_sample == "error":
            for record in records:
                if "problem" in record:
                    raise problem_of(record)
        return self.keys

    def _tally(self) -> Counter[str]:
        """What the stage has counted so far, if it counts: phrases that it was given, and could not read."""
        return Counter(getattr(self._stage, "tally", {}))

    def _is_whole(self, found: tuple[list[Record], Record], shard: int) -> bool:
        records, facts = found
        start, stop = self.job.range_of(shard)
        counted = len(records) == facts.get("samples")
        return counted and (self.name != "source" or [r.get("n") for r in records] == list(range(start, stop)))

    def _records(self, shard: int) -> Iterator[Record]:
        if self.name == "source":
            return self._look(shard)
        threads = torch.get_num_threads()
        torch.set_num_threads(self.job.config.threads)
        try:
            with torch.inference_mode():
                work = {"captions": self._caption, "phrases": self._extract, "detections": self._detect}[self.name]
                return iter(list(work(shard)))
        finally:
            torch.set_num_threads(threads)

    def good(self, step: str, shard: int) -> list[Record]:
        """What an earlier step has left on a shard, without the samples that it refused.

        Raises:
            ClocError: It has left nothing: its file was removed while this runs.
        """
        file = self.job.records_file(step, self.keys[step], shard)
        found = read_records(file)
        if found is None:
            raise ClocError(f"the {step} of shard {shard} are gone", file=file, remedy="Give the same command again.")
        return [record for record in found[0] if "problem" not in record]

    def samples(self, shard: int, numbers: Sequence[int]) -> Iterator[RawSample]:
        """Those samples of a shard, read anew, in order."""
        wanted = iter(numbers)
        following = next(wanted, None)
        for raw in self._reader.read(*self.job.range_of(shard)):
            if raw.number == following:
                yield raw
                following = next(wanted, None)

    # -- what the steps do --------------------------------------------------------------------------------------------

    def _look(self, shard: int) -> Iterator[Record]:
        """Size of every picture; what is wrong with a sample, if anything is."""
        for raw in self._reader.read(*self.job.range_of(shard)):
            try:
                size = raw.picture().size
                if self.job.config.regions == "keep":
                    raw.check_regions(size)
            except ClocError as error:
                yield refused(raw, error)
            else:
                yield {"n": raw.number, "size": list(size)}

    def _caption(self, shard: int) -> Iterator[Record]:
        numbers = [record["n"] for record in self.good("source", shard)]
        for batch in batches(self.samples(shard, numbers), self._batch_size()):
            found = self._ask(shard, batch, lambda some: (Pictures(some), [raw.checked() for raw in some]))
            for raw, texts in zip(batch, found, strict=True):
                if isinstance(texts, ClocError):
                    yield refused(raw, texts)
                elif captions := [text for text in map(clean_text, texts) if text]:
                    yield {"n": raw.number, "captions": captions}
                else:
                    remedy = "Choose a captioner that writes one (--captioner hf:MODEL), or leave it out."
                    yield refused(raw, ClocError("has no caption", file=raw.file, sample=raw.name, remedy=remedy))

    def _extract(self, shard: int) -> Iterator[Record]:
        for batch in batches(self.good("captions", shard), self._batch_size()):
            found = self._ask(shard, batch, lambda some: ([record["captions"] for record in some],))
            for record, texts in zip(batch, found, strict=True):
                if isinstance(texts, ClocError):
                    yield refused(self._raw(shard, record), texts)
                else:
                    phrases = dict.fromkeys(phrase for text in texts if (phrase := clean_text(text)))
                    yield {"n": record["n"], "phrases": list(phrases)}

    def _detect(self, shard: int) -> Iterator[Record]:
        """Pictures without a phrase are not looked at."""
        phrases = {record["n"]: record["phrases"] for record in self.good("phrases", shard)}
        records: dict[int, Record] = {number: {"n": number, "detections": []} for number in phrases}
        numbers = [number for number, texts in phrases.items() if texts]
        for batch in batches(self.samples(shard, numbers), self._batch_size()):
            found = self._ask(shard, batch, lambda some: (Pictures(some), [phrases[raw.number] for raw in some]))
            for raw, detections in zip(batch, found, strict=True):
                if isinstance(detections, ClocError):
                    records[raw.number] = refused(raw, detections)
                else:
                    records[raw.number]["detections"] = [_detection_record(detection) for detection in detections]
        yield from records.values()

    def _batch_size(self) -> int:
        return self.job.stage_of(self.name).batch_size

    def _ask(self, shard: int, batch: list[Any], arguments: Callable[[list[Any]], tuple[Any, ...]]) -> list[Any]:
        """What the stage answers on each sample of a batch; the error in its place where it fails on that one alone.

        Args:
            shard: Number of the shard, for messages.
            batch: Samples, or records of the step before.
            arguments: What the stage is called with, of some of them.

        Raises:
            ClocError: The stage fails on a sample and `on_bad_sample` is "error", or it fails whatever the sample.
        """
        before = self._tally()
        try:
            found = list(self._stage(*arguments(batch)))
        except StageError:
            raise
        except (ClocError, ValueError) as error:
            if len(batch) > 1:
                return [answer for item in batch for answer in self._ask(shard, [item], arguments)]
            return [self._failure(self._raw(shard, batch[0]), error)]
        stage = self.job.stage_of(self.name).stage
        if len(found) != len(batch):
            problem = f"'{stage}' gave {len(found)} answers on {len(batch)} pictures"
            raise StageError(problem, sample=f"shard {shard}", remedy="A stage answers for each picture.")
        self._counted += self._tally() - before
        self._answered += len(batch)
        return found

    def _failure(self, raw: RawSample, error: ClocError | ValueError) -> ClocError:
        """What is left of a sample that the stage fails on; raised if that is to stop the run, and so left nowhere."""
        said, remedy = (error.problem, error.remedy) if isinstance(error, ClocError) else (str(error), None)
        problem = f"'{self.job.stage_of(self.name).stage}' fails on it: {' '.join(said.split())}"
        found = ClocError(problem, file=raw.file, sample=raw.name, remedy=remedy)
        if self.job.config.on_bad_sample == "error":
            raise problem_of(refused(raw, found)) from error
        self._failed += 1
        if not self._answered and self._failed >= _HOPELESS:
            remedy = f"It has answered on none of {self._failed} samples, so the fault is not theirs."
            raise StageError(problem, file=raw.file, sample=raw.name, remedy=remedy) from error
        return found

    def _raw(self, shard: int, item: RawSample | Record) -> RawSample:
        return item if isinstance(item, RawSample) else next(self.samples(shard, [item["n"]]))

    def _write(self, shard: int) -> None:
        done = read_marker(done_marker(self.job.state, shard), Path(self.job.config.out))
        if done is not None and done["key"] == self.keys["shards"]:
            if done["skipped"] and self.job.config.on_bad_sample == "error":
                raise problem_of({"problem": done["skipped"][0]})
            return
        facts, refusals = {}, list[Record]()
        for step in STEPS[:-1]:
            found = read_records(self.job.records_file(step, self.keys[step], shard))
            assert found is not None  # the steps before this one have just seen to it
            facts[step] = found[1]
            refusals += [record for record in found[0] if "problem" in record]
        sizes = {record["n"]: record["size"] for record in self.good("source", shard)}
        captions = {record["n"]: record["captions"] for record in self.good("captions", shard)}
        answers = self.good("detections", shard)
        detections = {r["n"]: [_detection(found) for found in r["detections"]] for r in answers}
        inputs = (
            (raw, tuple(sizes[raw.number]), captions[raw.number], detections[raw.number])
            for raw in self.samples(shard, list(detections))
        )
        write_shard(self.job, shard, self.keys, inputs, facts, refusals)


class Pictures(Sequence[Image.Image]):
    """The pictures of a batch, each decoded when it is asked for and once; a stage that asks for none costs nothing.

    Args:
        samples: Of the batch.
    """

    def __init__(self, samples: Sequence[RawSample]) -> None:
        self._samples = samples
        self._decoded: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...

    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        place = range(len(self))[index]
        if place not in self._decoded:
            self._decoded[place] = self._samples[place].picture()
        return self._decoded[place]


def batches(items: Any, size: int) -> Iterator[list[Any]]:
    """Lists of `size` consecutive items; the last one may be shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _detection_record(detection: Detection) -> list[Any]:
    return [*(float(value) for value in detection.box), float(detection.score), clean_text(detection.text)]


def _detection(record: Sequence[Any]) -> Detection:
    x1, y1, x2, y2, score, text = record
    return Detection((x1, y1, x2, y2), text, score)
