"""What all tests share: no network, one thread, and directories of their own in place of those in HOME."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

CACHES = "HCOT_LMEVAL_TEST_CACHES"
"""Names the folder that all processes of a run share. It goes when the process that made it ends."""
if CACHES not in os.environ:
    os.environ[CACHES] = tempfile.mkdtemp(prefix="hcot-tests-")
    atexit.register(shutil.rmtree, os.environ[CACHES], ignore_errors=True)
SHARED = Path(os.environ[CACHES])
# Before anything that reads them is imported: HOME may be somebody's, or not writable.
for variable in ("HF_HOME", "HCOT_LMEVAL_CACHE", "MPLCONFIGDIR"):
    os.environ.setdefault(variable, str(SHARED / variable.lower()))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.full import FULL  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not FULL:
    os.environ.setdefault("HCOT_LMEVAL_CXXFLAGS", "-O1")  # compiled in a fifth of the time
hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("tests")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
KERNELS = Path(os.environ["HCOT_LMEVAL_CACHE"]) / "kernels"
KERNELS.mkdir(parents=True, exist_ok=True)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of all kinds of teachers, and addresses in the environment that no question may go to."""
    pytest.importorskip("pydantic_ai")
    from tests.teacher_runs import CANARY, KEYS

    for name in KEYS:
        monkeypatch.setenv(name, CANARY)
    for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "GOOGLE_GEMINI_BASE_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/elsewhere")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Journals of a test never meet those of the user or of another test; compiled kernels serve all."""
    path = tmp_path_factory.mktemp("cache")
    (path / "kernels").symlink_to(KERNELS)
    monkeypatch.setenv("HCOT_LMEVAL_CACHE", str(path))
    return path


@pytest.fixture
def compiled_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Has the kernel compiled with further flags, as for another processor."""
    from hcot_lmeval.engine.native import build

    given = os.environ.get(build.FLAGS_VARIABLE, "")

    def use(*flags: str) -> None:
        monkeypatch.setenv(build.FLAGS_VARIABLE, " ".join([given, *flags]).strip())
        build.load_kernel.cache_clear()

    yield use
    build.load_kernel.cache_clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts and explains what was skipped, in one line."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    if reasons:
        told = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"{len(skipped)} skipped: {told}")
