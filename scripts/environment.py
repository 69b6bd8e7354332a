"""Makes a virtual environment in which this project runs: what `make` does first. Needs Python alone.

    python scripts/environment.py .venv                     # the versions that were tested: requirements/locked.txt
    python scripts/environment.py .venv-oldest --versions oldest
    python scripts/environment.py .venv-latest --versions latest

PyTorch comes first, since its builds differ. Without an Nvidia GPU the CPU build is taken from PyTorch's index, if that
answers within seconds (2.4 GB in place of 6.7); else PyPI's build. All else of the locked versions is checked against
the hashes in the lock; PyTorch is pinned by its version, for the hash of a build depends on where it comes from.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
import venv
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SECONDS = 5
"""An index that does not answer within this time is taken to be out of reach."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the environment; what is there already stays as far as it fits")
    parser.add_argument("--versions", choices=("locked", "oldest", "latest"), default="locked", help="of all packages")
    parser.add_argument("--torch", help="what pip installs as PyTorch, e.g. torch==2.13.0 (default: as --versions)")
    parser.add_argument("--torch-index", metavar="URL", help="where PyTorch comes from (default: see above)")
    given = parser.parse_args(arguments)

    torch = given.torch or tested_torch().get(given.versions, "torch")
    print(f"making {given.folder} ({given.versions} versions), some minutes, most of them for {torch}", flush=True)
    venv.create(given.folder, with_pip=True)
    python = given.folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    install_torch(python, torch, given.torch_index)
    if given.versions == "latest":
        pip(python, "--upgrade", "--editable", f"{ROOT}[dev]")
        return
    listed = ROOT / "requirements" / f"{given.versions}.txt"
    pip(python, "--no-deps", *(["--require-hashes"] if given.versions == "locked" else []), "-r", str(listed))
    pip(python, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def tested_torch() -> dict[str, str]:
    """Returns the PyTorch of the locked and of the oldest versions, from pyproject.toml."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return {
            name: f"torch=={version}" for name, version in tomllib.load(file)["tool"]["hcot_lmeval"]["torch"].items()
        }


def install_torch(python: Path, torch: str, index: str | None) -> None:
    """Installs PyTorch from the index, or from the one that suits the machine."""
    if index is not None:
        pip(python, torch, "--index-url", index)
    elif sys.platform == "darwin" or has_nvidia_gpu():
        pip(python, torch)
    elif not answers(CPU_INDEX):
        print(f"no GPU here, but {CPU_INDEX} does not answer: taking the build for GPUs (6.7 GB)", flush=True)
        pip(python, torch)
    else:
        print(f"no GPU here: taking PyTorch's CPU build from {CPU_INDEX}", flush=True)
        pip(python, torch, "--index-url", CPU_INDEX)


def has_nvidia_gpu() -> bool:
    """Whether the driver lists a GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def answers(index: str) -> bool:
    """Whether an index of packages can be reached."""
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=SECONDS):
            return True
    except OSError:
        return False


@cache
def keeps(python: Path) -> bool:
    """Whether pip's cache can be written: where it cannot, as under a HOME that is read-only, pip builds no wheel."""
    found = subprocess.run([python, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=False)
    try:
        Path(found.stdout.strip()).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=found.stdout.strip()):
            return True
    except OSError:
        return False


def pip(python: Path, *arguments: str) -> None:
    kept = [] if keeps(python) else ["--no-cache-dir"]
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *kept, *arguments], check=False)
    if done.returncode:
        sys.exit(f"environment: pip could not install {' '.join(arguments)}; what it says is above")


if __name__ == "__main__":
    main()
