"""The checkpoints that come with the package, by name: ``pretrained=tiny-hcot`` needs no download.

They are small models of nested arithmetic, trained by this package's own script; each folder has a card that says how.
"""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path
from typing import Any

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


def near_name(name: str) -> str | None:
    """Returns the bundled checkpoint that a name is nearly that of, if nothing else can be meant.

    Checkpoints of the hub belong to somebody, so their ids have a slash; the few that have none are old and well known.
    """
    near = difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.8)
    return near[0] if near and name not in BUNDLED and not Path(name).exists() else None
