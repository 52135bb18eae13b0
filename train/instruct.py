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

from cloc_mllm.training import launch
from cloc_mllm.training.config import InstructConfig, load_config, plan_batch
from cloc_mllm.training.program import open_run_folder, parse_args, train_and_export


def main() -> None:
    """Run the stage from preset to export."""
    # 1. What is asked for. Nothing slow is imported yet, so a misspelt key is reported at once.
    args = parse_args("Instruction tuning")
    config = load_config(args.config, args.overrides, stage="instruct")
    assert isinstance(config, InstructConfig)
    plan = plan_batch(config.run.batch_size, config.run.micro_batch_size, launch.world_size_of_environment())
    zero = launch.resolve_zero(config.run.zero)

    # 2. The processes find each other.
    world = launch.start(zero, config.run.precision)
    checkpoint = open_run_folder(config, args.resume, world)

    from cloc_mllm.training import mllm
    from cloc_mllm.training.parts import apply_parts, describe
    from cloc_mllm.training.stream import StepStream
    from cloc_mllm.training.trainer import training_arguments
    from cloc_mllm.training.tune import TuneTrainer, phrase_embedder

    # 3. The data, in an order that depends on the seed and the position only.
    dataset = mllm.conversations(config, config.data.train)
    stream = StepStream(
        dataset, plan, steps=config.run.steps, epochs=config.run.epochs, seed=config.run.seed, name=config.data.train
    )

    # 4. The model, whole on every process: what
    # alignment has exported, or parts that were never aligned.
    model, processor = mllm.build_mllm(config, world)
    trained, reports = apply_parts(model, config.parts, config.optim)
    if world.is_main:
        print(f"{plan}, {stream.steps} steps of {len(dataset):,} samples\n{describe(reports)}")
        print(
            f"the first sample, what is learnt in ⟦ ⟧:\n{mllm.first_sample_report(processor, dataset[0])}", flush=True
        )

    # 5. The trainer, and beside it the encoder's text side, whose embeddings teach the grounding head.
    phrases = phrase_embedder(config, model.config.grounding, world.device)
    trainer = TuneTrainer(
        config,
        world,
        zero,
        stream,
        phrases=phrases,
        model=trained,
        args=training_arguments(config, plan, world, zero, stream.steps),
        data_collator=mllm.conversation_collator(processor, config.data.max_length),
        eval_dataset=mllm.validation_conversations(config),
        processor=processor,
    )

    # 6. Train, then write the weights to use, adapters merged.
    train_and_export(trainer, checkpoint, lambda: apply_parts(type(model)(model.config), config.parts, config.optim)[0])
    launch.leave()


if __name__ == "__main__":
    launch.run_program(main)
