"""Puts finished training runs into the package, as the checkpoints that ``pretrained=NAME`` finds.

    python scripts/bundle.py runs/tiny-hcot runs/tiny-evict runs/tiny-flat

The name is that of the run's directory. Weights, tokenizer and curves are copied; the card is written anew, for users
who know the model by its name. A checkpoint of more than 8 MB is refused: the repository carries these.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

LARGEST = 8e6
"""Bytes that a bundled checkpoint may have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--hardware", help="what it was trained on, if not this machine")
    args = parser.parse_args()
    for run in args.runs:
        bundle(run, args.hardware)


def bundle(root: Path, hardware: str | None) -> None:
    from hcot_lmeval.assets import BUNDLED, ROOT
    from hcot_lmeval.record import read_record
    from hcot_lmeval.training.card import write_card
    from hcot_lmeval.training.config import load_config
    from hcot_lmeval.training.run import RunDirectory

    run = RunDirectory(root)
    if root.name not in BUNDLED:
        sys.exit(f"error: {root.name} is not the name of a bundled checkpoint; these are {', '.join(BUNDLED)}")
    if not (run.model / "model.safetensors").is_file():
        sys.exit(f"error: {root} holds no finished model; train it first (scripts/train.py)")
    size = sum(file.stat().st_size for file in run.model.iterdir())
    if size > LARGEST:
        sys.exit(f"error: {run.model} has {size / 1e6:.1f} MB; at most {LARGEST / 1e6:.0f} MB are bundled")
    folder = ROOT / root.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.model, folder)
    record = read_record(folder)
    assert record is not None, "the trainer writes one"
    write_card(load_config(root / "config.yaml"), record, run, folder=folder, name=root.name, machine=hardware)
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
