"""Triton's interpreter, which computes kernels without a GPU, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_in_interpreter(code: str) -> list[str]:
    """Returns the words that `code` prints; Triton has to be told of the interpreter before it is imported.

    Skips the test where there is no Triton that can: ``pip install triton``.
    """
    reason = "needs triton 3.9 or newer (pip install triton); older interpreters do not work with numpy 2.4"
    pytest.importorskip("triton", "3.9", reason=reason)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).resolve().parents[1]
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()
