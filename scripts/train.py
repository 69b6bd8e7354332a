"""Trains a model to think in blocks that are pruned, on exactly the contexts that the decoder will see.

    python scripts/train.py sft scripts/configs/first.yaml            # minutes on two CPU cores, no data files
    python scripts/train.py sft CONFIG.yaml --override trainer.learning_rate=1e-4 phases.0.policy=evict
    torchrun --nproc_per_node 8 scripts/train.py sft CONFIG.yaml

A run that was killed goes on from its last checkpoint when started again with the same settings.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
TERMINATED = 143
"""Exit status after SIGTERM, which saves a checkpoint first."""


def main() -> None:
    args = parse_args()
    if args.keys:
        from hcot_lmeval.training.config_file import describe_config

        print(describe_config())
        return
    try:
        sft(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped before the first step; start the same command again'}", file=sys.stderr)
        sys.exit(INTERRUPTED if type(stop) is KeyboardInterrupt else TERMINATED)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    kind = kinds.add_parser("sft", help="supervised training", description="Supervised training on traces.")
    kind.add_argument("config", type=Path, nargs="?", help="YAML file with the settings")
    kind.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="settings to change")
    kind.add_argument("--restart", action="store_true", help="throw away what an earlier run left in output")
    kind.add_argument("--keys", action="store_true", help="print every setting with default and meaning, and stop")
    args, unknown = parser.parse_known_args()
    if unknown:  # said with the usage of the command, not of the whole
        kind.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.config is None and not args.keys:
        kind.error("give a configuration file, or --keys to see what it may hold")
    return args


def sft(args: argparse.Namespace) -> None:
    from hcot_lmeval.training.config_file import load_config

    config = load_config(args.config, args.override)

    from hcot_lmeval.training.sft import train  # heavy, hence behind the check of the settings

    train(config, restart=args.restart, command=shlex.join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
