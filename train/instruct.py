"""Instruction tuning: an aligned MLLM learns to converse about images and regions.

    deepspeed --num_gpus 2 train/instruct.py --config train/configs/instruct_quick.yaml [key=value …] [--resume]
    torchrun --nproc_per_node 2 train/instruct.py --config …
    python train/instruct.py --config …

The data are conversations, in messages or LLaVA format.

The run folder (`run.output`) gets `export/`, the weights to use, `checkpoint-N/`, the states to resume from,
`metrics.jsonl` and TensorBoard files under `log/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs from a clone that is not installed

from cloc_mllm.training.program import tune_mllm
from cloc_mllm.training.running import launch


def main() -> None:
    """Run the stage from preset to export; its steps are told in `tune_mllm`."""
    tune_mllm("instruct", "Instruction tuning")


if __name__ == "__main__":
    launch.run_program(main)
