"""Names of bundled checkpoints."""

from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from hcot_lmeval import assets
from hcot_lmeval.assets import BUNDLED, resolve
from hcot_lmeval.lm import HcotLM
from tests.installs import ROOT
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A folder of bundled checkpoints with one in it, and an empty working directory."""
    save_tiny(tmp_path / "assets" / "tiny-hcot", tiny_model("qwen2"))
    monkeypatch.setattr(assets, "ROOT", tmp_path / "assets")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "assets"


def test_a_bundled_name_is_its_directory(bundle):
    assert resolve("tiny-hcot") == str(bundle / "tiny-hcot")


@pytest.mark.parametrize(
    "name", ["gpt2", "Qwen/Qwen3-0.6B", "tiny-hcot-2", "./tiny-hcot", "some/tiny-hcot", "", None, object()]
)
def test_other_names_are_left_alone(bundle, name):
    assert resolve(name) == name


def test_what_lies_in_the_working_directory_comes_first(bundle):
    Path("tiny-hcot").mkdir()
    assert resolve("tiny-hcot") == str(bundle / "tiny-hcot")  # a mere directory is no checkpoint
    Path("tiny-hcot", "config.json").touch()
    assert resolve("tiny-hcot") == "tiny-hcot"


def test_a_name_that_this_installation_lacks_is_an_error(bundle):
    with pytest.raises(FileNotFoundError, match=r"'tiny-flat' is not in .*assets; install the package anew"):
        resolve("tiny-flat")


def test_the_bundle_lies_in_the_package():
    assert assets.ROOT == ROOT / "hcot_lmeval" / "assets"
    assert BUNDLED == ("tiny-hcot", "tiny-evict", "tiny-flat")


@pytest.mark.parametrize("builder", [WheelBuilder, SdistBuilder])
def test_wheel_and_sdist_ship_every_file(builder):
    """Whatever lies there, weights, cards and templates, so that a line of .gitignore cannot lose them."""
    folders = [ROOT / "hcot_lmeval" / name for name in ("assets", "templates")]
    wanted = {str(path) for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert len(wanted) >= 5
    assert wanted <= {file.path for file in builder(str(ROOT)).recurse_included_files()}


class TestThroughTheModel:
    def test_the_name_loads_model_and_tokenizer(self, bundle):
        lm = HcotLM(pretrained="tiny-hcot", device="cpu", journal="off")
        assert lm.pretrained == str(bundle / "tiny-hcot")
        assert lm.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
        assert HcotLM(pretrained=tiny_model("qwen2"), tokenizer="tiny-hcot", journal="off").tokenizer.chat_template

    def test_the_journal_knows_the_checkpoint_by_its_files(self, bundle):
        by_name = HcotLM(pretrained="tiny-hcot", device="cpu").run_facts
        assert by_name == HcotLM(pretrained=str(bundle / "tiny-hcot"), device="cpu").run_facts
        save_tiny(bundle / "tiny-hcot", tiny_model("qwen2", seed=1))
        assert HcotLM(pretrained="tiny-hcot", device="cpu").run_facts != by_name
