"""What is wrong with a grid, as far as it can be seen before the first cell: models, policies, tasks, kwargs.

All of it is said at once. What only the loading of a model can tell is left to the cells.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from hcot_lmeval.assets import BUNDLED, resolve
from hcot_lmeval.errors import did_you_mean
from hcot_lmeval.provenance import tasks_folder
from hcot_lmeval.record import CONFIG_NAME, read_config, settle
from hcot_lmeval.report.grid import Cell, record_of

FROM_TRANSFORMERS = ("hcot", "hf")
"""Models of lm-eval whose checkpoint has a config of transformers."""

REQUESTS = "hcot_lmeval.lm.requests"
"""Reads the generation kwargs of a run; asked for by its name, as lm-eval asks for the model, which stands above us."""


def check_cells(cells: Sequence[Cell]) -> None:
    """Refuses cells that cannot be run, with every fault at once.

    Raises:
        ValueError: lm-eval has no such model, a checkpoint or a task is not there, a model was trained under another
            policy, or a generation kwarg is not allowed.
    """
    checks = (_model_faults, _checkpoint_faults, _policy_faults, _task_faults, _kwarg_faults)
    faults = dict.fromkeys(fault for check in checks for fault in check(cells))
    if faults:
        listed = next(iter(faults)) if len(faults) == 1 else "".join(f"\n  {fault}" for fault in faults)
        raise ValueError(f"the grid cannot be run: {listed}".replace(": \n", ":\n"))


def _model_faults(cells: Sequence[Cell]) -> Iterator[str]:
    named = dict.fromkeys(cell.model.model for cell in cells if cell.model.model not in FROM_TRANSFORMERS)
    if not named:
        return
    import lm_eval.models  # noqa: F401 - fills the registry, and imports no model
    from lm_eval.api.registry import model_registry

    known = sorted(model_registry.keys())
    for name in (name for name in named if name not in known):
        yield f"lm-eval has no model {name}{did_you_mean(name, known) or '; it has ' + ', '.join(known)}"


def _kwarg_faults(cells: Sequence[Cell]) -> Iterator[str]:
    """Those of hcot, which knows what it reads; other models take what they like."""
    given = cells[0].grid.gen_kwargs if cells else {}
    if not given or not any(cell.model.ours for cell in cells):
        return
    requests = import_module(REQUESTS)
    try:
        requests.GenerationSettings(1).params({"temperature": 1.0, **given})
    except ValueError as error:
        yield f"gen_kwargs: {error}"


def _checkpoint_faults(cells: Sequence[Cell]) -> Iterator[str]:
    for cell in cells:
        args = cell.model_args
        known = cell.model.model not in FROM_TRANSFORMERS or "gguf_file" in args or "pretrained" not in args
        if not known and read_config(resolve(args["pretrained"]), args.get("revision")) is None:
            name = args["pretrained"]
            yield (
                f"{name} is neither a directory with a {CONFIG_NAME}, nor a bundled checkpoint ({', '.join(BUNDLED)}), "
                f"nor an id on a hub within reach{did_you_mean(name, BUNDLED)}"
            )


def _policy_faults(cells: Sequence[Cell]) -> Iterator[str]:
    for cell in cells:
        if cell.policy is None:
            continue
        allowed, markup = bool(cell.model_args.get("any_policy")), cell.model_args.get("markup")
        try:
            record = record_of(cell.model, cell.model_args)
            settle(record, cell.policy, markup, allow=allowed, policy_argument="policies")
        except ValueError as error:
            yield f"{cell.model.name}: {error}"


# --- tasks ------------------------------------------------------------------------------------------------------------


def _task_faults(cells: Sequence[Cell]) -> Iterator[str]:
    named = dict.fromkeys(name for cell in cells for name in cell.task.split(","))
    names = [name for name in named if "*" not in name and not Path(name).exists()]  # neither a pattern nor a file
    if not names:
        return
    folders = [folder for folder in (tasks_folder(), cells[0].grid.include_path) if folder]
    if set(names) <= known_tasks(folders, usual=False):
        return
    known = known_tasks(folders, usual=True)
    for name in names:
        if name not in known:
            yield f"there is no task {name}{did_you_mean(name, known) or '; `lm_eval ls tasks` lists them'}"


def known_tasks(folders: Sequence[Path], *, usual: bool) -> set[str]:
    """Returns the names of tasks, groups and tags.

    Args:
        folders: of tasks.
        usual: lm-eval's own too, which takes seconds.
    """
    from lm_eval.tasks import TaskManager

    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)  # what it says of tasks belongs into the logs of the cells
    try:
        return set(TaskManager(include_path=[str(folder) for folder in folders], include_defaults=usual).all_tasks)
    finally:
        log.setLevel(level)
