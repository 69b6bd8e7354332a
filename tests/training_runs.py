"""Training as a user runs it: the command in this process, or in others that can be killed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import transformers
import yaml
from safetensors.torch import load_file

from hcot_lmeval import command
from tests.interrupts import accept_interrupts

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "train.py"


def start(folder: Path, config: dict, processes: int = 1, kind: str = "sft") -> subprocess.Popen:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launch, str(SCRIPT), kind, str(file)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=accept_interrupts,
    )


def run(folder: Path, config: dict, *options: str, status: int = 0, kind: str = "sft") -> str:
    """Runs the command in this process and returns what it prints and logs; it has to end with `status`."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    transformers.utils.logging.add_handler(handler)
    logging.getLogger("hcot_lmeval").addHandler(handler)
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            mock.patch.object(sys, "argv", ["scripts/train.py"]),
        ):
            ended = command.run("train", [kind, str(file), *options])
    finally:
        transformers.utils.logging.remove_handler(handler)
        logging.getLogger("hcot_lmeval").removeHandler(handler)
    assert ended == status, printed.getvalue()
    return printed.getvalue()


def refused(folder: Path, config: dict, kind: str = "sft") -> str:
    """Returns the line with which the command ends, and those of settings below it."""
    told = run(folder, config, status=1, kind=kind)
    return told[told.rindex("error: ") :]


def wait_for(process: subprocess.Popen, path: Path) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def weights(output: Path) -> dict:
    return load_file(output / "model" / "model.safetensors")
