"""The checkpoints that come with the package, by name: ``pretrained=tiny-hcot`` needs no download.

They are small models of nested arithmetic, trained by this package's own script; each folder has a card that says how.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from hcot_lmeval.errors import did_you_mean

BUNDLED = ("tiny-hcot", "tiny-evict", "tiny-flat")
"""Trained for policy recompute, for policy evict, and on the same steps without blocks."""

ROOT = Path(str(files(__name__)))


def resolve(name: Any) -> Any:
    """Returns the directory of the bundled checkpoint called `name`; of anything else, a leading ``~`` is the home.

    A checkpoint of that name in the working directory comes first, as it does for `from_pretrained`.

    Raises:
        FileNotFoundError: the name is that of a bundled checkpoint, and this installation lacks it.
    """
    if not isinstance(name, str) or name not in BUNDLED or (Path(name) / "config.json").is_file():
        return str(Path(name).expanduser()) if isinstance(name, str) and name.startswith("~") else name
    folder = ROOT / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the bundled checkpoint {name!r} is not in {ROOT}; install the package anew")
    return str(folder)


def check_name(name: Any, told: str = "") -> None:
    """Raises `FileNotFoundError` for a name that is nearly that of a bundled checkpoint, if nothing else can be meant.

    Checkpoints of the hub belong to somebody, so their ids have a slash; the few that have none are old and well known.

    Args:
        name: as a user gave it.
        told: what stands before it in the message.
    """
    known = not isinstance(name, str) or name in BUNDLED or Path(name).exists()
    if not known and (near := did_you_mean(name, BUNDLED, cutoff=0.8)):
        raise FileNotFoundError(f"{told}{name!r} is neither bundled nor a directory{near}")
