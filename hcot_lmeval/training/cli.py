"""Trains a model to think in blocks that are pruned, on exactly the contexts that the decoder will see.

    hcot train sft scripts/configs/first.yaml            # minutes on two CPU cores, no data files
    hcot train sft CONFIG.yaml --override trainer.learning_rate=1e-4 phases.0.policy=evict
    hcot train grpo scripts/configs/grpo.yaml            # reinforcement learning, from a model that knows the notation
    torchrun --nproc_per_node 8 scripts/train.py sft CONFIG.yaml

A run that was killed goes on from its last checkpoint when started again with the same settings.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hcot_lmeval.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, which is 143 after SIGTERM."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)  # before anything heavy: help is instant
    return run_command(lambda: run(args, argv), extra={"sft": "train", "grpo": "rl"}[args.kind])


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Trains, or prints the settings.

    Raises:
        ValueError, OSError: a setting, a file or the data cannot be used.
        KeyboardInterrupt: it was stopped; the message says where it goes on.
    """
    from hcot_lmeval.training.config import GrpoConfig, SftConfig, describe_config, load_config, read_config

    if args.keys:
        print(describe_config(SftConfig if args.kind == "sft" else GrpoConfig))
        return
    program = sys.argv[0] if sys.argv[0].startswith("hcot ") else f"python {shlex.quote(sys.argv[0])}"
    more = {"restart": args.restart, "command": f"{program} {shlex.join(argv)}"}
    # what trains is imported behind the check of the settings, for it takes seconds
    if args.kind == "sft":
        supervised = load_config(args.config, args.override)
        from hcot_lmeval.training import sft

        sft.train(supervised, **more)
    else:
        reinforced = read_config(args.config, args.override, GrpoConfig)
        from hcot_lmeval.training import grpo

        grpo.train(reinforced, **more, folder=args.config.parent)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="KIND", dest="kind")
    sft = kinds.add_parser("sft", help="supervised training", description="Supervised training on traces.")
    grpo = kinds.add_parser("grpo", help="reinforcement learning", description="GRPO on problems with answers.")
    for kind in (sft, grpo):
        kind.add_argument("config", type=Path, nargs="?", help="YAML file with the settings")
        kind.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="settings to change")
        kind.add_argument("--restart", action="store_true", help="throw away what an earlier run left in output")
        kind.add_argument("--keys", action="store_true", help="print every setting with default and meaning, and stop")
    args, unknown = parser.parse_known_args(argv)
    kind = sft if args.kind == "sft" else grpo
    if unknown:  # said with the usage of the command, not of the whole
        kind.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.config is None and not args.keys:
        kind.error("give a configuration file, or --keys to see what it may hold")
    return args
