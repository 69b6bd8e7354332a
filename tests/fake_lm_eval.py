"""Writes small stand-ins of lm-eval, to meet releases that are not installed and imports that go wrong."""

from pathlib import Path

REGISTRY = """
class Registry(dict):
    def register(self, alias, target):
        self[alias] = target

model_registry = Registry()
"""
MODELS = """
from lm_eval.api.registry import model_registry
if "dummy" not in model_registry:
    model_registry.register("dummy", target="lm_eval.models.dummy:DummyLM")
"""
TASKS = "from lm_eval.tasks.manager import TaskManager\n"
MANAGER = """
class TaskManager:
    def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
        self.include_path, self.metadata = include_path, metadata
        given = include_path if isinstance(include_path, (list, tuple)) else [include_path] if include_path else []
        self.folders = [*(["stock"] if include_defaults else []), *given]
"""
EVALUATOR = """
import os
policy = os.environ.get("OMP_WAIT_POLICY")
def simple_evaluate(): ...
"""


def write(folder: Path, **changed: str) -> Path:
    """Writes the package `lm_eval` below `folder`, its parts replaced by `changed`, and returns `folder`."""
    sources = {"registry": REGISTRY, "models": MODELS, "tasks": TASKS, "manager": MANAGER} | changed
    files = {
        "__init__.py": "",
        "evaluator.py": EVALUATOR,
        "api/__init__.py": "",
        "api/registry.py": sources["registry"],
        "models/__init__.py": sources["models"],
        "tasks/__init__.py": sources["tasks"],
        "tasks/manager.py": sources["manager"],
    }
    for name, source in files.items():
        path = folder / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder
