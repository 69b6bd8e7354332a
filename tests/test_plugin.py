"""The plugin in its host: lm-eval in a fresh environment in which the package has just been installed.

Where the behaviour of lm-eval itself matters the tests run the real one. What it may become, and what may go wrong
around it, is played by stand-ins (`fake_lm_eval`).
"""

import json
import re
from functools import cache
from pathlib import Path

import lm_eval.tasks
import pytest

from tests import fake_lm_eval
from tests.installs import KINDS, Install, install

OVERRIDDEN = ["aime24"]
"""The stock tasks that ours stand in for."""

# lm-eval indexes 14,000 files in ten seconds; a folder with one stock task does.
ONE_STOCK_TASK = """
import shutil, tempfile, pathlib, lm_eval.tasks.manager as manager
stock = pathlib.Path(tempfile.mkdtemp())
shutil.copytree(pathlib.Path(manager.__file__).parent / "aime", stock / "aime")
manager.__file__ = str(stock / "manager.py")
"""
REPORT = """
import json, logging, pathlib, sys
from lm_eval.api.registry import get_model, model_registry
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
logging.disable(logging.NOTSET)
records = []
log = logging.getLogger("lm_eval.tasks._index")
log.propagate = False
log.addHandler(type("Keep", (logging.Handler,), {"emit": lambda self, record: records.append(record)})())
manager = TaskManager()
said = {
    "paths": {name: str(entry.yaml_path) for name, entry in manager.task_index.items()},
    "overridden": [record.args[0] for record in records if "overrides" in record.msg],
    "signature": list(__import__("inspect").signature(TaskManager).parameters),
    "dummy": get_model("dummy").__name__,
    "models": list(model_registry),
    "hcot": str(model_registry._objs.get("hcot")),
}
try:
    TaskManager(include_pathh="x")
except TypeError as error:
    said["wrong call"] = str(error)
if "hcot" in model_registry:
    from hcot_lmeval.plugin import tasks_path
    said["folder"] = tasks_path()
    said["ours"] = sorted(TaskIndex.build([pathlib.Path(tasks_path())]))
    given = sys.argv[1:]
    alone = TaskManager(include_path=given[0], include_defaults=False)
    said["without defaults"] = sorted(alone.all_tasks)
    said["given"] = []
    for include_path in (given[0], given, tuple(given), pathlib.Path(given[0])):
        made = TaskManager(None, include_path)
        paths = [str(made.task_index[name].yaml_path) for name in ("aime24", "aime24_boxed", "aime25")]
        said["given"].append([made.include_path == include_path, *paths])
    said["class"] = f"{get_model('hcot').__module__} {get_model('hcot').__name__}"
print(json.dumps(said))
"""
"""What the real lm-eval says, in one process; its argument is a folder of a user's own task `aime24`."""


@pytest.fixture(scope="module", params=KINDS)
def installed(request, tmp_path_factory) -> Install:
    return install(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Install:
    return install("wheel", tmp_path_factory.getbasetemp())


@cache
def report_of(installed: Install, autoload: str) -> dict:
    folder = installed.folder / "users"
    folder.mkdir(exist_ok=True)
    done = installed.run("python", "-c", ONE_STOCK_TASK + REPORT, user_folder(folder), HCOT_LMEVAL_AUTOLOAD=autoload)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report(installed) -> dict:
    return report_of(installed, "1")


def user_folder(folder: Path, name: str = "aime24") -> Path:
    """A user's own task, offline, of the given name."""
    data = folder / "data.jsonl"
    data.write_text('{"question": "1 + 1 =", "answer": "2"}\n{"question": "2 + 2 =", "answer": "4"}\n')
    (folder / "task.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: []}\nmetric_list: [{metric: exact_match}]\n"
    )
    return folder


# The real lm-eval


def test_every_task_of_ours_is_found_where_it_was_installed(report):
    assert {"aime24", "aime24_boxed", "polymath", "polymath_en"} <= set(report["ours"])
    paths = {report["paths"][name] for name in report["ours"]}
    assert {path for path in paths if not path.startswith(report["folder"])} <= {"None"}  # None: a tag


def test_our_tasks_stand_in_for_the_stock_ones_they_should_and_no_others(wheel):
    """Among all stock tasks. A tag counts: one of ours with the name of a stock tag would empty that tag."""
    ours, theirs = set(report_of(wheel, "1")["ours"]), yaml_names(Path(lm_eval.tasks.__file__).parent)
    assert ours & theirs == set(OVERRIDDEN) == set(report_of(wheel, "1")["overridden"])


def yaml_names(folder: Path) -> set[str]:
    """The names of tasks, groups and tags in the files of a folder."""
    name = re.compile(r"^(?:task|group|tag): *([\w-]+) *$|^ +- +([\w-]+) *$", re.MULTILINE)
    texts = (path.read_text(encoding="utf-8") for path in folder.rglob("*.y*ml"))
    return {word for text in texts for pair in name.findall(text) for word in pair if word}


def test_stock_tasks_are_still_there(report):
    assert "aime25" in report["paths"]


@pytest.mark.parametrize("form", range(4), ids=["text", "list", "tuple", "path"])
def test_users_include_path_wins_over_ours_and_ours_over_stock(report, form):
    untouched, users, ours, stock = report["given"][form]
    assert untouched and users.endswith("/users/task.yaml")
    assert ours.startswith(report["folder"])
    assert stock.endswith("/aime/aime25.yaml") and "hcot_lmeval" not in stock


def test_without_defaults_ours_are_out_too(report):
    assert report["without defaults"] == ["aime24"]


@pytest.mark.parametrize("what", ["signature", "wrong call", "dummy"])
def test_what_is_lm_evals_own_is_as_without_us(installed, report, what):
    assert report[what] == report_of(installed, "0")[what]
    expected = {
        "signature": ["verbosity", "include_path", "include_defaults", "metadata"],
        "wrong call": "TaskManager.__init__() got an unexpected keyword argument 'include_pathh'",
        "dummy": "DummyLM",
    }
    assert report[what] == expected[what]


def test_models_of_lm_eval_resolve_beside_ours(report):
    assert "hf" in report["models"] and len(report["models"]) > 30
    assert report["hcot"] == "hcot_lmeval.lm:HcotLM"
    assert report["class"] == "hcot_lmeval.lm.model HcotLM"


def test_opt_out_leaves_lm_eval_as_it_is(installed):
    found = report_of(installed, "0")
    assert "hcot" not in found["models"] and "aime24_boxed" not in found["paths"]


def command(installed: Install, *arguments: str, **environment: str) -> str:
    """Returns what lm-eval's command line prints."""
    run = "import sys; from lm_eval.__main__ import cli_evaluate as run; sys.argv[0] = 'lm_eval'; run()"
    done = installed.run("python", "-c", ONE_STOCK_TASK + run, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_runs_a_stock_model_on_a_users_task(wheel, tmp_path):
    arguments = ["--model", "dummy", "--tasks", "mine", "--include_path", str(user_folder(tmp_path, "mine"))]
    table = command(wheel, *arguments, HF_HOME=str(tmp_path / "cache"))
    assert [row for row in table.splitlines() if row.startswith("|mine") and "exact_match" in row], table


def test_command_lists_our_groups(wheel):
    rows = [row.split("|") for row in command(wheel, "ls", "groups").splitlines() if row.count("|") == 3]
    folders = {name.strip(): folder.strip() for _, name, folder, _ in rows}
    assert folders["polymath"] == f"{report_of(wheel, '1')['folder']}/polymath/polymath.yaml"


# Stand-ins


@pytest.fixture
def fake(tmp_path):
    """Writes a stand-in of lm-eval; PYTHONPATH puts it before the real one."""
    return lambda **changed: str(fake_lm_eval.write(tmp_path, **changed))


SHOW = """
from lm_eval.api.registry import model_registry
import lm_eval.models
from lm_eval.tasks import TaskManager
print(sorted(model_registry), len(TaskManager().folders))
"""


def test_nothing_of_lm_eval_is_imported_before_it_is_wanted(wheel, fake):
    code = "import sys; print([name for name in sys.modules if name.startswith('lm_eval')])"
    assert wheel.python_says(code, PYTHONPATH=fake()) == "[]"


def test_finding_a_spec_does_not_disarm_the_hook(wheel, fake):
    code = "import importlib.util as u; u.find_spec('lm_eval.models'); u.find_spec('lm_eval.tasks')" + SHOW
    assert wheel.python_says(code, PYTHONPATH=fake()) == "['dummy', 'hcot'] 2"


def test_reload_and_a_second_import_are_served_again(wheel, fake):
    code = "import importlib, sys, lm_eval.tasks, lm_eval.models; importlib.reload(lm_eval.models)\n"
    code += "for name in [n for n in sys.modules if n.startswith('lm_eval')]: del sys.modules[name]" + SHOW
    assert wheel.python_says(code, PYTHONPATH=fake()) == "['dummy', 'hcot'] 2"


@pytest.mark.parametrize(
    ("arguments", "given", "policy"),
    [
        (["--model", "hcot", "--tasks", "aime24"], None, "PASSIVE"),
        (["run", "--tasks", "aime24", "--model=hcot"], None, "PASSIVE"),
        (["--model", "hcot"], "ACTIVE", "ACTIVE"),
        (["--model", "hf", "--tasks", "hcot"], None, "None"),
        ([], None, "None"),
    ],
)
def test_threads_sleep_while_they_wait_if_the_command_names_our_model(wheel, fake, arguments, given, policy):
    """PyTorch is loaded by `lm_eval.evaluator`, and reads the variable then."""
    code = f"import sys; sys.argv[1:] = {arguments}; import lm_eval.evaluator as evaluator; print(evaluator.policy)"
    environment = {} if given is None else {"OMP_WAIT_POLICY": given}
    assert wheel.python_says(code, PYTHONPATH=fake(), **environment) == policy


def test_lm_eval_imported_first(wheel, fake):
    """Even a class imported earlier by name adds our tasks: it was patched, not replaced."""
    code = """
import lm_eval.models
from lm_eval.tasks import TaskManager
from lm_eval.api.registry import model_registry
import hcot_lmeval.plugin as plugin
print("hcot" in model_registry, len(TaskManager().folders))
plugin.install(); plugin.install()
print("hcot" in model_registry, len(TaskManager().folders))
"""
    says = wheel.python_says(code, PYTHONPATH=fake(), HCOT_LMEVAL_AUTOLOAD="0")
    assert says.splitlines() == ["False 1", "True 2"]


def test_another_finder_that_delegates_too(wheel, fake):
    code = """
import sys
class Other:
    def find_spec(self, name, path=None, target=None):
        specs = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
        return next((spec for spec in specs if spec), None)
sys.meta_path.insert(1, Other())
"""
    assert wheel.python_says(code + SHOW, PYTHONPATH=fake()) == "['dummy', 'hcot'] 2"


def test_finder_that_fails_is_left_to_the_import_system(wheel, fake):
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "lm_eval.models":
            raise RuntimeError("not mine")
sys.meta_path.insert(1, Broken())
try:
    import lm_eval.models
except RuntimeError as error:
    print(error)
import json.tool
"""
    done = wheel.run("python", "-c", code, PYTHONPATH=fake())
    assert (done.returncode, done.stdout.strip()) == (0, "not mine"), done.stderr
    assert "cannot follow the import of lm_eval.models: RuntimeError: not mine" in done.stderr


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"registry": "model_registry = {}\n", "models": ""}, "cannot add to lm_eval.models: AttributeError"),
        ({"tasks": "", "manager": ""}, "cannot add to lm_eval.tasks: ImportError"),
        (
            {"manager": "class TaskManager:\n    def __init__(self, folders=()): print('made')\n"},
            "cannot add our tasks: KeyError: 'include_path'",
        ),
    ],
)
def test_lm_eval_that_changed_is_a_warning_and_never_an_error(wheel, fake, changed, complaint):
    code = "import lm_eval.models, lm_eval.tasks as t; getattr(t, 'TaskManager', list)(); print('alive')"
    done = wheel.run("python", "-c", code, PYTHONPATH=fake(**changed))
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "alive", done.stderr
    assert complaint in done.stderr


def test_error_within_lm_eval_is_lm_evals_own(wheel, fake):
    done = wheel.run("python", "-c", "import lm_eval.models", PYTHONPATH=fake(models="raise ValueError('theirs')"))
    assert done.returncode == 1 and "ValueError: theirs" in done.stderr


LOADS_PLUGINS = fake_lm_eval.REGISTRY + "def load_plugins(group, registry): ...\n"


def test_stands_down_where_lm_eval_reads_models_from_entry_points(wheel, fake):
    """No release reads tasks from them before it reads models; where it does not, the task folder is still added."""
    assert wheel.python_says(SHOW, PYTHONPATH=fake(registry=LOADS_PLUGINS)) == "['dummy'] 2"


def test_stands_down_where_lm_eval_reads_tasks_from_entry_points(installed, fake):
    """Not in a checkout: an entry point names a package, and there the folder is in none."""
    manager = fake_lm_eval.MANAGER + "\ndef folders():\n    return entry_points(group='lm_eval.tasks')\n"
    says = installed.python_says(SHOW, PYTHONPATH=fake(registry=LOADS_PLUGINS, manager=manager))
    assert says == ("['dummy'] 1" if installed.folder.name == "wheel" else "['dummy'] 2")


def test_left_over_startup_file_is_silent(wheel, tmp_path):
    """The package removed by hand, its .pth forgotten."""
    (tmp_path / "hcot_lmeval.pth").write_bytes((wheel.site_packages / "hcot_lmeval.pth").read_bytes())
    code = f"""
import sys, site
sys.modules["hcot_lmeval"] = None
site.addsitedir({str(tmp_path)!r})
print("alive")
"""
    assert wheel.python_says(code) == "alive"
