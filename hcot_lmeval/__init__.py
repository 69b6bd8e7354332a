"""Run, measure and train language models that prune their own chain of thought.

The public names below are imported when first used, so that `import hcot_lmeval` costs nothing: that happens at every
start of an interpreter in which the package is installed (see `plugin`).
"""

__version__ = "0.1.0"

_HOME = {
    "Completion": "engine",
    "Engine": "engine",
    "Grade": "answers",
    "Markup": "markup",
    "NoteTaker": "notes",
    "Policy": "trace",
    "PrunedGeneration": "generation",
    "Request": "engine",
    "Response": "response",
    "SamplingParams": "engine",
    "Statistics": "events",
    "compile_trace": "trace",
    "extract_answer": "answers",
    "generate": "generation",
    "get_markup": "markup",
    "grade": "answers",
}
"""Public name -> the module that defines it."""

__all__ = ["__version__", *_HOME]

TYPE_CHECKING = False  # typing.TYPE_CHECKING without importing typing
if TYPE_CHECKING:
    from hcot_lmeval.answers import Grade as Grade
    from hcot_lmeval.answers import extract_answer as extract_answer
    from hcot_lmeval.answers import grade as grade
    from hcot_lmeval.engine import Completion as Completion
    from hcot_lmeval.engine import Engine as Engine
    from hcot_lmeval.engine import Request as Request
    from hcot_lmeval.engine import SamplingParams as SamplingParams
    from hcot_lmeval.events import Statistics as Statistics
    from hcot_lmeval.generation import PrunedGeneration as PrunedGeneration
    from hcot_lmeval.generation import generate as generate
    from hcot_lmeval.markup import Markup as Markup
    from hcot_lmeval.markup import get_markup as get_markup
    from hcot_lmeval.notes import NoteTaker as NoteTaker
    from hcot_lmeval.response import Response as Response
    from hcot_lmeval.trace import Policy as Policy
    from hcot_lmeval.trace import compile_trace as compile_trace


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=_this())
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def _this() -> object:
    import sys

    return sys.modules[__name__]
