"""What `cloc-mllm train explain` foretells against what small runs on this machine measure: time, memory and traffic.

    python scripts/benchmarks/cost_model.py

Time: training steps of several encoders, one process. Operations counted over seconds measured, over the rate of a
plain matrix product in the same process: the share reached should hardly depend on the model, since the tables assume
one.
Memory: the same steps' largest resident set beyond what the process needs anyway, against weights, gradients, optimiser
state and what autograd keeps.
Traffic: two processes under DeepSpeed or DDP; bytes that torch.distributed is asked to move in a step, each operation
counted as a ring would send it, against the sum that the model adds up.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import MIB, argument_parser, device, measure, print_table, run_case, write_report

from cloc_mllm.objectives import clip_loss, grounding_loss, region_text_loss
from cloc_mllm.training.planning.costs import image_cost
from cloc_mllm.training.planning.explain import count_parts, encoder_skeleton
from cloc_mllm.training.planning.scaling import DEVICES, estimate, state_bytes
from cloc_mllm.training.presets.config import PretrainConfig, load_config, plan_batch
from cloc_mllm.training.presets.parts import trained_and_total

ROOT = Path(__file__).resolve().parents[2]
PRESET = ROOT / "train" / "configs" / "pretrain_quick.yaml"


def tower(width: int, layers: int, heads: int) -> str:
    """A tower's size, as an override of a preset writes it."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return json.dumps({**sizes, "intermediate_size": 4 * width})


MODELS: dict[str, tuple[int, tuple[str, ...]]] = {
    "S/16 at 160": (16, (f"model.vision={tower(384, 6, 6)}", f"model.text={tower(256, 4, 4)}", "model.image_size=160")),
    "S/16 at 160, checkpointed": (
        16,
        (
            f"model.vision={tower(384, 6, 6)}",
            f"model.text={tower(256, 4, 4)}",
            "model.image_size=160",
            "run.activation_checkpointing=true",
        ),
    ),
    "B/32 at 224": (
        8,
        (
            f"model.vision={tower(768, 12, 12)}",
            f"model.text={tower(512, 12, 8)}",
            "model.image_size=224",
            "model.patch_size=32",
        ),
    ),
    "B/16 at 224, mean pooling": (
        4,
        (
            f"model.vision={tower(768, 12, 12)}",
            f"model.text={tower(512, 12, 8)}",
            "model.image_size=224",
            "model.prompter={pooling: mean}",
        ),
    ),
}
RUNS: dict[str, tuple[str, ...]] = {
    "DDP": ("run.zero=none",),
    "ZeRO-1": ("run.zero=1",),
    "ZeRO-2, two micro-batches": ("run.zero=2", "run.micro_batch_size=8"),
    "ZeRO-3, no weight kept whole": ("run.zero=3",),
    "DDP, tiled loss": ("run.zero=none", "objective.loss_impl=tiled"),
}
COMMON = ("data.validation=null", "run.precision=fp32", "model.projection_dim=256", "model.position_init=normal")


def preset(overrides: tuple[str, ...]) -> PretrainConfig:
    """The quick preset with another model."""
    config = load_config(PRESET, [*COMMON, *overrides])
    assert isinstance(config, PretrainConfig)
    return config


def step_case(case: dict[str, Any]) -> dict[str, Any]:
    """Measure a training step, and what is foretold of it."""
    batch, overrides = MODELS[case["model"]]
    config = preset(overrides)
    cost = image_cost(config, lambda: encoder_skeleton(config))
    trained, total = trained_and_total(count_parts(config))
    state = sum(state_bytes(trained, total, "fp32", None, 1).values())

    left = torch.randn(1024, 1024, device=device())
    product = measure(lambda: left @ left, 20)
    rate = 2 * 1024**3 / product["seconds"]

    model = encoder_skeleton(config).to(device()).train()
    if config.run.activation_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    regions = config.data.max_regions
    size, count = config.model.image_size, batch * regions
    pixels = torch.randn(batch, 3, size, size, device=device())
    captions = torch.full((batch, config.tokenizer.max_length), 5, device=device())
    phrases = torch.full((count, 8), 5, device=device())
    boxes = torch.tensor([[0.2, 0.2, 0.7, 0.7]], device=device()).expand(count, 4)
    owner = torch.arange(count, device=device()) // regions

    def step() -> None:
        out = model(pixels, captions, None, boxes, owner, phrases, None, torch.arange(count, device=device()))
        region = region_text_loss(out.region_embeds, out.region_text_embeds, out.region_logit_scale, None)
        loss = clip_loss(out.image_embeds, out.text_embeds, out.logit_scale) + region
        (loss + grounding_loss(out.pred_boxes, boxes)).backward()
        optimizer.step()
        optimizer.zero_grad()

    # Weights are there already, and the first step makes all the rest.
    found = measure(step, 1 + case["repeats"])
    return {
        "seconds": found["seconds"],
        "share": batch * cost.step_flops / found["seconds"] / rate,
        "mib": found["peak_mib"],
        "foretold_mib": (state * 3 / 4 + batch * (cost.kept + cost.recomputed)) / MIB,
    }


def count_traffic(case: dict[str, Any]) -> None:
    """Be one rank of a run, and write how many bytes torch.distributed was asked to move."""
    sent: Counter[str] = Counter()
    world = int(os.environ["WORLD_SIZE"])
    ring = (world - 1) / world

    def counted(name: str, factor: float, which: int) -> None:
        real = getattr(torch.distributed, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tensor = args[which] if len(args) > which else next(iter(kwargs.values()))
            tensors = tensor if isinstance(tensor, list) else [tensor]
            sent[name] += int(sum(t.numel() * t.element_size() for t in tensors) * factor)
            return real(*args, **kwargs)

        setattr(torch.distributed, name, wrapper)

    counted("all_reduce", 2 * ring, 0)
    counted("reduce", ring, 0)
    for name in ("all_gather", "all_gather_into_tensor"):
        counted(name, ring, 0)
    counted("reduce_scatter_tensor", ring, 1)
    spec = importlib.util.spec_from_file_location("pretrain_cloc", ROOT / "train" / "pretrain_cloc.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    sys.argv = ["pretrain_cloc.py", "--config", str(PRESET), *case["arguments"]]
    from torch.nn.parallel import DistributedDataParallel

    from cloc_mllm.training.pretraining.pretrain import PretrainTrainer

    prepare = PretrainTrainer._prepare_for_training

    def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = prepare(self, *args, **kwargs)
        if isinstance(self.model_wrapped, DistributedDataParallel):
            # DDP reduces in C++; a hook is the way to see it. It does here what DDP does by itself.
            def hook(_, bucket):  # DDP refuses annotations that are strings, as all are in this file
                work = torch.distributed.all_reduce(bucket.buffer().div_(world), async_op=True)
                return work.get_future().then(lambda done: done.value()[0])

            self.model_wrapped.register_comm_hook(None, hook)
        return result

    PretrainTrainer._prepare_for_training = prepared  # type: ignore[method-assign]
    program.main()
    if int(os.environ["RANK"]) == 0:
        Path(case["result"]).write_text(json.dumps(sent))


def traffic_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run twice, for two and for four steps: the difference is two steps' traffic, start and export left out."""
    overrides = (*RUNS[case["run"]], "run.batch_size=32", "run.log_to=[]", "run.save_every=null", *COMMON)
    sums = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "scenes")
        command = [sys.executable, "-m", "cloc_mllm.apps.cli", "data", "scenes", "--n", "64", "--out", str(data)]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        train = next(path for path in (data / "train", data) if (path / "regions.jsonl").is_file())
        if "run.zero=3" in overrides:
            # DeepSpeed leaves weights of a few thousand numbers whole, and these models have no others.
            zero = json.loads((ROOT / "train" / "zero" / "zero3.json").read_text())
            zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            Path(folder, "zero3.json").write_text(json.dumps(zero))
            overrides = (*overrides, f"run.zero={folder}/zero3.json")
        for steps in (2, 4):
            arguments = [*overrides, f"data.train={train}", f"run.steps={steps}", f"run.output={folder}/{steps}"]
            inner = {"traffic": True, "arguments": arguments, "result": f"{folder}/{steps}.json"}
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            started = [sys.executable, *launcher, __file__, "--case", json.dumps(inner)]
            done = subprocess.run(started, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            sums.append(json.loads(Path(inner["result"]).read_text()))
    config = load_config(PRESET, [*overrides, "data.train=x", "run.steps=2"])
    assert isinstance(config, PretrainConfig)
    trained, total = trained_and_total(count_parts(config))
    stage = {"none": None, 1: 1, 2: 2}.get(config.run.zero, 3)
    cost = image_cost(config, lambda: encoder_skeleton(config))
    # What the run has taken, not the largest micro-batch that would fit.
    micro = plan_batch(config.run.batch_size, config.run.micro_batch_size, 2).micro_batch
    run = config.run.model_copy(update={"micro_batch_size": micro})
    taken = config.model_copy(update={"run": run})
    told = estimate(taken, cost, trained, total, stage, 2, DEVICES["h100"])
    by_name = {name: (sums[1].get(name, 0) - sums[0].get(name, 0)) / 2 for name in sums[1]}
    return {"kib": sum(by_name.values()) / 1024, "foretold_kib": sum(told.traffic.values()) / 1024, "by_name": by_name}


def main() -> None:
    """Measure every case, print the tables, write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="steps to measure")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS), help="traffic to measure")
    args = parser.parse_args()
    if args.case:
        case = json.loads(args.case)
        if "traffic" in case:
            count_traffic(case)
            return
        print(json.dumps(step_case(case) if "model" in case else traffic_case(case)))
        return
    started = time.time()
    steps = [run_case(__file__, {"model": name, "repeats": args.repeats}, args.timeout) for name in args.models]
    traffic = [run_case(__file__, {"run": name}, args.timeout) for name in args.runs]
    table = [["step", "s", "share of a matrix product's rate", "MiB", "foretold MiB"]]
    for found in steps:
        numbers = ["s", "share", "mib", "foretold_mib"]
        cells = [found.get("failed")] if "failed" in found else None
        table.append(
            [found["model"], *(cells + [""] * 3)]
            if cells
            else [found["model"], f"{found['seconds']:.3f}", *(f"{found[key]:.2f}" for key in numbers[1:])]
        )
    print_table(table)
    print()
    table = [["run on two processes", "KiB sent a step", "foretold KiB"]]
    for found in traffic:
        numbers = ["kib", "foretold_kib"]
        cells = [str(found["failed"]), ""] if "failed" in found else [f"{found[key]:,.0f}" for key in numbers]
        table.append([found["run"], *cells])
    print_table(table)
    print(f"\n{time.time() - started:.0f} s")
    write_report(args.out, "cost_model", [*steps, *traffic])


if __name__ == "__main__":
    main()
