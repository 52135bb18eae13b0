"""Run folders: which checkpoint counts, what a killed run leaves, who may go on."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.apps.commands import train as command
from cloc_mllm.errors import ClocError
from cloc_mllm.training.planning.explain import explain, memory_table
from cloc_mllm.training.presets.config import plan_batch
from cloc_mllm.training.presets.options import TokenizerOptions
from cloc_mllm.training.presets.parts import PartReport
from cloc_mllm.training.pretraining.tokenizer import corpus, train_chat_tokenizer, train_text_tokenizer
from cloc_mllm.training.program import open_run_folder, parse_args
from cloc_mllm.training.running import launch
from cloc_mllm.training.running.checkpoint import (
    SAVING_FOLDER,
    RunState,
    checkpoints,
    choose_checkpoint,
    discard,
    naming_failed_writes,
    prune,
    publish,
    require_same_run,
    tidy,
)
from cloc_mllm.training.running.log import forget_after
from cloc_mllm.training.running.stream import StepStream
from cloc_mllm.training.running.trainer import ClocTrainer, _clamp_bounded_groups
from tests.builders_training import CONFIGS, write_conversations, write_regions

STATE = RunState("pretrain", 1, 2, "fp32", 8, 8, 0, 10, 100)


def checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if complete:
        STATE.write(folder)
    return folder


def test_an_unfinished_checkpoint_does_not_count(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11, complete=False)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert choose_checkpoint("latest", tmp_path, overwrite=False) == tmp_path / "checkpoint-10"
    with pytest.raises(ClocError, match="is not a complete checkpoint"):
        choose_checkpoint(str(tmp_path / "checkpoint-11"), tmp_path, overwrite=False)


def test_a_fresh_start_over_an_older_run_has_to_be_meant(tmp_path: Path) -> None:
    assert choose_checkpoint(None, tmp_path, overwrite=False) is None
    checkpoint(tmp_path, 3)
    with pytest.raises(ClocError, match="already holds checkpoint-3"):
        choose_checkpoint(None, tmp_path, overwrite=False)
    assert choose_checkpoint(None, tmp_path, overwrite=True) is None


def test_resuming_where_nothing_is_to_be_resumed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ClocError, match="no complete checkpoint to resume from"):
        choose_checkpoint("latest", tmp_path, overwrite=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_batch": 4}, "contrasted or averaged at once .* was 8 and is 4 now"),
        ({"zero": 3}, "the ZeRO stage was 1 and is 3 now"),
        ({"precision": "bf16"}, "the precision was 'fp32' and is 'bf16' now"),
        ({"samples": 99}, "the number of training samples was 100 and is 99 now"),
    ],
)
def test_what_differs_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    require_same_run(folder, STATE)
    with pytest.raises(ClocError, match=words):
        require_same_run(folder, RunState(**{**vars(STATE), **change}))


def test_micro_batches_and_processes_may_change_as_long_as_the_loss_does_not(tmp_path: Path) -> None:
    assert require_same_run(checkpoint(tmp_path, 1), RunState(**{**vars(STATE), "world_size": 4})).world_size == 2
    (tmp_path / "checkpoint-1" / "run_state.json").write_text('{"stage": "pretrain"}')
    with pytest.raises(ClocError, match="is damaged, or of another version"):
        require_same_run(tmp_path / "checkpoint-1", STATE)


def write_unseen(run: Path, step: int) -> Path:
    """What all processes have written of a checkpoint that has no name yet."""
    folder = run / SAVING_FOLDER / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(step))
    return folder


def test_a_checkpoint_appears_whole_and_old_ones_go_after_it(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        written = write_unseen(tmp_path, step)
        assert not (tmp_path / f"checkpoint-{step}").exists()
        prune(publish(written, STATE), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8"]
    assert not (tmp_path / SAVING_FOLDER).exists()


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), unique_by=lambda each: each[0]), st.integers(1, 3))
def test_pruning_counts_whole_checkpoints_only_and_never_takes_the_newest(
    others: list[tuple[int, bool]], keep: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        for step, complete in others:
            checkpoint(run, step, complete=complete)
        # The run went on from an older checkpoint, so later ones may lie beside what it writes.
        newest = publish(write_unseen(run, 5), STATE)
        prune(newest, keep)
        left = checkpoints(run)
        assert newest in left
        assert (newest / "weights").read_text() == "5"
        assert len(left) == min(keep, 1 + sum(complete and step != 5 for step, complete in others))
        unfinished = [step for step, complete in others if not complete and step != 5]
        assert all((run / f"checkpoint-{step}").exists() for step in unfinished), "not ours to remove"


def test_what_a_killed_run_left_is_cleared_away_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, 2)
    write_unseen(tmp_path, 4)
    assert tidy(tmp_path) == ["removed checkpoint-4, which an interrupted run left incomplete"]
    assert tidy(tmp_path) == []
    # Killed just before the name: nothing is missing, so nothing is lost.
    STATE.write(write_unseen(tmp_path, 6))
    assert tidy(tmp_path) == ["checkpoint-6 of an interrupted run was complete but for its name: kept"]
    # Killed while an old one is being removed.
    monkeypatch.setattr("cloc_mllm.training.running.checkpoint.shutil.rmtree", lambda *_, **__: None)
    discard(tmp_path / "checkpoint-2")
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6"]
    assert tidy(tmp_path) == ["removed checkpoint-2, which an interrupted run left incomplete"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "PytorchStreamWriter"),
    ],
)
def test_a_full_disk_names_the_folder_and_what_is_left(error: Exception, words: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    expected = f"{tmp_path}: a checkpoint could not be written .{words}.*goes on from checkpoint-2"
    with pytest.raises(ClocError, match=expected), naming_failed_writes(tmp_path):
        raise error
    with pytest.raises(RuntimeError, match="something else"), naming_failed_writes(tmp_path):
        raise RuntimeError("something else")


def test_auto_resumes_what_there_is_and_starts_where_there_is_nothing(tmp_path: Path) -> None:
    assert choose_checkpoint("auto", tmp_path, overwrite=False) is None
    checkpoint(tmp_path, 3)
    assert choose_checkpoint("auto", tmp_path, overwrite=True) == tmp_path / "checkpoint-3"


def test_lines_beyond_the_resumed_step_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": k}) + "\n" for k in range(1, 6)) + '{"step": 6, "lo')
    forget_after(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config: Any = SimpleNamespace(run=SimpleNamespace(output=str(tmp_path / "file" / "run"), overwrite=False))
    with pytest.raises(ClocError, match="cannot write here"):
        open_run_folder(config, None, launch.World(0, 0, 1, 1, True))


@pytest.mark.parametrize(
    ("argv", "overrides", "resume"),
    [
        (["--config", "x", "a=1", "--resume"], ["a=1"], "latest"),
        (["--config", "x", "--resume", "a=1", "b=2"], ["b=2", "a=1"], "latest"),
        (
            ["--local_rank=1", "--config", "x", "a=1", "--resume", "c/checkpoint-3", "b=2"],
            ["a=1", "b=2"],
            "c/checkpoint-3",
        ),
        (["--config", "x"], [], None),
    ],
)
def test_arguments_may_come_in_any_order(argv: list[str], overrides: list[str], resume: str | None) -> None:
    args = parse_args("x", argv)
    assert (sorted(args.overrides), args.resume) == (sorted(overrides), resume)


def test_the_environment_that_turns_deepspeed_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ClocError, match="silently turns DeepSpeed off"):
        launch.start({"zero_optimization": {"stage": 1}})


def test_bf16_with_a_stage_0_file_of_the_users_is_refused_too() -> None:
    with pytest.raises(ClocError, match="bf16 with ZeRO stage 0"):
        launch.start({"zero_optimization": {"stage": 0}}, "bf16")


def test_an_engine_that_is_not_deepspeed_is_refused() -> None:
    world = launch.World(0, 0, 2, 2, True)
    with pytest.raises(ClocError, match="wrapped in Linear"):
        launch.require_deepspeed(torch.nn.Linear(1, 1), world)
    engine = type("DeepSpeedEngine", (), {"world_size": 1})()
    with pytest.raises(ClocError, match="runs over 1 processes, the launcher started 2"):
        launch.require_deepspeed(engine, world)


def test_a_loss_that_is_not_finite_names_step_and_samples_and_keeps_the_batch(tmp_path: Path) -> None:
    bare: Any = ClocTrainer.__new__(ClocTrainer)
    bare.world, bare.state, bare._micro_step = launch.World(1, 1, 2, 2, True), SimpleNamespace(global_step=3), 0
    bare.stream = StepStream(list(range(40)), plan_batch(8, 2, 2), steps=5)
    bare.args = SimpleNamespace(output_dir=str(tmp_path))
    batch = {"pixel_values": torch.full((2, 3), math.nan)}
    bare.require_finite(torch.tensor(1.0), {}, batch)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ClocError, match=r"the loss is nan \(loss_clip nan\) at step 4 on process 1") as error:
        bare.require_finite(torch.tensor(math.nan), {"loss_clip": torch.tensor(math.nan)}, batch)
    kept = tmp_path / "not-finite-step4-process1.pt"
    assert str(kept) in str(error.value)
    expected = [bare.stream.locate(position)[1] for position in bare.stream.positions(3 * 2 + 1, 1)]
    saved = torch.load(kept)
    assert saved["batches"][0]["pixel_values"].isnan().all()
    assert saved["samples"] == [(index, None, None) for index in expected]
    assert f"sample '{', '.join(map(str, expected))}'" in str(error.value)


def test_temperatures_are_clamped_in_the_optimizers_own_copy() -> None:
    free, bounded = torch.nn.Parameter(torch.tensor([9.0])), torch.nn.Parameter(torch.tensor([4.6]))
    optimizer = torch.optim.AdamW(
        [{"params": [free], "bounds": None}, {"params": [bounded], "bounds": (0.0, 4.6052)}], lr=1.0, weight_decay=0.0
    )
    optimizer.register_step_post_hook(_clamp_bounded_groups)
    for parameter in (free, bounded):
        parameter.grad = torch.tensor([-1.0])
    optimizer.step()
    assert float(free.detach()) == pytest.approx(10.0)
    assert float(bounded.detach()) == pytest.approx(4.6052)


def test_tokenizers_cover_their_corpus(tmp_path: Path) -> None:
    write_regions(tmp_path, 20)
    write_conversations(tmp_path, 20)
    options = TokenizerOptions(vocab_size=330)
    text = train_text_tokenizer(corpus(str(tmp_path)), options)
    ids = text("a red square")["input_ids"]
    assert (ids[0], ids[-1]) == (text.bos_token_id, text.eos_token_id)
    assert text.eos_token_id != 2, "transformers takes 2 as a sign of an old CLIP"
    assert len(text("red square")["input_ids"]) < 8
    assert len(text) <= 330
    chat = train_chat_tokenizer(corpus([str(tmp_path)], files=("regions.jsonl", "conversations.jsonl")), options)
    assert chat.decode(chat("<|im_start|>user\nWhere is the red square?<|im_end|>")["input_ids"]) == (
        "<|im_start|>user\nWhere is the red square?<|im_end|>"
    )
    assert len(chat("Where is the ")["input_ids"]) < 10, "words of the conversations are in the vocabulary"


def test_a_corpus_without_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "regions.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ClocError, match="no text to train a tokenizer on"):
        list(corpus(str(tmp_path)))


def test_memory_is_shared_by_stage() -> None:
    reports = [PartReport("llm", "full", 2**20, 2**20, 1.0), PartReport("tower", "frozen", 2**20, 0, 0.0)]
    rows = [line.split() for line in memory_table(reports, "fp32", 4, 2).splitlines()[1:]]
    sums = [float(row[7]) for row in rows]
    assert sums == [8 + 4 + 8, 8 + 4 + 2, 8 + 1 + 2, 2 + 1 + 2]
    assert "this preset" in memory_table(reports, "fp32", 4, 2).splitlines()[3]
    assert len(memory_table(reports, "bf16", 4, 2).splitlines()) == 4, "stage 0 does not exist in bf16"


def test_explain_counts_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    preset = str(CONFIGS / "pretrain_quick.yaml")
    args = parser.parse_args(["train", "explain", "--config", preset, "--world-size", "2", "parts.text_tower=frozen"])
    assert args.run(args) == 0
    shown = capsys.readouterr().out
    assert "x 2 processes" in shown
    assert re.search(r"text_tower +frozen", shown)
    assert "<- this preset" in shown


def test_explain_says_what_is_missing_and_what_is_wrong(tmp_path: Path) -> None:
    shown = explain(str(CONFIGS / "align_quick.yaml"), [f"model.encoder={tmp_path / 'none'}"])
    assert "unknown until this is there" in shown
    assert os.fspath(tmp_path / "none") in shown
    with pytest.raises(ClocError, match="unknown key"):
        explain(str(CONFIGS / "align_quick.yaml"), ["nothing=1"])
