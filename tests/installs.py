"""Real installations of the package, as a wheel and editable, each in a virtual environment of its own.

They need no network: whatever the package depends on is taken from the environment that runs the tests.
"""

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("wheel", "editable")


@dataclass(frozen=True)
class Install:
    """The package in a fresh virtual environment."""

    folder: Path
    archive: Path
    """What was installed; an editable install is a wheel too, of start-up files and metadata."""

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    @property
    def files(self) -> set[str]:
        with ZipFile(self.archive) as archive:
            return set(archive.namelist())

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment, in it and outside of the checkout; `python` is its interpreter."""
        first, *rest = command
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HCOT_"))}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            [self.folder / "bin" / first, *rest],
            cwd=self.folder,
            env=inherited | {"HF_HUB_OFFLINE": "1", "PATH": path} | environment,
            capture_output=True,
            text=True,
            timeout=900,
        )

    def python_says(self, code: str, **environment: str) -> str:
        """Returns what `code` prints; it has to succeed and to leave stderr empty."""
        done = self.run("python", "-c", code, **environment)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.strip()


@cache
def install(kind: str, parent: Path) -> Install:
    """Builds the package and installs it into a new virtual environment under `parent`, once per session."""
    folder = parent / kind
    archive = _build(kind, folder / "archive")
    venv.create(folder, symlinks=True)
    made = Install(folder, archive)
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (made.site_packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", made.python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, archive], check=True)
    return made


def _build(kind: str, target: Path) -> Path:
    build = "build_wheel" if kind == "wheel" else "build_editable"
    code = f"import hatchling.build as backend, sys; print(backend.{build}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, target], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return target / done.stdout.split()[-1]
