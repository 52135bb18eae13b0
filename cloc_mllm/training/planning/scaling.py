"""Pre-training on many devices: memory, traffic and step time of one of them, from what one image costs.

The model is simple enough to be checked by hand, and `scripts/benchmarks/cost_model.py` checks it against small runs.

* Memory: weights, gradients and optimiser state as ZeRO shares them; what autograd keeps of a micro-batch; the loss.
* Traffic: bytes a device sends in a step when collectives are done in rings, over W devices: (W-1)/W of the data for a
  gather or a reduce-scatter, twice that for an all-reduce.
* Time: operations over the rate the device reaches, plus traffic over its network link, with no overlap of the two: an
  upper bound for the traffic's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloc_mllm.errors import ClocError
from cloc_mllm.training.planning.costs import ImageCost
from cloc_mllm.training.presets.config import BatchPlan, PretrainConfig, plan_batch

GIB = 2**30

# Bytes for each parameter: weights, gradients, and what AdamW keeps (two moments; in bf16 also the fp32 weights).
BYTES = {"fp32": (4, 4, 8), "bf16": (2, 2, 12)}
PLAIN_COPIES = 5.5
"""(N, N) fp32 matrices that the plain region loss holds at its peak (scripts/benchmarks/contrastive_losses.py)."""
TILE_COPIES = 8
"""(tile, tile) fp32 matrices of the tiled loss; and four times the embeddings of all texts."""


@dataclass(frozen=True)
class Device:
    """An accelerator, by its data sheet.

    Attributes:
        name: What to call it.
        tflops: Dense bf16 (10^12 operations a second).
        fp32_tflops: The same in fp32, in which the losses are computed.
        memory_gib: Memory.
        link_gbs: Network of one device (10^9 bytes a second each way).
        utilisation: Share of `tflops` that training reaches (ours: what large ViTs are usually reported to reach).
    """

    name: str
    tflops: float
    fp32_tflops: float
    memory_gib: float
    link_gbs: float
    utilisation: float = 0.4


DEVICES = {
    "a100": Device("A100 80 GB, 200 Gb/s", 312, 19.5, 80, 25),
    "h100": Device("H100 80 GB, 400 Gb/s", 989, 67, 80, 50),
}
USABLE = 0.9
"""Share of a device's memory to plan with; the rest is the allocator's and the libraries'."""


@dataclass(frozen=True)
class Estimate:
    """One device's part of a step.

    Attributes:
        plan: The batch arithmetic.
        memory: Bytes, by what they hold.
        traffic: Bytes sent in a step, by what they are.
        seconds: Of a step, by what takes them.
    """

    plan: BatchPlan
    memory: dict[str, float]
    traffic: dict[str, float]
    seconds: dict[str, float]


def state_bytes(
    trained: int, total: int, precision: str, stage: int | None, world_size: int, ema: bool = False
) -> dict[str, float]:
    """Return the weights, gradients and optimiser state that one process holds.

    Args:
        trained: Parameters that are trained.
        total: All parameters.
        precision: `fp32` or `bf16`.
        stage: ZeRO stage; ``None`` without DeepSpeed.
        world_size: Number of processes the state is shared over.
        ema: Whether the optimiser keeps an average of the weights too.
    """
    for_weights, for_gradients, for_optimizer = BYTES[precision]
    for_optimizer += 4 * ema
    shares = [world_size if (stage or 0) >= least else 1 for least in (3, 2, 1)]
    return {
        "weights": total * for_weights / shares[0],
        "gradients": trained * for_gradients / shares[1],
        "optimiser": trained * for_optimizer / shares[2],
    }


def estimate(
    config: PretrainConfig,
    cost: ImageCost,
    trained: int,
    total: int,
    stage: int | None,
    world_size: int,
    device: Device,
) -> Estimate:
    """Say what a step asks of one device.

    Without `run.micro_batch_size` the largest micro-batch is taken that fits into the device's memory.

    Args:
        config: The preset.
        cost: Of one of its images.
        trained: Parameters that are trained.
        total: All parameters.
        stage: ZeRO stage; ``None`` without DeepSpeed.
        world_size: Number of devices.
        device: Which.

    Raises:
        ClocError: Not even one image at a time fits, or the batch does not divide over the devices.
    """
    share = plan_batch(config.run.batch_size, None, world_size).micro_batch
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    if config.run.micro_batch_size is not None:
        sizes = [plan_batch(config.run.batch_size, config.run.micro_batch_size, world_size).micro_batch]
    for size in sizes:
        plan = BatchPlan(config.run.batch_size, size, share // size, world_size)
        ema = config.optim.ema is not None
        state = state_bytes(trained, total, config.run.precision, stage, world_size, ema)
        memory = _memory(config, cost, plan, state)
        if sum(memory.values()) <= USABLE * device.memory_gib * GIB:
            break
    else:
        if config.run.micro_batch_size is None:
            raise ClocError(
                f"one image at a time needs {sum(memory.values()) / GIB:.1f} GiB of each {device.name}",
                remedy="Use a higher run.zero, run.activation_checkpointing=true, objective.loss_impl=tiled.",
            )
    traffic = _traffic(config, cost, plan, trained, total, stage)
    return Estimate(plan, memory, traffic, _seconds(config, cost, plan, sum(traffic.values()), device))


def _rows(config: PretrainConfig) -> list[int]:
    """Rows of the global contrastive batches: images, and regions if there are any."""
    regions = [config.run.batch_size * config.data.max_regions] if config.model.prompter is not None else []
    return [config.run.batch_size, *regions]


def _memory(config: PretrainConfig, cost: ImageCost, plan: BatchPlan, state: dict[str, float]) -> dict[str, float]:
    size, width = config.objective.tile_size, cost.embedding
    loss = 0.0
    for rows in _rows(config):
        seen = rows if config.objective.grad_cache else rows // plan.accumulation
        tile = min(size, seen)
        tiled = TILE_COPIES * 4 * tile**2 + 4 * 4 * seen * width
        loss = max(loss, tiled if config.objective.loss_impl == "tiled" else PLAIN_COPIES * 4 * seen**2)
    return {**state, "activations": plan.micro_batch * (cost.kept + cost.recomputed), "loss": loss}


def _traffic(
    config: PretrainConfig, cost: ImageCost, plan: BatchPlan, trained: int, total: int, stage: int | None
) -> dict[str, float]:
    """Return the bytes a device sends in a step."""
    world, steps = plan.world_size, plan.accumulation
    ring = (world - 1) / world
    weight, gradient, _ = BYTES[config.run.precision]
    passes = 2 if config.objective.grad_cache and steps > 1 else 1
    once = trained * gradient * ring
    if stage in (None, 0):
        traffic = {"gradients": 2 * once, "weights": 0.0}
    elif stage in (1, 2):
        # DeepSpeed all-reduces gradients and keeps its share of the sum; stage 2 does so for every micro-batch.
        reductions = steps if stage == 2 else 1
        traffic = {"gradients": 2 * reductions * once, "weights": trained * weight * ring}
    else:
        traffic = {"gradients": steps * once, "weights": steps * (passes + 1) * total * weight * ring}
    sides = 1 if config.objective.loss_impl == "tiled" else 2
    embeddings = sum(_rows(config)) * cost.embedding * 4 * ring
    # Embeddings are gathered forward, and their gradients all-reduced backward.
    return {**traffic, "embeddings": 3 * sides * embeddings}


def _seconds(config: PretrainConfig, cost: ImageCost, plan: BatchPlan, sent: float, device: Device) -> dict[str, float]:
    images = plan.micro_batch * plan.accumulation
    again = cost.forward_flops if config.objective.grad_cache and plan.accumulation > 1 else 0.0
    # Similarities forward, and two products of gradients backward with the similarities made anew; the text filter
    # multiplies texts with texts in both directions.
    products = [4 + (0 if k == 0 or config.objective.filter_threshold is None else 2) for k in range(2)]
    loss: float = sum(n * 2 * rows**2 * cost.embedding for n, rows in zip(products, _rows(config), strict=False))
    if config.objective.loss_impl == "tiled":
        loss /= plan.world_size
    rate = device.tflops if config.run.precision == "bf16" else device.fp32_tflops
    return {
        "model": images * (cost.step_flops + again) / (rate * 1e12 * device.utilisation),
        "loss": loss / (device.fp32_tflops * 1e12 * device.utilisation),
        "network": sent / (device.link_gbs * 1e9),
    }


def table(estimates: Sequence[Estimate]) -> str:
    """Return estimates for several numbers of devices side by side, as a Markdown table."""
    rows: list[list[str]] = [["devices", *(f"{e.plan.world_size:,}" for e in estimates)]]
    rows.append(["micro-batch x accumulation", *(f"{e.plan.micro_batch} x {e.plan.accumulation}" for e in estimates)])
    for title, name, unit, scale in (
        ("memory", "memory", "GiB", GIB),
        ("sent a step", "traffic", "GB", 1e9),
        ("step", "seconds", "s", 1.0),
    ):
        totals = [sum(getattr(e, name).values()) for e in estimates]
        rows.append([f"**{title}, {unit}**", *(f"**{_three(value / scale)}**" for value in totals)])
        keys = getattr(estimates[0], name)
        rows += [[key, *(_three(getattr(e, name)[key] / scale) for e in estimates)] for key in keys]
    rate = [e.plan.global_batch / sum(e.seconds.values()) for e in estimates]
    rows.append(["images a second", *(f"{value:,.0f}" for value in rate)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _three(value: float) -> str:
    """Three significant digits at most, and never an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
