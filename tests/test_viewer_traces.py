"""Files to traces, and traces to segments and blocks: what the viewer shows is what the rule did."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hcot_lmeval.ablation import Ablation
from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.lm.journal import Journal
from hcot_lmeval.markup import PRESETS
from hcot_lmeval.notes import NoteTaker
from hcot_lmeval.report.viewer.cli import main
from hcot_lmeval.report.viewer.reading import (
    ViewerError,
    cut_at_markers,
    find_sources,
    note_traces,
    pieces,
    plain_traces,
    replay,
    tokenizer_cut,
)
from hcot_lmeval.report.viewer.tree import borders, live_curve, outline_of
from hcot_lmeval.trace import LiveContext, Policy
from tests.random_traces import malformed
from tests.reference import CLOSE, MARKERS, OPEN, SPLIT, rewrite
from tests.result_files import build_run
from tests.strategies import cases
from tests.tiny import favour, tiny_model, tiny_tokenizer
from tests.viewer_files import Page, nested_ids, spell, write_notes, write_rows

HCOT = MARKERS["hcot"]
ROOT = Path(__file__).resolve().parents[1]


def outlined(ids, prompt_len, markers, policy):
    return outline_of(prompt_len, replay(LiveContext(markers, policy), ids[:prompt_len], ids[prompt_len:]))


def texts(trace):
    """(segment, its text) of a trace."""
    segments = outline_of(trace.prompt_tokens, trace.events).segments
    places = borders(trace, segments)
    return [(s, trace.text[places[i] : places[i + 1]]) for i, s in enumerate(segments)]


# --- the tree is that of the rule -------------------------------------------------------------------------------------


@given(cases())
def test_at_every_moment_the_living_segments_are_the_live_context(case):
    ids, prompt_len, markers, policy = case
    outline = outlined(ids, prompt_len, markers, policy)
    assert [i for s in outline.segments for i in range(s.start, s.stop)] == list(range(prompt_len, len(ids)))
    context, heights = LiveContext(markers, policy), live_curve(outline.events)
    for token in ids[:prompt_len]:
        context.push_inert(token)
    for moment in range(prompt_len, len(ids)):
        context.push(ids[moment])
        alive = (s for s in outline.segments if s.gone is None or s.gone > moment)
        living = [i for s in alive for i in range(s.start, min(s.stop, moment + 1))]
        assert living == [i for i in context.source if i >= prompt_len]
        assert heights[moment + 1 - prompt_len] == len(context.live)
    assert outline.statistics.peak_live_tokens == context.peak


@given(cases())
def test_blocks_are_those_of_the_slow_twin(case):
    ids, prompt_len, markers, policy = case
    outline = outlined(ids, prompt_len, markers, policy)
    at = [s.start for s in outline.segments]
    closed = [(at[b.open], at[b.split], at[b.close]) for b in outline.blocks if b.close is not None and b.split]
    twin = rewrite(ids, prompt_len, markers)
    assert sorted(closed, key=lambda b: b[2]) == [(b.open, b.split, b.close) for b in twin.blocks]
    faults = {s.fault.value for s in outline.segments if s.fault} | {
        "unclosed" for b in outline.blocks if b.close is None
    }
    assert faults == set(twin.faults)
    gone = {i: s.gone for s in outline.segments for i in range(s.start, s.stop) if s.gone is not None}
    removed = {i: b.close for b in twin.blocks for i in b.removed}
    if policy == "off":
        assert gone == {}
    elif len(twin.kept) == outline.statistics.live_tokens:  # else a marker stayed that nothing follows
        assert gone == removed


@pytest.mark.parametrize("notation", sorted(MARKERS))
def test_counts_of_blocks_add_up_in_long_malformed_traces(notation):
    markers = MARKERS[notation]
    for seed in range(20):
        ids = [9, *malformed(random.Random(seed), markers, 300)]
        outline = outlined(ids, 1, markers, "recompute")
        at = [s.start for s in outline.segments]
        for block in outline.blocks:
            end = len(ids) if block.close is None else at[block.close]
            assert 1 + block.thought + (block.split is not None) + block.solution == end - at[block.open]
        assert sum(block.pruned for block in outline.blocks) == outline.statistics.pruned_tokens


# --- notes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notation", sorted(MARKERS))
@pytest.mark.parametrize("policy", ["off", "recompute", "evict"])
def test_every_segment_of_notes_has_the_text_of_its_tokens(tmp_path, notation, policy):
    traces = [([9, 9, *malformed(random.Random(seed), MARKERS[notation], 60)], 2) for seed in range(25)]
    (source,) = find_sources([write_notes(tmp_path / "n.jsonl", traces, notation, policy)])
    for (ids, _), trace in zip(traces, note_traces(source), strict=True):
        for segment, text in texts(trace):
            assert text == "".join(spell(token, notation) for token in ids[segment.start : segment.stop])


def test_a_tokenizer_that_writes_the_first_token_otherwise_moves_no_border(tmp_path):
    """As SentencePiece does, which leaves out the space before the first word."""
    ids = [9, 10, OPEN, 11, 12, SPLIT, 13, CLOSE, 14, CLOSE, 15]
    path = tmp_path / "n.jsonl"
    write_notes(path, [(ids, 1)], decode=lambda ids: "".join(f" {spell(i).strip()}" for i in ids).lstrip())
    (trace,) = note_traces(*find_sources([path]))
    assert trace.text == "w10 [THOUGHT] w11 w12 [SOLUTION] w13 [RETURN] w14 [RETURN] w15"
    assert [text for _, text in texts(trace)] == [
        *("w10", " [THOUGHT]", " w11 w12", " [SOLUTION]", " w13", " [RETURN]", " w14", " [RETURN]", " w15")
    ]


def test_notes_without_text_show_ids(tmp_path):
    (trace,) = note_traces(*find_sources([write_notes(tmp_path / "n.jsonl", [([9, 10, OPEN, 11], 1)], decode=None)]))
    assert (trace.prompt, trace.text) == ("9 ", f"10 {OPEN} 11 ")


@pytest.mark.parametrize("variant", ["keep_last:1", "keep_last:0", "oldest", "random", "oracle"])
@pytest.mark.parametrize("policy", ["recompute", "evict"])
def test_notes_of_ablations_show_what_was_thrown_away(tmp_path, variant, policy):
    sweep, ablation, ends = 30, Ablation.parse(variant), []

    def context(prompt_len):
        options = {"prompt_len": prompt_len, "think_end": sweep, "seed": 0}
        ends.append(ablation.context(HCOT, Policy(policy), **options))
        return ends[-1]

    traces = [([9, 9, *nested_ids(seed, 80), sweep, 12], 2) for seed in range(10)]
    path = write_notes(tmp_path / "n.jsonl", traces, policy=policy, context=context, run={"ablation": variant})
    (source,) = find_sources([path])
    assert source.name == f"{policy}, {variant}, 1024"
    for (ids, prompt_len), trace, end in zip(traces, note_traces(source), ends, strict=True):
        live = [i for s, _ in texts(trace) for i in range(s.start, s.stop) if s.gone is None]
        assert live == [i for i in end.source if i >= prompt_len] and len(live) < len(ids) - prompt_len
        assert all(text == "".join(map(spell, ids[s.start : s.stop])) for s, text in texts(trace))


def test_prompts_that_act_may_be_pruned(tmp_path):
    opened = ([9, OPEN, 10, SPLIT, 11, CLOSE, OPEN, 12, SPLIT, 13, CLOSE], 6)  # pruned within the prompt
    left_open = ([9, OPEN, 10, 11, SPLIT, 12, CLOSE, OPEN, 13], 3)  # closed by the model
    (source,) = find_sources([write_notes(tmp_path / "n.jsonl", [opened, left_open], prompt_acts=True)])
    traces = list(note_traces(source))
    assert [trace.prompt_acts for trace in traces] == [True, True]
    assert [outline_of(trace.prompt_tokens, trace.events).statistics.pruned_tokens for trace in traces] == [4, 3]


def test_notes_that_cannot_be_read_are_named(tmp_path):
    path = write_notes(tmp_path / "n.jsonl", [([9, 10, OPEN, 11], 1)])
    whole = path.read_text()
    path.write_text(whole + '{"request": "torn')
    (source,) = find_sources([path])
    assert len(list(note_traces(source))) == 1
    for old, new in (("token_ids", "tokens"), ("Open", "Opened"), ("depth", "deep")):
        path.write_text(whole.replace(f'"{old}"', f'"{new}"'))
        with pytest.raises(ValueError, match=rf"n\.jsonl: toy/0/0/0 is no note: .*({old}|{new})"):
            list(note_traces(source))
    lines = [json.loads(line) for line in whole.splitlines()]
    path.write_text("".join(json.dumps(line | {"offsets": []}) + "\n" for line in lines))
    with pytest.raises(ViewerError, match=r"toy/0/0 of .*: nothing says where token 1 begins"):
        [texts(trace) for trace in note_traces(source)]
    path.write_text(whole.replace("hcot-notes/2", "hcot-notes/1"))
    with pytest.raises(ViewerError, match=r"another version wrote .*/1, not .*/2\).*journal=off"):
        find_sources([path])


CHANGES = {
    "no meta": lambda note: note.update(meta=None),
    "a repeat that is none": lambda note: note["meta"].update(repeat=None),
    "no events": lambda note: note.update(events=[]),
    "no text": lambda note: note.update(text=None),
    "no times": lambda note: note["events"][-1].update(time=None),
    "a span beyond the end": lambda note: note["events"][-2].update(index=40),
    "a span that begins in another": lambda note: note["events"][3].update(index=2),
    "a negative span": lambda note: note["events"][1].update(index=-1),
    "a span that is left out": lambda note: note["events"].pop(3),
    "another token": lambda note: note["token_ids"].__setitem__(2, 77),
    "a prompt of another length": lambda note: note["events"][0].update(tokens=5),
    "a prune of tokens to come": lambda note: prune_of(note)["pruned"].append(30),
    "a prune of what is gone": lambda note: prune_of(note)["pruned"].append(prune_of(note)["pruned"][0]),
    "a prune of a negative place": lambda note: prune_of(note)["pruned"].append(-1),
    "a negative depth": lambda note: prune_of(note).update(depth=-2),
    "offsets beyond the text": lambda note: note["offsets"][-1].__setitem__(1, 10_000),
    "offsets out of order": lambda note: note["offsets"][-1].__setitem__(1, 0),
}


def prune_of(note):
    return next(event for event in note["events"] if event["type"] == "Prune")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_notes_that_were_changed_by_hand_are_refused_in_one_line(tmp_path, capsys, change):
    path = write_notes(tmp_path / "n.jsonl", [([9, OPEN, 10, 11, SPLIT, 12, CLOSE, 13, 14], 1)])
    assert main([str(path), "--terminal"]) == 0
    header, note = map(json.loads, path.read_text().splitlines())
    change(note)
    path.write_text(f"{json.dumps(header)}\n{json.dumps(note)}\n")
    assert main([str(path), "--out", str(tmp_path / "p.html")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "toy/0/0/0 is no note: " in line and not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("run", [{}, {"run": None}, {"run": "x"}])
def test_header_without_a_run_is_refused_in_one_line(tmp_path, capsys, run):
    path = tmp_path / "n.jsonl"
    path.write_text(json.dumps({"schema": "hcot-notes/2", **run}) + "\n")
    assert main([str(path), "--terminal"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "n.jsonl tells no run in its first line" in line


def test_request_that_stands_there_twice_is_shown_once(tmp_path, capsys):
    """As after a journal was torn: the request was generated once more, maybe by another rank. The last one counts."""
    traces = [([9, 10, 11], 1), ([9, OPEN, 12, SPLIT, 13, CLOSE], 1)]
    for number, again in (("0", []), ("1", [([9, 20], 1)])):
        write_notes(tmp_path / "run" / f"{number}.jsonl", again or traces)
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "p.html")]) == 0
    said = capsys.readouterr()
    assert "2 traces" in said.out and "holds 1 request more than once; the last of each is shown" in said.err
    rows = Page((tmp_path / "p.html").read_text()).index["rows"]
    assert sorted((row["doc"], row["generated_tokens"]) for row in rows) == [(0, 1), (1, 5)]


def test_notes_of_a_controlled_run_tell_what_the_decoder_did(tmp_path, capsys):
    """What was forced, illegal and repeated stands among the events and parts runs of text."""
    tokenizer = tiny_tokenizer()
    model = favour(tiny_model("qwen2", torch.float64), [3, 4, 5], 4.0)
    variants = {
        "free": {},
        "loops": {"loop_tokens": 8},
        "all": {"constraints": "grammar", "max_block_tokens": 8, "force_answer": 12, "closing_tokens": 2},
    }
    found = {}
    for name, options in variants.items():
        engine = Engine(model, tokenizer, policy="recompute", self_check=False, **options)
        params = SamplingParams(max_gen_toks=80)
        forced = (40, 41, 42) * 20 if name == "loops" else ()
        requests = [
            Request(f"t/{n}", (20 + n, 30), params, forced_ids=forced, meta={"task": "t", "doc_id": n})
            for n in range(8)
        ]
        with NoteTaker(tmp_path / name / "n.jsonl", engine.decode, run={"pruning": "recompute"}) as notes:
            done = {completion.request.meta["doc_id"]: completion for completion in engine.generate(requests, notes)}
        (source,) = find_sources([tmp_path / name / "n.jsonl"])
        for trace in note_traces(source):
            completion = done[trace.doc_id]
            outline = outline_of(trace.prompt_tokens, trace.events)
            assert outline.statistics == completion.statistics
            live = [i for s in outline.segments for i in range(s.start, s.stop) if s.gone is None]
            assert [completion.token_ids[i - 2] for i in live] == list(completion.live_ids[2:])
            assert "".join(text for _, text in texts(trace)) == trace.text == engine.decode(completion.token_ids)
        found[name] = [completion.statistics for completion in done.values()]
    assert any(stats.illegal_tokens for stats in found["free"])
    assert any(stats.forced for stats in found["all"]) and any(stats.loops for stats in found["loops"])
    assert main([str(tmp_path / "all" / "n.jsonl"), "--terminal", "--limit", "2"]) == 0
    assert "changed by the decoder: " in capsys.readouterr().out


# --- plain traces -----------------------------------------------------------------------------------------------------


@given(st.text())
def test_pieces_joined_are_the_text(text):
    assert "".join(pieces(text)) == text
    tokens = cut_at_markers(f"[THOUGHT]{text}[RETURN]", PRESETS["hcot"], pieces)
    assert "".join(tokens) == f"[THOUGHT]{text}[RETURN]" and tokens[0] == "[THOUGHT]"


def test_plain_traces_follow_the_rule(tmp_path):
    row = {"id": "a", "question": "two words", "text": "so [THOUGHT] one two [SOLUTION] x [RETURN] y", "answer": 4}
    (source,) = find_sources([write_rows(tmp_path / "plain.jsonl", [row])])
    (trace,) = plain_traces(source, PRESETS["hcot"], Policy.RECOMPUTE)
    outline = outline_of(trace.prompt_tokens, trace.events)
    (block,) = outline.blocks
    assert (block.thought, block.solution, block.pruned) == (3, 2, 4)  # the space before a marker is a piece
    assert (trace.unit, trace.gold, outline.statistics.prompt_tokens) == ("piece", "4", 2)
    assert outline.statistics.live_tokens == 2 + 1 + 1 + 1 + 2 + 1 + 1


def test_rows_may_be_compressed_and_broken_ones_are_named(tmp_path):
    path = tmp_path / "plain.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n\n{"text": "y"}\n'))
    (source,) = find_sources([path])
    assert [trace.text for trace in plain_traces(source, PRESETS["hcot"], Policy.OFF)] == ["x", "y"]
    path.write_bytes(b'{"text": "x"}\n[1]\n')
    with pytest.raises(ViewerError, match=r"line 2 is no JSON object; give notes or rows"):
        list(plain_traces(source, PRESETS["hcot"], Policy.OFF))


def test_a_tokenizer_counts_real_tokens():
    cut = tokenizer_cut(str(ROOT / "hcot_lmeval" / "assets" / "tiny-hcot"))
    assert cut("a=b+4") == ["a", "=", "b", "+", "4"]
    assert cut("") == []


def test_missing_columns_and_files_are_named(tmp_path):
    path = write_rows(tmp_path / "plain.jsonl", [{"words": "x"}])
    (source,) = find_sources([path])
    with pytest.raises(ViewerError, match=r"row 1: no column hierarchical_cot or .*, only words; .*--text-column"):
        list(plain_traces(source, PRESETS["hcot"], Policy.OFF))
    with pytest.raises(ViewerError, match="does not exist"):
        find_sources([tmp_path / "no"])
    with pytest.raises(ViewerError, match="given twice"):
        find_sources([path, tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ViewerError, match=r"no notes in .*empty; run lm_eval with the model argument notes=DIR"):
        find_sources([tmp_path / "empty"])


def test_sources_have_names_that_tell_them_apart(tmp_path):
    for name, policy in (("a", "off"), ("b", "recompute"), ("c", "recompute")):
        (tmp_path / name).mkdir()
        write_notes(tmp_path / name / f"{name}.jsonl", [([9, 10], 1)], policy=policy)
    paths = [tmp_path / name for name in "abc"]
    assert [s.name for s in find_sources(paths[:2])] == ["off, 1024", "recompute, 1024"]
    assert [s.name for s in find_sources(paths)] == ["off, 1024 (a)", "recompute, 1024 (b)", "recompute, 1024 (c)"]


def test_sources_are_named_by_their_models_too(tmp_path):
    for name in ("tiny-flat", "tiny-hcot"):
        write_notes(tmp_path / "notes" / f"{name}.jsonl", [([9, 10], 1)], policy="off", run={"name": name})
    assert [s.name for s in find_sources([tmp_path])] == ["tiny-flat, off, 1024", "tiny-hcot, off, 1024"]


def test_notes_are_found_in_the_folder_of_a_cell(tmp_path):
    cell = tmp_path / "cells" / "toy--tiny-hcot"
    build_run(cell / "results", [1])
    journal = Journal(cell / "journal", {})
    journal.add("key", {"text": "[THOUGHT]"})
    with pytest.raises(ViewerError, match=r"no notes in .*toy--tiny-hcot; run lm_eval with .* notes=DIR"):
        find_sources([cell])
    notes = write_notes(cell / "notes" / "n.jsonl", [([9, 10], 1)])
    for folder in (cell, tmp_path):
        (source,) = find_sources([folder])
        assert source.is_notes and source.paths == (notes,)
