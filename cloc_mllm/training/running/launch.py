"""Process start-up: which device, which process group, is DeepSpeed really on, and how a program ends.

The three programs run unchanged under `deepspeed`, under `torchrun` and as plain `python`. What `run.zero` says is what
happens: a stage means DeepSpeed, also in a single plain process; `none` means plain torch, with DDP under a launcher.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import random
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError

BAD_INPUT = 2
PACKAGE = Path(__file__).resolve().parents[2]


class SharedError(ClocError):
    """A problem that every process meets at the same moment: the main one speaks for all."""


@dataclass(frozen=True)
class World:
    """The processes of this run, and this one's place among them."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    use_cpu: bool

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def device(self) -> Any:
        """The `torch.device` of this process."""
        import torch

        # A bare number is a device of the current accelerator.
        return torch.device("cpu" if self.use_cpu else self.local_rank)


def programs_folder() -> Path:
    """Return the folder `train/`: beside the package in a clone, inside it in an installed wheel.

    Raises:
        ClocError: The installation is incomplete.
    """
    for folder in (PACKAGE.parent / "train", PACKAGE / "_programs" / "train"):
        if (folder / "zero").is_dir():
            return folder
    raise ClocError("the folder train/ with its presets is missing from this installation", file=PACKAGE)


def world_size_of_environment() -> int:
    """Return how many processes the launcher says there are; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_zero(zero: int | str) -> dict[str, Any] | None:
    """Find and check the DeepSpeed configuration that `run.zero` names.

    Args:
        zero: A stage 0-3 (`train/zero/zeroN.json`), the name of another file there, a path, or `none`.

    Returns:
        The DeepSpeed configuration, or ``None`` for `none`.

    Raises:
        ClocError: There is no such file, it is not JSON, or it holds an optimizer or a scheduler.
    """
    if str(zero) == "none":
        return None
    shipped = programs_folder() / "zero"
    path = shipped / f"zero{zero}.json" if str(zero).isdigit() else Path(str(zero))
    if not path.is_file() and (shipped / f"{path.name.removesuffix('.json')}.json").is_file():
        path = shipped / f"{path.name.removesuffix('.json')}.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(sorted(p.stem for p in shipped.glob("*.json")))
        raise ClocError(
            f"run.zero is '{zero}', but there is no such file",
            file=path,
            remedy=f"Use 0, 1, 2, 3, none, a path, or one of {names}.",
        ) from None
    except (OSError, ValueError) as error:
        raise ClocError(f"is not a readable JSON file: {error}", file=path) from None
    for block in ("optimizer", "scheduler"):
        if isinstance(config, dict) and block in config:
            raise ClocError(
                f"holds a block '{block}': with it DeepSpeed silently replaces the preset's own {block}, and learning "
                "rates per part or the cosine schedule are ignored",
                file=path,
                remedy=f"Delete the block; set `optim` in the preset. (Stages come from run.zero, {block}s do not.)",
            )
    if not isinstance(config, dict) or zero_stage(config) not in (0, 1, 2, 3):
        raise ClocError("must hold zero_optimization.stage, 0 to 3", file=path)
    return config


def zero_stage(config: dict[str, Any] | None) -> int | None:
    """Return the ZeRO stage of a DeepSpeed configuration; ``None`` without DeepSpeed."""
    return None if config is None else config.get("zero_optimization", {}).get("stage", 0)


def start(zero: dict[str, Any] | None, precision: str = "fp32", timeout: float = 1800.0) -> World:
    """Join the process group and get DeepSpeed ready; call before any model or `TrainingArguments` is built.

    On a machine without an accelerator DeepSpeed would compile an operator at this point, leave buffers behind in
    /dev/shm, and read the number of processes wrongly at stage 3; all three are prevented here.

    Args:
        zero: What :func:`resolve_zero` returned; changed in place to fit a CPU-only machine.
        precision: `fp32` or `bf16`.
        timeout: Seconds after which a collective gives up.

    Returns:
        This process's place.

    Raises:
        ClocError: bf16 at stage 0, or the environment would silently turn DeepSpeed off.
    """
    if precision == "bf16" and zero_stage(zero) == 0:
        raise ClocError(
            "bf16 with ZeRO stage 0 is refused: DeepSpeed's Adam would start one empty step ahead",
            remedy="Use run.zero=1.",
        )
    if zero is not None and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        raise ClocError(
            "ACCELERATE_USE_CPU (also set by `accelerate launch --cpu`) silently turns DeepSpeed off",
            remedy="Unset it; a machine without a GPU is recognised by itself. Or use run.zero=none.",
        )
    import torch

    # DeepSpeed's calls, which are not ours to change.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    use_cpu = not torch.accelerator.is_available()
    size = world_size_of_environment()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
    world = World(int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0")), size, local_size, use_cpu)
    if use_cpu:
        # Spares DeepSpeed, which transformers imports in any case, its search for a GPU and its warning.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks that each take every core spend their time waiting for one another.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if zero is None:
        if size > 1 and not torch.distributed.is_initialized():
            _set_device(world)
            torch.distributed.init_process_group(
                "gloo" if use_cpu else None, timeout=datetime.timedelta(seconds=timeout)
            )
        return world
    _start_deepspeed(zero, world, timeout)
    return world


def _set_device(world: World) -> None:
    """Bind this process to its accelerator before the group is formed."""
    import torch

    if not world.use_cpu:
        torch.accelerator.set_device_index(world.local_rank)


def _start_deepspeed(zero: dict[str, Any], world: World, timeout: float) -> None:
    """Form DeepSpeed's process group, without compiling anything on a CPU-only machine."""
    import torch

    if "RANK" not in os.environ:
        # A plain process is a world of one; DeepSpeed wants to be told so.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if world.use_cpu:
        _fit_to_cpu(zero)
    import deepspeed

    if not world.use_cpu:
        _set_device(world)
        deepspeed.init_distributed(timeout=datetime.timedelta(seconds=timeout))
        return
    # Older versions fill this table on import, newer ones when it is first read, by running the compiler. Saying that
    # the shared-memory operator is not available keeps both from building it: gloo does all that training needs.
    table = vars(deepspeed.ops).get("__compatible_ops__")
    if isinstance(table, dict):
        table["deepspeed_shm_comm"] = False
    else:
        vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    if hasattr(torch.compiler, "set_default_backend"):
        # DeepSpeed decorates functions that only its Muon optimiser calls: no reason to load, or need, a compiler.
        torch.compiler.set_default_backend("eager")
    if not torch.distributed.is_initialized() or not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=timeout), verbose=False)


def _fit_to_cpu(zero: dict[str, Any]) -> None:
    """Turn off what only makes sense, or only runs, with an accelerator."""
    options = zero.setdefault("zero_optimization", {})
    if "overlap_comm" in options:
        options["overlap_comm"] = False
    for offload in ("offload_optimizer", "offload_param"):
        if offload in options:
            options[offload] = {**options[offload], "pin_memory": False}
    # Without this, offloading swaps torch's AdamW for one that has to be compiled.
    zero["zero_force_ds_cpu_optimizer"] = False


def _free_port() -> str:
    """Return a port that nothing listens on, for a world of one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def require_deepspeed(engine: Any, world: World) -> None:
    """Make sure that the engine really is DeepSpeed's and spans every process.

    Args:
        engine: The wrapped model, after preparation.
        world: What :func:`start` returned.

    Raises:
        ClocError: DeepSpeed is off, or believes in another number of processes.
    """
    if type(engine).__name__ != "DeepSpeedEngine":
        raise ClocError(
            f"run.zero asks for DeepSpeed, but the model is wrapped in {type(engine).__name__}",
            remedy="Look for ACCELERATE_* variables in the environment, or use run.zero=none.",
        )
    if engine.world_size != world.size:
        raise ClocError(f"DeepSpeed runs over {engine.world_size} processes, the launcher started {world.size}")


def barrier() -> None:
    """Wait for every process; nothing to wait for without a group."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave() -> None:
    """Leave the process group, so that the program ends without warnings, and ends at once."""
    import torch

    # The interpreter's last garbage collection would walk through every object of every library for two seconds.
    gc.freeze()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run_program(main: Callable[[], None]) -> None:
    """Run a training program to its exit code: 0 on success, 2 with one line on stderr for bad input.

    Args:
        main: The program.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        main()
    except ClocError as error:
        torch = sys.modules.get("torch")
        grouped = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank > 0 and (not grouped or isinstance(error, SharedError)):
            # Every process has the same complaint, as all have before the group forms. Rank 0 makes it, and the
            # launcher must not end rank 0 before it has spoken.
            time.sleep(2 + random.random())
            os._exit(BAD_INPUT)
        where = f" (process {rank})" if rank else ""
        print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if not grouped:
            sys.exit(BAD_INPUT)
        # Without the interpreter's clean-up: the other ranks may stand in a collective that will never complete, and
        # leaving the group in an orderly way would wait for them.
        sys.stdout.flush()
        os._exit(BAD_INPUT)
