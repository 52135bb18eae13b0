"""Where steps run: what a cluster is shared out into, and what an actor does with the rows that it is handed."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.engines.local import default_workers
from cloc_mllm.labeling.engines.ray_data import StepsActor, pools
from cloc_mllm.labeling.files import STATE
from cloc_mllm.labeling.pipeline import label
from cloc_mllm.labeling.shard_output import done_marker, read_marker
from cloc_mllm.labeling.sources import SourcePlan, plan_source
from cloc_mllm.labeling.steps import STEPS, Job
from tests.builders_labels import small_config, write_pictures


def job(*overrides: str) -> Job:
    config = small_config("photos", Path("out"), "workers=null", *overrides)
    return Job(config, SourcePlan("photos", ("list.jsonl",), (100,), "0"))


def test_without_gpus_there_is_one_pool() -> None:
    (pool,) = pools(job(), {"CPU": 8.0})
    assert (pool.steps, pool.actors, pool.gpus) == (STEPS, 4, 0)


def test_steps_that_take_a_gpu_have_pools_of_their_own() -> None:
    found = pools(job("phrases.gpus=0"), {"CPU": 64.0, "GPU": 8.0})
    assert [pool.steps for pool in found] == [(step,) for step in STEPS]
    assert [pool.gpus for pool in found] == [0, 0.5, 0, 0.5, 0]
    assert {pool.actors for pool in found} == {8}
    found = pools(job("phrases.gpus=0", "captioner.gpus=0", "detector.gpus=1"), {"CPU": 64.0, "GPU": 8.0})
    assert [pool.steps for pool in found] == [STEPS[:3], ("detections",), ("shards",)]


@given(
    st.integers(1, 300),
    st.integers(0, 16),
    st.sampled_from([0, 0.25, 0.5, 1]),
    st.sampled_from([0, 0.25, 0.5, 1]),
    st.sampled_from(["null", "1", "3"]),
)
def test_all_pools_fit_at_once_or_are_refused(cores: int, gpus: int, captioner: float, detector: float, n: str) -> None:
    options = (f"captioner.gpus={captioner}", "phrases.gpus=0", f"detector.gpus={detector}", f"workers={n}")
    try:
        found = pools(job(*options), {"CPU": float(cores), "GPU": float(gpus)})
    except ClocError:
        assert gpus
        assert (gpus if n == "null" else int(n)) * (captioner + detector) > gpus
        return
    assert tuple(step for pool in found for step in pool.steps) == STEPS
    assert sum(pool.actors * pool.cpus for pool in found) < cores
    assert sum(pool.actors * pool.gpus for pool in found) <= gpus


def test_actors_hand_on_keys_and_errors(tmp_path: Path) -> None:
    """Two actors in a row are the whole; an error of the first one comes out of the second as it was raised."""
    pictures = write_pictures(tmp_path / "pictures", 10)
    label(small_config(pictures, tmp_path / "whole"), progress=False)
    config = small_config(pictures, tmp_path / "out")
    work = Job(config, plan_source(str(pictures), tmp_path / "out" / STATE))
    first, second = StepsActor(work, STEPS[:2], "cpu"), StepsActor(work, STEPS[2:], "cpu")
    rows = {"shard": [2, 0], "keys": ["{}", "{}"], "error": ["", ""]}
    done = second(first(rows))
    assert done["shard"] == [2, 0]
    assert done["error"] == ["", ""]
    for shard in (0, 2):
        folders = (tmp_path / "out", tmp_path / "whole")
        own, whole = (read_marker(done_marker(folder / STATE, shard), folder) for folder in folders)
        assert own is not None
        assert whole is not None
        assert json.loads(done["keys"][0]) == own["keys"] == whole["keys"]
        for name in own["files"]:
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (pictures / "a" / "0004.jpg").write_bytes(b"nothing")
    spoilt = Job(config.model_copy(update={"out": str(tmp_path / "bad")}), work.plan)
    broken = StepsActor(spoilt, STEPS[2:], "cpu")(
        StepsActor(spoilt, STEPS[:2], "cpu")({k: v[:] for k, v in rows.items()})
    )
    errors = [json.loads(text) for text in broken["error"] if text]
    assert len(errors) == 1
    assert "0004.jpg" in errors[0]["sample"]
    assert "not a picture" in str(ClocError(**errors[0]))


def test_workers_of_this_machine() -> None:
    assert default_workers(["cuda:0", "cuda:1"]) == 2
    assert default_workers(["cpu"]) >= 1
