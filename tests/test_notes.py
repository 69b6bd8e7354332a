"""The note taker: events, what is counted from them, and the file they are kept in."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given

from hcot_lmeval.events import Close, Fault, Finish, Open, Prefill, Prune, Split, Tokens
from hcot_lmeval.notes import SCHEMA, Note, NoteTaker, RunNotes, read_notes
from hcot_lmeval.trace import LiveContext
from tests.reference import MARKERS
from tests.strategies import cases
from tests.viewer_files import note_of

HCOT = MARKERS["hcot"]


def note(ids: list[int], prompt_len: int, policy: str = "recompute") -> Note:
    ticks = iter(range(10_000))
    return note_of(ids, prompt_len, LiveContext(HCOT, policy), clock=lambda: float(next(ticks)))


def test_one_event_for_each_thing_that_happens():
    o, s, c = HCOT.open, HCOT.split, HCOT.close
    ids = [90, 91, o, 92, 93, s, 94, c, 95, c]
    events = note(ids, 2).events
    kinds = [type(event) for event in events]
    assert kinds == [Prefill, Open, Tokens, Split, Tokens, Prune, Tokens, Fault, Tokens, Finish]
    prune = events[5]
    assert (prune.index, prune.depth, prune.pruned, prune.reforwarded, prune.live) == (7, 0, (3, 4, 5), 1, 5)
    assert events[2].ids == (92, 93)
    assert events[7].kind == "stray_close"


def test_a_block_closed_without_a_prune_is_a_close():
    o, s, c = HCOT.open, HCOT.split, HCOT.close
    for policy, ids in (("off", [90, o, 91, s, 92, c]), ("recompute", [90, o, 91, c])):
        found = note(ids, 1, policy)
        assert isinstance(found.events[-2], Close)
        found = found.statistics
        assert (found.blocks, found.prune_events, found.pruned_tokens) == (1, 0, 0)


@given(cases())
def test_counts_equal_the_live_context_after_every_token(case):
    ids, prompt_len, markers, policy = case
    context = LiveContext(markers, policy)
    found = note_of(ids, prompt_len, context).statistics
    assert found.prompt_tokens == prompt_len
    assert found.generated_tokens == len(ids) - prompt_len
    assert found.live_tokens == len(context.live)
    assert found.peak_live_tokens == context.peak
    assert found.prompt_tokens + found.generated_tokens - found.pruned_tokens == found.live_tokens
    area, again = 0, LiveContext(markers, policy)
    for index, token in enumerate(ids):
        if index < prompt_len:
            again.push_inert(token)
        else:
            again.push(token)
            area += len(again.live)
    assert found.live_token_steps == area


@given(cases())
def test_the_events_hold_the_whole_trace(case):
    ids, prompt_len, markers, policy = case
    rebuilt = []
    for event in note_of(ids, prompt_len, LiveContext(markers, policy)).events:
        if isinstance(event, Tokens):
            rebuilt += event.ids
        elif isinstance(event, (Open, Split, Close, Prune)):
            rebuilt.append(event.id)
    assert rebuilt == ids[prompt_len:]


def test_written_and_read_back(tmp_path):
    notes = [note([90, HCOT.open, 91, HCOT.split, 92, HCOT.close, 93], 1, p) for p in ("recompute", "evict", "off")]
    path = tmp_path / "deep" / "run.jsonl"
    with NoteTaker(path, decode=lambda ids: " ".join(map(str, ids)), run={"model": "m"}) as taker:
        for one in notes:
            taker.add(one)
    assert read_notes(path) == notes
    header, first, *_ = map(json.loads, path.read_text().splitlines())
    assert header == {"schema": SCHEMA, "run": {"model": "m"}}
    assert first["statistics"] == notes[0].statistics.as_dict()
    prune = next(event for event in first["events"] if event["type"] == "Prune")
    assert (prune["pruned"], prune["pruned_text"]) == ([2, 3], f"91 {HCOT.split}")
    text, offsets = first["text"], dict(map(tuple, first["offsets"]))
    assert {index: text[at:].split()[0] for index, at in offsets.items()} == {
        1: f"{HCOT.open}", 2: "91", 3: f"{HCOT.split}", 4: "92", 5: f"{HCOT.close}", 6: "93",
    }  # fmt: skip


def test_two_runs_that_write_at_once_leave_what_can_be_read(tmp_path):
    path = tmp_path / "run.jsonl"
    notes = [note([90, 91], 1), note([90, 92], 1)]
    for one in notes:
        NoteTaker(tmp_path / f"{one.token_ids}.jsonl").add(one)
    first, second = ((tmp_path / f"{one.token_ids}.jsonl").read_text() for one in notes)
    path.write_text(first + '{"request": "half' + "\n" + second)
    assert read_notes(path) == notes


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"schema": "something else"}\n')
    for make in (NoteTaker, read_notes):
        with pytest.raises(ValueError, match=SCHEMA):
            make(path)
    assert path.read_text() == '{"schema": "something else"}\n'


def test_one_request_counts_once_and_notes_without_meta_are_each_their_own(tmp_path):
    """A run that goes on writes the same request again, perhaps as another rank; a chat counts its replies anew."""
    asked, elsewhere = note([90, 91], 1), note([89, 91], 1)
    again = replace(asked, token_ids=(92,), events=note([90, 92], 1).events)
    for name, meta in (("run", {"task": "t", "doc_id": 0, "repeat": 0}), ("chat", {})):
        paths = [tmp_path / f"{name}{rank}.jsonl" for rank in range(2)]
        for path, some in zip(paths, ([asked, elsewhere], [again]), strict=True):
            with NoteTaker(path) as taker:
                for one in some:
                    taker.add(replace(one, request="1", meta=meta))
        found = RunNotes(paths)
        tokens = [one.token_ids for one in found]
        assert (tokens, found.repeated) == (([(91,), (92,)], 1) if meta else ([(91,), (91,), (92,)], 0))
