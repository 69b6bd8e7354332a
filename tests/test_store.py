"""A line is in the file or it is not, whatever happens to the process; a file is there as a whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.store import JsonLines, StoreError, check_folder, replacing, scan, write_json

HEADER = {"schema": "test/1", "run": {}}
ROWS = [{"n": 0, "text": "é \u2028"}, {"n": 1, "text": "\ud800"}, {"n": 2, "text": "x" * 200_000}]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def written(path, records, **options):
    with JsonLines(path, **options) as store:
        return [store.append(record) for record in records]


def read(path):
    return [record for _, record in scan(path)]


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=3), max_size=5), st.booleans())
def test_what_was_appended_is_there_again(tmp_path_factory, records, durable):
    path = tmp_path_factory.mktemp("store") / "deep" / "a.jsonl"
    places = written(path, records, header=HEADER, durable=durable)
    with JsonLines(path, header=HEADER) as store:
        assert [store.read(place) for place in places] == records
        assert list(store) == list(zip(places, records, strict=True))
        assert not store.is_new
    assert read(path) == [HEADER, *records]


@pytest.mark.parametrize("header", [None, HEADER])
def test_a_line_torn_anywhere_costs_itself_alone(tmp_path, header):
    path = tmp_path / "a.jsonl"
    written(path, ROWS, header=header)
    whole, kept = path.read_bytes(), ROWS[:2]
    last = len(whole) - whole.rfind(b"\n", 0, -1) - 1
    for cut in (1, 2, 3, last // 2, 2**16, last - 1):
        path.write_bytes(whole[:-cut])
        assert read(path)[-2:] == kept
        with JsonLines(path, header=header) as store:
            assert store.torn == last - cut
            store.append({"n": 3})
        assert read(path)[-3:] == [*kept, {"n": 3}]


@pytest.mark.parametrize("rubbish", [b"\x00\xff\n", b"[1]\n", b"\n", b"{\xff}\n"])
def test_rubbish_at_the_end_is_torn_and_within_is_refused(tmp_path, rubbish):
    path = tmp_path / "a.jsonl"
    written(path, ROWS[:2])
    whole = path.read_bytes()
    path.write_bytes(whole + rubbish)
    assert read(path) == ROWS[:2]
    written(path, [ROWS[2]])
    assert read(path) == ROWS
    path.write_bytes(rubbish + whole)
    with pytest.raises(StoreError, match=r"a\.jsonl:1 is no record; mend or remove the line"):
        read(path)
    assert [record for _, record in scan(path, damaged=True)] == ROWS[:2]


@pytest.mark.parametrize("content", [b'{"schema": "else"}\n', b'{"n": 1}\n', b"words", b"words\n"])
def test_another_kind_of_file_is_left_alone(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"in its first line, not 'test/1'; name another file, or move this one"):
        JsonLines(path, header=HEADER)
    assert path.read_bytes() == content


def test_a_line_outlives_a_kill_and_the_lock_does_not(tmp_path):
    path = tmp_path / "a.jsonl"
    code = (
        "import os, signal, sys\nfrom hcot_lmeval.store import JsonLines\n"
        "store = JsonLines(sys.argv[1], durable=False, alone=True)\n"
        "for number in range(5): store.append({'n': number, 'text': 'x' * 5000})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=environment).returncode == -signal.SIGKILL
    with JsonLines(path, alone=True) as store:
        assert [record["n"] for _, record in store] == list(range(5))
        with pytest.raises(StoreError, match="is in use by another run"):
            JsonLines(path, alone=True)
    JsonLines(path, alone=True).close()


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"é": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(KeyboardInterrupt), replacing(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_a_folder_that_nobody_can_write_to_is_told_with_what_was_given(tmp_path):
    check_folder(tmp_path / "new" / "folder", "--out new/folder", "name another")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    places = [
        tmp_path / "file",
        tmp_path / "file" / "below",
        *([Path("/proc/x")] if os.path.isdir("/proc/self") else []),
    ]
    for place in places:
        with pytest.raises(OSError, match=r"^--out here cannot be written to \(.+\); name another$"):
            check_folder(place, "--out here", "name another")
