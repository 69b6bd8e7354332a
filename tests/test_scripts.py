"""Every script says what it is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "script",
    [path.name for path in sorted((ROOT / "scripts").glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")],
)
def test_help(script) -> None:
    command = [sys.executable, f"scripts/{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_training_is_compared_token_by_token_without_a_model() -> None:
    command = [sys.executable, "scripts/bench_training.py", "--counts-only", "--length", "512", "--blocks", "4"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "packed" in done.stdout and "cores" in done.stdout
