"""What was finished is found again, and nothing else is."""

import json

import pytest

from hcot_lmeval.lm.journal import Journal, default_root
from hcot_lmeval.provenance import digest

RUN = {"model": "m", "pruning": "recompute", "max_context": 128}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "journal"


def fill(root, keys, run=RUN, rank=0):
    journal = Journal(root, run, rank)
    for key in keys:
        journal.add(key, {"response": {"answer": f"of {key}"}})
    journal.close()
    return journal


def test_a_finished_request_is_found_by_the_next_run(root):
    fill(root, ["a", "b"])
    again = Journal(root, RUN)
    assert len(again) == 2
    assert again.get("b") == {"response": {"answer": "of b"}}
    assert again.get("c") is None
    assert "a" in again
    assert "c" not in again


def test_a_record_is_found_by_the_run_that_wrote_it(root):
    journal = fill(root, ["a"])
    assert journal.get("a") == {"response": {"answer": "of a"}}


@pytest.mark.parametrize("change", [{"model": "n"}, {"pruning": "off"}, {"max_context": 129}, {"new": 1}])
def test_results_of_other_arguments_are_never_reused(root, change):
    fill(root, ["a"])
    other = Journal(root, RUN | change)
    assert other.get("a") is None
    fill(root, ["a"], RUN | change)
    assert len(list(root.iterdir())) == 2  # and neither run writes where the other reads


def test_a_file_with_a_foreign_header_is_left_alone(root, caplog):
    directory = fill(root, ["a"]).directory
    stranger = directory / "stranger.jsonl"
    header = {"schema": "hcot-journal/1", "fingerprint": "0" * 64, "run": {}}
    stranger.write_text(json.dumps(header) + '\n{"key": "x"}\n')
    again = Journal(root, RUN)
    assert "a" in again
    assert "x" not in again
    assert "another kind of run" in caplog.text


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_not_a_record(root, cut):
    directory = fill(root, ["a", "b"]).directory
    (path,) = directory.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(root, RUN)
    assert again.get("a") == {"response": {"answer": "of a"}}
    assert again.get("b") is None
    again.add("b", {"response": {"answer": "new"}})  # into a file of its own, not behind the torn line
    assert Journal(root, RUN).get("b") == {"response": {"answer": "new"}}
    assert Journal(root, RUN).get("a") == {"response": {"answer": "of a"}}


def test_a_torn_header_means_an_empty_file(root):
    directory = fill(root, ["a"]).directory
    (path,) = directory.iterdir()
    path.write_bytes(path.read_bytes()[:10])
    assert len(Journal(root, RUN)) == 0


def test_rubbish_between_the_lines_is_skipped(root):
    directory = fill(root, ["a", "b"]).directory
    (path,) = directory.iterdir()
    header, first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + b"\xff\x00 not json\n[1]\n" + first + b"{}\n" + second)
    again = Journal(root, RUN)
    assert [again.get(key) for key in "ab"] == [{"response": {"answer": f"of {key}"}} for key in "ab"]


def test_ranks_write_apart_and_read_all(root):
    first, second = Journal(root, RUN, rank=0), Journal(root, RUN, rank=1)
    first.add("a", {"response": 1})
    second.add("b", {"response": 2})
    assert len(list(first.directory.iterdir())) == 2
    assert "b" not in first
    first.refresh()
    assert first.get("b") == {"response": 2}


def test_nothing_is_written_before_something_is_finished(root):
    Journal(root, RUN).close()
    assert not root.exists()


def test_digest_depends_on_the_value_alone():
    assert digest({"a": 1, "b": [2, "é"]}) == digest({"b": [2, "é"], "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})
    with pytest.raises(TypeError):
        digest({"a": object()})


def test_default_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HCOT_LMEVAL_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "journal"
    monkeypatch.delenv("HCOT_LMEVAL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_root() == tmp_path / "home" / ".cache" / "hcot_lmeval" / "journal"
