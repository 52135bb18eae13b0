"""Tuning through the real program: packed rows, ranks without images or regions, mixtures, skipping, 4 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cloc_mllm.training.tuning.mllm import load_mllm
from tests.builders_training import (
    TINY_ENCODER,
    TINY_LLM,
    TINY_MLLM,
    losses,
    metrics,
    run_preset,
    write_conversations,
    write_regions,
)
from tests.harness import RankError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLLM aligned on a little data, in one plain process, packed, with phrases that are absent."""
    folder = tmp_path_factory.mktemp("tuning")
    write_regions(folder / "data", 32)
    write_conversations(folder / "data", 40)
    bare_conversations(folder / "bare", 32)
    encoder = ("run.steps=2", "run.batch_size=4", "run.zero=none", f"data.train={folder / 'data'}")
    run_preset(1, "pretrain_cloc", "pretrain_quick", *TINY_ENCODER, *encoder, f"run.output={folder / 'encoder'}")
    align = (f"data.train={folder / 'data'}", f"model.encoder={folder / 'encoder' / 'export'}", "data.packing=true")
    sizes = ("run.steps=3", "run.batch_size=4", "run.zero=none", "data.absent=1", f"run.output={folder / 'align'}")
    run_preset(1, "align", "align_quick", *TINY_MLLM, *TINY_LLM, *align, *sizes)
    return folder


def bare_conversations(folder: Path, count: int) -> None:
    """By turns text alone, and an image without a region, a box or a `<ground>`."""
    folder.mkdir()
    lines: list[dict[str, Any]] = []
    for number in range(count):
        question: list[dict[str, Any]] = [{"type": "text", "text": f"What is {number}?"}]
        if number % 2:
            pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            question.insert(0, {"type": "image", "image": f"{number}.png"})
        answer = [{"type": "text", "text": "a thing" + " and more" * (number % 5)}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append({"id": f"b{number}", "messages": messages})
    (folder / "conversations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def instruct(folder: Path, name: str, world: int, *overrides: str, data: str = "data") -> Path:
    start = (f"model.init=mllm:{folder / 'align' / 'export'}", f"model.encoder={folder / 'encoder' / 'export'}")
    sizes = ("run.steps=5", "run.batch_size=4", f"run.output={folder / name}", f"data.train={folder / data}")
    run_preset(world, "instruct", "instruct_quick", *TINY_MLLM, *start, *sizes, *overrides)
    return folder / name


def test_stage_3_with_ranks_without_images_or_regions_packed_equals_one_plain_process(
    folder: Path, whole_shards: str
) -> None:
    """In each step one process has images and no region and the other text alone; they change places by the step."""
    steps = ("run.steps=6", "data.grouping=modality_length", "data.grouping_steps=1", "objective.label_smoothing=0.1")
    steps += ("optim.neftune_alpha=1e-4",)  # too little noise to tell, but through the partitioned embeddings
    plain = instruct(folder, "bare_plain", 1, "run.zero=none", *steps, data="bare")
    sharded = instruct(folder, "bare_zero3", 2, f"run.zero={whole_shards}", "data.packing=true", *steps, data="bare")
    assert losses(sharded) == pytest.approx(losses(plain), abs=1e-4)
    mine, theirs = (load_mllm(run / "export")[0].state_dict() for run in (sharded, plain))
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("zero", ["1", "2"])
def test_packed_rows_learn_what_padded_ones_learn(zero: str, folder: Path) -> None:
    """With accumulation and recomputed activations, over two processes, against padding in one: to the box losses."""
    how = ("run.micro_batch_size=2", "run.activation_checkpointing=true", "data.packing=true", "data.pack_length=200")
    packed = instruct(folder, f"packed{zero}", 2, f"run.zero={zero}", "run.batch_size=8", "data.max_length=200", *how)
    whole = ("run.zero=none", "run.batch_size=8", "run.micro_batch_size=4")
    padded = folder / "padded"
    if not padded.exists():
        instruct(folder, "padded", 1, *whole)
    assert losses(packed) == pytest.approx(losses(padded), abs=2e-4)
    for mine, theirs in zip(metrics(packed), metrics(padded), strict=True):
        for name in ("loss_lm", "loss_box", "loss_text_box", "loss_distill"):
            assert mine[name] == pytest.approx(theirs[name], abs=2e-4), name


def test_a_mixture_with_broken_samples_goes_on_where_it_was_interrupted(folder: Path) -> None:
    broken = folder / "broken"
    shutil.copytree(folder / "data", broken)
    lines = (broken / "conversations.jsonl").read_text().splitlines()
    said = [{"role": "user", "content": "Talk."}, {"role": "assistant", "content": "very long " * 100}]
    lines = [json.dumps({"id": "long", "messages": said})] * 3 + lines[:20]
    (broken / "conversations.jsonl").write_text("\n".join(lines) + "\n")
    mixture = f"data.train=[{{path: {broken}, weight: 2}}, {{path: {folder / 'bare'}, weight: 0.5}}]"
    options = (mixture, "data.packing=true", "data.grouping=length", "data.max_length=120", "optim.neftune_alpha=5")
    more = ("run.zero=2", "run.workers=1", "run.save_every=8", "run.keep=null", "run.steps=16")
    with pytest.raises(RankError, match=r"it needs .* tokens, but max_length is 120"):
        instruct(folder, "strict", 1, *options, "run.zero=none", "run.steps=16")
    next(iter((broken / "noise").iterdir())).unlink()
    run = instruct(folder, "mixture", 2, *options, *more, "data.on_bad_sample=skip")
    assert metrics(run)[-1]["skipped"] > 0
    cut = folder / "mixture_cut"
    shutil.copytree(run, cut)
    for later in ("checkpoint-16", "export"):
        shutil.rmtree(cut / later)
    again = (*options, *more, "data.on_bad_sample=skip", "--resume")
    with pytest.raises(RankError, match=r"stream\.json.*the stream had"):
        instruct(folder, "mixture_cut", 2, *again, "data.grouping=none")
    instruct(folder, "mixture_cut", 2, *again)
    assert losses(cut)[-8:] == losses(run)[-8:]
    mine, theirs = (load_mllm(one / "export")[0].state_dict() for one in (cut, run))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("zero", ["none", "2"])
def test_four_bits_train_adapters_and_export_a_whole_model(zero: str, folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    four = ("parts.llm={mode: lora, rank: 4, quantization: nf4}", "run.precision=bf16", f"run.zero={zero}")
    run = instruct(
        folder,
        f"four_bits_{zero}",
        2,
        *four,
        "data.packing=true",
        "optim.neftune_alpha=5",
        "objective.label_smoothing=0.1",
    )
    before, after = (load_mllm(one / "export")[0].state_dict() for one in (folder / "align", run))
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in before.items()}
    layers = [
        name for name in after if ".layers." in name and name.startswith("model.language_model") and "_proj" in name
    ]
    for name in layers:
        change = after[name].float() - before[name].float()
        assert float(change.abs().max()) > 0
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 4, f"{name} holds more than its adapter: rounding"
    norms = [name for name in after if "layernorm" in name and name.startswith("model.language_model")]
    assert norms
    assert all(torch.equal(after[name], before[name]) for name in norms)
