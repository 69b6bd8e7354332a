"""What `make` does first: which cache pip may use, and which PyTorch is taken."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "environment.py"


@pytest.fixture
def environment():
    spec = importlib.util.spec_from_file_location("environment_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("home", "kept"), [("{}", True), ("/proc/nohome", False)])
def test_pip_keeps_nothing_where_it_cannot(environment, monkeypatch, tmp_path, home, kept):
    for name in ("PIP_CACHE_DIR", "PIP_NO_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home.format(tmp_path))
    assert environment.keeps(Path(sys.executable)) is kept


def test_the_pytorch_of_each_set_of_versions_is_one_version(environment):
    assert all(name.startswith("torch==2.") for name in environment.tested_torch().values())
    assert environment.tested_torch().keys() == {"locked", "oldest"}
