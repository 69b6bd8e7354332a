"""Makes lm-evaluation-harness know our model and our tasks, without a flag, as soon as this package is installed.

lm-eval 0.4.13 looks for neither: models come from a table in `lm_eval.models`, tasks from `lm_eval/tasks` and from
`--include_path`. So a start-up file in site-packages (`hcot_lmeval.pth`; from Python 3.15 on `hcot_lmeval.start`) calls
`start`, which puts one finder on `sys.meta_path`. When, and only when, one of these modules is imported, our part is
added behind it:

    lm_eval.models   the alias ``hcot`` in the model registry
    lm_eval.tasks    our task folder, behind the stock tasks and before the user's `include_path`: later ones win
    lm_eval.evaluator   a look at the arguments before a model of ours is loaded; mistakes end in one line

One thing comes before: if the command line names our model, the threads of PyTorch, which `lm_eval.evaluator` imports,
are told to sleep while they wait (`wait_passively`).

Releases of lm-eval that read entry points find the same things by themselves; then nothing is added here.
``HCOT_LMEVAL_AUTOLOAD=0`` switches the start-up off; the command ``hcot eval`` works all the same.

This module runs at every start of the interpreter: it imports nothing that is not loaded by then, and whatever goes
wrong in it is logged, not raised, since an error in a finder breaks every import of the process.
"""

import os
import sys
from _thread import get_ident

TYPE_CHECKING = False  # typing.TYPE_CHECKING without importing typing
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType

ALIAS = "hcot"
MODEL = "hcot_lmeval.lm:HcotLM"
"""Registered as a string: lm-eval imports it when the alias is first asked for, and `register_model` may replace it."""
CHECKS = "hcot_lmeval.lm.checks"
"""Looks at the arguments of a run; imported when there is one."""
OPT_OUT = "HCOT_LMEVAL_AUTOLOAD"
TASKS_GROUP = "lm_eval.tasks"
"""Entry-point group of task folders, read by releases of lm-eval later than 0.4.13."""


def start() -> None:
    """Installs the finder unless the environment says ``HCOT_LMEVAL_AUTOLOAD=0``; the start-up files call it."""
    if os.environ.get(OPT_OUT) != "0":
        install()


def install() -> None:
    """Makes lm-eval know our model and tasks, now if it is imported already, else when it will be. Idempotent."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
    for name in ADDITIONS:
        if name in sys.modules:
            _add(name)


def main(argv: "Sequence[str]") -> int:
    """The command ``hcot eval``: lm-eval's own ``run`` with our model and tasks in it."""
    from hcot_lmeval.errors import run_command

    install()
    named = any(word.partition("=")[0] in ("--model", "-M", "--config", "-C") for word in argv)
    sys.argv[1:] = ["run", *([] if named else ["--model", ALIAS]), *argv]

    def evaluate() -> None:
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()

    return run_command(evaluate)


def tasks_path() -> str | None:
    """Returns the folder of our tasks: within the package in a wheel, beside it in a checkout; None if it is lost."""
    package = os.path.dirname(os.path.abspath(__file__))
    candidates = (os.path.join(folder, "tasks") for folder in (package, os.path.dirname(package)))
    return next(filter(os.path.isdir, candidates), None)


def register_model() -> None:
    """Adds the alias ``hcot`` to lm-eval's model registry, whose own entries have to be there first.

    `lm_eval.api.registry.get_model` fills an empty registry and no other: registered too early, ours would be alone.
    """
    from lm_eval.api import registry

    if _reads_entry_points() or ALIAS in registry.model_registry:
        return
    registry.model_registry.register(ALIAS, target=MODEL)


def add_tasks() -> None:
    """Patches `TaskManager.__init__` in place: whoever has imported the class already has the patched one too."""
    from lm_eval.tasks import TaskManager

    original = TaskManager.__init__
    if not hasattr(original, "_hcot_lmeval") and not _indexes_entry_points():
        TaskManager.__init__ = _with_our_tasks(original)


def watch_runs() -> None:
    """Has `simple_evaluate` look at what a run of our model was asked for before weights are loaded."""
    from functools import wraps
    from importlib import import_module

    from lm_eval import evaluator

    original = evaluator.simple_evaluate
    if hasattr(original, "_hcot_lmeval"):
        return

    @wraps(original)
    def simple_evaluate(*args: object, **kwargs: object) -> object:
        from hcot_lmeval import errors

        if errors.in_command():
            errors.install()
        model = kwargs.get("model", args[0] if args else None)
        if model == ALIAS or type(model).__module__.startswith("hcot_lmeval."):
            import_module(CHECKS).check_run(original, args, kwargs)
        return original(*args, **kwargs)

    simple_evaluate._hcot_lmeval = True  # type: ignore[attr-defined]
    evaluator.simple_evaluate = simple_evaluate


def wait_passively() -> None:
    """Sets ``OMP_WAIT_POLICY=PASSIVE``, unless it is set, if this is a command such as ``lm_eval --model hcot``.

    By default the threads of PyTorch compute while they wait for each other. A step of a small model lasts
    milliseconds, so beside other work on the same cores it takes several times as long. OpenMP reads the variable once,
    when PyTorch is loaded.
    """
    line = f" {' '.join(sys.argv[1:])} "
    if any(f" {option}{ALIAS} " in line for option in ("--model ", "--model=", "-M ")):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


ADDITIONS: "dict[str, Callable[[], None]]" = {
    "lm_eval.models": register_model,
    "lm_eval.tasks": add_tasks,
    "lm_eval.evaluator": watch_runs,
}
"""Module -> what follows its execution. Both may be repeated, so a reloaded module is served again."""


class Finder:
    """A meta-path finder that finds nothing itself: it lets the others find, and acts after the module has run."""

    def __init__(self) -> None:
        self._asking: set[tuple[int, str]] = set()

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Returns the spec the other finders have for a module of `ADDITIONS`, None for every other module."""
        if name not in ADDITIONS:
            return None
        call = (get_ident(), name)
        if call in self._asking:  # another finder that delegates as we do has asked us back
            return None
        self._asking.add(call)
        try:
            return _followed_by_addition(self._ask_the_others(name, path, target))
        except Exception as error:
            _log(f"cannot follow the import of {name}", error)
            return None
        finally:
            self._asking.discard(call)

    def _ask_the_others(
        self, name: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                return spec
        return None


def _followed_by_addition(spec: "ModuleSpec | None") -> "ModuleSpec | None":
    if spec is None or spec.loader is None:
        return spec
    execute = spec.loader.exec_module

    def exec_module(module: "ModuleType") -> None:
        if module.__name__ == "lm_eval.evaluator":
            wait_passively()
        execute(module)
        if module.__name__ == spec.name:  # some loaders serve many modules
            _add(spec.name)

    # On the loader itself rather than in a wrapper, so that get_source, get_data and the like stay.
    spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


def _add(name: str) -> None:
    try:
        ADDITIONS[name]()
    except Exception as error:
        _log(f"cannot add to {name}", error)


def _with_our_tasks(original: "Callable[..., None]") -> "Callable[..., None]":
    from functools import wraps
    from inspect import signature

    parameters = signature(original)

    @wraps(original)
    def __init__(self: object, *args: object, **kwargs: object) -> None:
        try:
            call = parameters.bind(self, *args, **kwargs)
            call.apply_defaults()
            given = call.arguments["include_path"]
            if call.arguments["include_defaults"]:
                call.arguments["include_path"] = _with_our_path(given)
        except Exception as error:  # a wrong call, of which the original complains better, or an unknown lm-eval
            _log("cannot add our tasks", error)
            return original(self, *args, **kwargs)
        original(*call.args, **call.kwargs)
        self.include_path = given  # type: ignore[attr-defined]

    __init__._hcot_lmeval = True  # type: ignore[attr-defined]
    return __init__


def _with_our_path(given: object) -> object:
    """Our folder before the user's: of several tasks with one name lm-eval takes that of the last folder."""
    ours = tasks_path()
    if ours is None:
        _log("cannot add our tasks", FileNotFoundError(f"no folder 'tasks' in or beside {os.path.dirname(__file__)}"))
        return given
    users = given if isinstance(given, (list, tuple)) else [given] if given else []
    return [ours, *users]


def _reads_entry_points() -> bool:
    """Whether this lm-eval loads models from entry points; `load_plugins` came with that."""
    from lm_eval.api import registry

    return hasattr(registry, "load_plugins")


def _indexes_entry_points() -> bool:
    """Whether this lm-eval indexes the task folders named by entry points, ours included.

    Such a release must name the group, and that one can see in its code. In a checkout the folder lies outside the
    package, where an entry point does not reach, so there we add it in any case.
    """
    inside = tasks_path() == os.path.join(os.path.dirname(os.path.abspath(__file__)), "tasks")
    modules = ("lm_eval.api.registry", "lm_eval.tasks", "lm_eval.tasks.manager", "lm_eval.tasks._index")
    return inside and _reads_entry_points() and any(TASKS_GROUP in _constants_of(name) for name in modules)


def _constants_of(name: str) -> "Iterator[object]":
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if spec is not None and hasattr(spec.loader, "get_code"):
        yield from _constants(spec.loader.get_code(name))


def _constants(code: "CodeType") -> "Iterator[object]":
    for constant in code.co_consts:
        if hasattr(constant, "co_consts"):
            yield from _constants(constant)
        else:
            yield constant


def _log(what: str, error: Exception) -> None:
    from logging import getLogger

    getLogger("hcot_lmeval").warning("hcot_lmeval %s: %s: %s", what, type(error).__name__, error)
