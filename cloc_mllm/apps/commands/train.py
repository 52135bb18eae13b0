"""`cloc-mllm train explain`: what a training preset amounts to, before anything is trained."""

from __future__ import annotations

import argparse

EPILOG = """\
examples:
  cloc-mllm train explain --config train/configs/pretrain_quick.yaml
  cloc-mllm train explain --config train/configs/instruct_quick.yaml --world-size 8 run.zero=3 parts.llm=lora
  cloc-mllm train explain --config train/configs/pretrain_quick.yaml run.batch_size=1024 --scale 8 64 --device a100

To train, use the launcher: deepspeed --num_gpus N train/pretrain_cloc.py --config X.yaml [key=value ...]"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "train",
        help="explain a training preset: resolved values, batch, what is frozen",
        description="Look at training presets; training itself is started by a launcher.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    explain = actions.add_parser(
        "explain",
        help="print resolved values, batch arithmetic, what is frozen and trained, memory by ZeRO stage",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("--config", required=True, metavar="X.yaml", help="the preset")
    explain.add_argument("--world-size", type=int, default=1, metavar="N", help="processes to plan for (default: 1)")
    explain.add_argument(
        "--scale",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="pre-training: estimate memory, traffic and step time on so many devices",
    )
    explain.add_argument("--device", choices=("a100", "h100"), default="h100", help="which devices (default: h100)")
    explain.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as for the programs in train/")
    explain.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the explanation."""
    from cloc_mllm.training.presets.config import load_config, plan_batch

    # Checked before torch is imported: a misspelt key should not take seconds to be told.
    config = load_config(args.config, args.overrides)
    plan_batch(config.run.batch_size, config.run.micro_batch_size, args.world_size)

    from cloc_mllm.training.planning.explain import explain

    print(explain(args.config, args.overrides, args.world_size, args.scale, args.device))
    return 0
