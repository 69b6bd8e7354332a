"""Following notes that grow: what is counted, once each, whatever the file looks like meanwhile."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from hcot_lmeval.notes import NotesFile
from hcot_lmeval.watch import Watch, main
from tests.viewer_files import nested_ids, write_notes


def shown(watch: Watch, now: float = 0.0) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(watch.shown(now))
    return console.file.getvalue()


def cells(text: str) -> list[str]:
    """The cells of the first line below the head."""
    return [cell for cell in text.splitlines()[1].split("  ") if cell.strip()]


@pytest.fixture
def whole(tmp_path):
    """A file of ten notes, outside of what is watched."""
    return write_notes(tmp_path / "whole.jsonl", [([9, *nested_ids(seed, 40)], 1) for seed in range(10)])


def test_each_request_is_counted_once_while_the_file_grows(tmp_path, whole):
    folder = tmp_path / "notes"
    watch = Watch(folder)
    watch.read()
    assert "holds no notes yet; it is the folder of the model argument notes=DIR" in shown(watch)
    folder.mkdir()
    content, file = whole.read_bytes(), folder / "n.jsonl"
    for length in range(0, len(content) + 997, 997):  # lines that are half there are left for later
        file.write_bytes(content[:length])
        watch.read(now=float(length))
    expected = [note.statistics for note in NotesFile(whole)]
    done, minute, generated, pruned, prunes, peak, malformed, *_ = [c.strip() for c in cells(shown(watch, 1e9))[2:]]
    assert (done, minute) == ("10", "0")
    total = sum(e.generated_tokens for e in expected)
    assert generated == f"{total / 10:,.0f}" and prunes == f"{sum(e.prune_events for e in expected) / 10:.1f}"
    assert pruned == f"{sum(e.pruned_tokens for e in expected) / total:.0%}" != "0%"
    assert (
        peak
        == f"{sum(e.peak_live_tokens for e in expected) / 10:,.0f}, largest {max(e.peak_live_tokens for e in expected)}"
    )
    assert malformed == f"{sum(sum(e.malformed.values()) for e in expected)}"
    with pytest.raises(ValueError, match="another file now"):
        file.write_bytes(content[:300])
        watch.read()


def test_a_minute_counts_what_came_within_it(tmp_path, whole):
    lines = whole.read_bytes().splitlines(keepends=True)
    file = tmp_path / "n.jsonl"
    file.write_bytes(b"".join(lines[:5]))
    watch = Watch(file)
    watch.read()
    file.write_bytes(b"".join(lines[:8]))
    watch.read(now=100.0)
    file.write_bytes(b"".join(lines))
    watch.read(now=130.0)
    assert [cells(shown(watch, now))[3].strip() for now in (130.0, 170.0, 200.0)] == ["6", "3", "0"]


def test_lines_that_are_no_notes_are_said_and_not_counted(tmp_path, whole):
    lines = whole.read_text().splitlines()
    broken = {**json.loads(lines[1]), "statistics": {"tokens": 3}}
    whole.write_text("\n".join([*lines, json.dumps(broken), json.dumps({"request": 1}), "[1]"]) + "\n")
    watch = Watch(whole)
    watch.read()
    text = shown(watch)
    assert cells(text)[2].strip() == "10" and "2 lines are no notes" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{0}/none", "--once"], "none does not exist; give a file or folder of notes"),
        (["{0}/rows.jsonl"], "rows.jsonl holds no notes"),
        (["{0}", "--every", "0"], "--every 0.0 is not allowed; give seconds from 0.1 to 3600"),
        (["{0}", "--every", "nan"], "--every nan is not allowed"),
    ],
)
def test_what_cannot_be_watched_is_one_line(tmp_path, capsys, arguments, told):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert main([argument.format(tmp_path) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_request_that_stands_there_twice_is_counted_once(tmp_path, whole):
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(whole.read_bytes())
    watch = Watch(folder)
    watch.read()
    text = shown(watch)
    assert cells(text)[2].strip() == "10" and "10 requests stand here once more, and are counted once" in text


def test_once_prints_and_ends(whole, capsys):
    assert main([str(whole), "--once"]) == 0
    assert "toy" in capsys.readouterr().out
