"""The viewer without a browser: replays, texts, formulas, verdicts, the page's parts, the terminal, the command."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcot_lmeval.ablation import Ablation
from hcot_lmeval.lm.journal import Journal
from hcot_lmeval.markup import PRESETS
from hcot_lmeval.report.viewer import mathml as math_module
from hcot_lmeval.report.viewer.build import write_page
from hcot_lmeval.report.viewer.cli import main
from hcot_lmeval.report.viewer.mathml import ATTRIBUTES, TAGS, formulas, mathml
from hcot_lmeval.report.viewer.notes_traces import locate, note_traces, spread
from hcot_lmeval.report.viewer.payload import _units, shorten_titles
from hcot_lmeval.report.viewer.plain_traces import cut_at_markers, pieces, plain_traces, tokenizer_cut
from hcot_lmeval.report.viewer.reading import Columns, ViewerError, find_sources
from hcot_lmeval.report.viewer.terminal import Style, curve, print_trace
from hcot_lmeval.report.viewer.tree import live_curve, outline_of, replay
from hcot_lmeval.report.viewer.verdicts import Verdicts, read_verdicts
from hcot_lmeval.report.viewer.visible import visible
from hcot_lmeval.trace import Kind, LiveContext, Policy
from tests.random_traces import malformed
from tests.reference import CLOSE, MARKERS, OPEN, SPLIT, rewrite
from tests.result_files import build_run
from tests.strategies import cases
from tests.viewer_files import Page, nested_ids, spell, write_notes, write_rows

HCOT = MARKERS["hcot"]
ROOT = Path(__file__).resolve().parents[1]


def outlined(ids, prompt_len, markers, policy):
    return replay(LiveContext(markers, policy), ids[:prompt_len], ids[prompt_len:])


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
        living = [i for s in outline.segments if s.alive(moment) for i in range(s.start, min(s.stop, moment + 1))]
        assert living == [i for i in context.source if i >= prompt_len]
        assert heights[moment + 1 - prompt_len] == len(context.live)
    assert outline.live == context.source
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
    elif len(rewrite(ids, prompt_len, markers).kept) == len(outline.live):  # else a marker stayed that nothing follows
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
def test_notes_are_replayed_and_every_marker_is_found_in_the_text(tmp_path, notation, policy):
    markers = MARKERS[notation]
    traces = [([9, 9, *malformed(random.Random(seed), markers, 60)], 2) for seed in range(25)]
    (source,) = find_sources([write_notes(tmp_path / "n.jsonl", traces, notation, policy)])
    for (ids, prompt_len), trace in zip(traces, note_traces(source), strict=True):
        outline = outline_of(trace)
        borders = [trace.offsets[s.start - prompt_len] for s in outline.segments] + [len(trace.text)]
        for place, segment in enumerate(outline.segments):
            tokens = ids[segment.start : segment.stop]
            assert trace.text[borders[place] : borders[place + 1]] == "".join(spell(t, notation) for t in tokens)


def test_notes_without_text_show_ids(tmp_path):
    (source,) = find_sources([write_notes(tmp_path / "n.jsonl", [([9, 10, OPEN, 11], 1)], decode=False)])
    (trace,) = note_traces(source)
    assert (trace.prompt, trace.text) == ("9", f"10 {OPEN} 11 ")


@pytest.mark.parametrize("variant", ["keep_last:1", "keep_last:0", "oldest", "random", "oracle"])
@pytest.mark.parametrize("policy", ["recompute", "evict"])
def test_notes_of_ablations_are_replayed(tmp_path, variant, policy):
    sweep, ablation = 30, Ablation.parse(variant)

    def context(prompt_len):
        return ablation.context(HCOT, Policy(policy), prompt_len=prompt_len, think_end=sweep, seed=0)

    traces = [([9, 9, *nested_ids(seed, 80), sweep, 12], 2) for seed in range(10)]
    path = write_notes(tmp_path / "n.jsonl", traces, policy=policy, context=context, run={"ablation": variant})
    (source,) = find_sources([path])
    outlines = [outline_of(trace) for trace in note_traces(source)]
    assert sum(outline.statistics.prune_events for outline in outlines) > 0
    assert source.name == f"{policy}, {variant}, 1024"


def test_prompts_that_act_are_recognised(tmp_path):
    opened = ([9, OPEN, 10, SPLIT, 11, CLOSE, OPEN, 12, SPLIT, 13, CLOSE], 6)  # pruned within the prompt
    left_open = ([9, OPEN, 10, 11, SPLIT, 12, CLOSE, OPEN, 13], 3)  # closed by the model
    (source,) = find_sources([write_notes(tmp_path / "n.jsonl", [opened, left_open], prompt_acts=True)])
    traces = list(note_traces(source))
    assert [trace.prompt_acts for trace in traces] == [True, True]
    assert [outline_of(trace).statistics.pruned_tokens for trace in traces] == [4, 3]


def test_changed_notes_are_refused(tmp_path):
    path = write_notes(tmp_path / "n.jsonl", [([9, OPEN, 10, SPLIT, 11, CLOSE, 12], 1)])
    text = path.read_text()
    assert '"peak": 4, "live": 4' in text
    path.write_text(text.replace('"peak": 4, "live": 4', '"peak": 4, "live": 3'))
    (source,) = find_sources([path])
    with pytest.raises(ViewerError, match=r"event 6 of the notes is .*'live': 3"):
        [outline_of(trace) for trace in note_traces(source)]


def test_a_torn_last_line_is_skipped_and_a_broken_note_is_named(tmp_path):
    path = write_notes(tmp_path / "n.jsonl", [([9, 10], 1)])
    whole = path.read_text()
    path.write_text(whole + '{"request": "torn')
    (source,) = find_sources([path])
    assert len(list(note_traces(source))) == 1
    path.write_text(whole.replace('"token_ids"', '"tokens"'))
    with pytest.raises(ViewerError, match="lacks 'token_ids'"):
        list(note_traces(source))


def test_text_that_spells_a_marker_is_told_from_the_marker():
    """Three returns in the text, one of them the token: the one where the tokens say."""
    text = "aaaa [RETURN] bbbb cccc dddd [RETURN] eeee [RETURN]"
    assert locate(text, ["[RETURN]"], 6, [4]) == [29]
    assert locate(text, ["[RETURN]"] * 3, 9, [1, 5, 7]) == [5, 29, 43]
    assert locate(text, ["[RETURN]"] * 4, 9, [1, 3, 5, 7]) is None
    assert locate(text, [], 9, []) == []


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_spread_offsets_rise_and_keep_what_is_known(widths):
    known, token, at = [], 0, 0
    for width in widths:
        token, at = token + width, at + 3 * width
        known.append((token, at, "[X]"))
        token, at = token + 1, at + 3
    offsets = spread(token + 2, at + 5, known)
    assert len(offsets) == token + 3 and offsets == sorted(offsets) and offsets[-1] == at + 5
    assert all(offsets[index] == begin for index, begin, _ in known)


# --- plain traces -----------------------------------------------------------------------------------------------------


@given(st.text())
def test_pieces_joined_are_the_text(text):
    assert "".join(pieces(text)) == text
    tokens = cut_at_markers(f"[THOUGHT]{text}[RETURN]", PRESETS["hcot"], pieces)
    assert "".join(tokens) == f"[THOUGHT]{text}[RETURN]" and tokens[0] == "[THOUGHT]"


def test_plain_traces_follow_the_rule(tmp_path):
    row = {"id": "a", "question": "two words", "text": "so [THOUGHT] one two [SOLUTION] x [RETURN] y", "answer": 4}
    (source,) = find_sources([write_rows(tmp_path / "plain.jsonl", [row])])
    (trace,) = plain_traces(source, PRESETS["hcot"], Policy.RECOMPUTE, Columns())
    outline = outline_of(trace)
    (block,) = outline.blocks
    assert (block.thought, block.solution, block.pruned) == (3, 2, 4)  # the space before a marker is a piece
    assert (trace.unit, trace.gold, outline.statistics.prompt_tokens) == ("piece", "4", 2)
    assert outline.statistics.live_tokens == 2 + 1 + 1 + 1 + 2 + 1 + 1


def test_a_tokenizer_counts_real_tokens():
    cut = tokenizer_cut(str(ROOT / "hcot_lmeval" / "assets" / "tiny-hcot"))
    assert cut("a=b+4") == ["a", "=", "b", "+", "4"]
    assert cut("") == []


def test_missing_columns_and_files_are_named(tmp_path):
    path = write_rows(tmp_path / "plain.jsonl", [{"words": "x"}])
    (source,) = find_sources([path])
    with pytest.raises(ViewerError, match=r"row 1: no column hierarchical_cot or .*, only words; .*--text-column"):
        list(plain_traces(source, PRESETS["hcot"], Policy.OFF, Columns()))
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


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_verdicts_come_from_the_matching_evaluation(tmp_path):
    (source,) = find_sources([write_notes(tmp_path / "n.jsonl", [([9, 10, 11], 1)] * 3)])
    two = {"generated_tokens": 2}
    build_run(
        tmp_path / "out", [1, 0, 1], task="toy", statistics=lambda i: two, columns={"level": ["low", "low", "top"]}
    )
    build_run(tmp_path / "out", [0, 0, 0], task="toy", policy="off", statistics=lambda i: two)
    verdicts = read_verdicts([source], [tmp_path / "out"])
    found = [verdicts.of(trace, 2) for trace in note_traces(source)]
    assert [v.score for v in found] == [1.0, 0.0, 1.0]
    assert [(v.gold, v.level, v.extracted) for v in found][2] == ("4", "level top", "\\boxed{2}")
    verdicts.check_used()


def test_samples_of_another_run_are_refused(tmp_path):
    (source,) = find_sources([write_notes(tmp_path / "n.jsonl", [([9, 10, 11], 1)])])
    (trace,) = note_traces(source)
    build_run(tmp_path / "a", [1], task="toy", statistics=lambda i: {"generated_tokens": 7})
    with pytest.raises(ViewerError, match="generated 2 tokens, but the samples tell of 7"):
        read_verdicts([source], [tmp_path / "a"]).of(trace, 2)
    build_run(tmp_path / "a", [1], task="toy", model="org/other")
    with pytest.raises(ViewerError, match="holds 2 evaluations of toy"):
        read_verdicts([source], [tmp_path / "a"]).of(trace, 2)
    build_run(tmp_path / "b", [1], task="other")
    verdicts = read_verdicts([source], [tmp_path / "b"])
    assert verdicts.of(trace, 2).score is None
    with pytest.raises(ViewerError, match="no evaluation with the model, pruning, max_context and tasks"):
        verdicts.check_used()


def test_samples_of_another_model_or_window_are_refused_at_once(tmp_path):
    (source,) = find_sources([write_notes(tmp_path / "n.jsonl", [([9, 10, 11], 1)], run={"name": "mine"})])
    two = {"generated_tokens": 2}
    build_run(tmp_path / "a", [0], model="org/other", statistics=lambda i: two)
    build_run(tmp_path / "b", [0], model="org/mine", max_context=64, statistics=lambda i: two)
    for folder in ("a", "b"):
        with pytest.raises(ViewerError, match="no evaluation with the model, pruning and max_context of the notes"):
            read_verdicts([source], [tmp_path / folder])
    build_run(tmp_path / "a", [1], model="org/mine", statistics=lambda i: two)
    (trace,) = note_traces(source)
    assert read_verdicts([source], [tmp_path / "a"]).of(trace, 2).score == 1.0


@pytest.mark.parametrize("options", [[], ["--terminal"]])
def test_traces_that_are_not_in_the_samples_are_counted(tmp_path, capsys, options):
    notes = write_notes(tmp_path / "n.jsonl", [([9, 10, 11], 1)] * 3)
    build_run(tmp_path / "one", [1], statistics=lambda i: {"generated_tokens": 2})
    command = [str(notes), "--out", str(tmp_path / "p.html"), *options, "--samples"]
    assert main([*command, str(tmp_path / "one")]) == 0
    assert "note: 2 of 3 traces are not in --samples" in capsys.readouterr().err
    build_run(tmp_path / "other", [1], task="other")
    assert main([*command, str(tmp_path / "other")]) == 1
    assert "error: --samples holds no evaluation" in capsys.readouterr().err


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \( x^2 \) and \[ y \] it", [" x^2 ", " y "]),
        ("$a+b$ costs $5 and $6, $ x $ not", ["a+b"]),
        ("$$\n$$\nx = 1 $$\n$$\nthen", ["x = 1 "]),
        (r"is \boxed{\frac{1}{2}} here", [r"\boxed{\frac{1}{2}}"]),
        (r"\begin{align}a&=b\end{align}", [r"\begin{align}a&=b\end{align}"]),
        (r"\boxed{open", []),
        ("$$ $$", []),
        (r"\( never ends", []),
    ],
)
def test_formulas_are_found(text, found):
    assert [formula.latex.strip("\n") for formula in formulas(text)] == found


@pytest.mark.parametrize(
    "latex",
    [
        r"\foo{x}",
        r"\frac{1}",
        "x^2^3",
        r"\phantom{x}",
        r"\newcommand{\a}{\a\a}\a",
        "&",
        r"\left(",
        "{" * 500,
        "x" * 5000,
    ],
)
def test_what_cannot_be_shown_in_full_stays_text(latex):
    assert mathml(latex, False) is None


def test_markup_in_a_formula_is_text_and_its_attributes_are_dropped():
    assert mathml(r"\text{<img src=x onerror=alert(1)>}", False)[2][2][2] == "<img\xa0src=x\xa0onerror=alert(1)>"
    for latex in (
        r"\href{javascript:alert(1)}{x}",
        r"\style{position:fixed}{x}",
        r"\class{top}{x}",
        r"\hspace{999em}x",
    ):
        text = json.dumps(mathml(latex, False))
        assert not re.search("javascript|position|top|999", text), text


def nodes(tree):
    yield tree[0], tree[1]
    for child in tree[2:]:
        if not isinstance(child, str):
            yield from nodes(child)


TOKENS = (
    r"\frac \sqrt \text \left( \right) { } ^ _ & \\ x 1 + \boxed \begin{align} \end{align} $ \( \) \[ \] $$ <b> \href"
).split()
LATEX = st.lists(
    st.sampled_from(TOKENS),
    max_size=14,
).map(" ".join)


@given(st.one_of(st.text(max_size=40), LATEX))
def test_any_text_yields_formulas_in_order_and_nothing_but_what_is_allowed(text):
    place = 0
    for formula in formulas(text):
        assert place <= formula.start < formula.stop <= len(text)
        place = formula.stop
        for tag, attributes in nodes(mathml(formula.latex, formula.display) or ["math", {}]):
            assert tag in TAGS | {"math"}
            assert set(attributes) <= {*ATTRIBUTES, "display"}


@pytest.mark.parametrize("opening", [r"\[", r"\(", "$$ ", "$x", r"\boxed{", r"\begin{align}"])
def test_openings_without_an_end_are_read_in_one_pass(opening):
    """Were the search quadratic, this would take minutes."""
    assert list(formulas(opening * 20_001)) == [] or opening in ("$$ ", "$x")


def test_the_usual_formulas_can_be_shown():
    text = r"""\( r^2 + s^2 \) \(\frac{|r - s|}{2} = 6\sqrt{3}\) \[ (r+s) \times 3 = 72 \implies s = 24 \] $45^\circ$
    \begin{aligned}a&=b\\c&=d\end{aligned} $\lfloor x \rfloor \cdot \binom{a}{b}$ \(\boxed{504}\) \(\sum_{i=1}^n i\)"""
    assert [f.latex for f in formulas(text) if mathml(f.latex, f.display) is None] == []


# --- the page ---------------------------------------------------------------------------------------------------------

EVIL = [
    "<script>window.pwned=1</script>", "</script><script>f()</script>", "<!-- <script>", "<img src=x onerror=f()>",
    "\u2028\u2029", "\ud800 lone", "\u202egnp\u202c", "\x00\x1b[31m", "{{index}} {{script}} {{blobs}}",
    r"$\text{<img src=x onerror=f()>}$", "&lt;b&gt; &amp;", "😀 \U0001d54f $x^2$ 😀 after", "\"'`]]>",
]  # fmt: skip


def page_of(tmp_path, rows, title="t"):
    source_file = write_rows(tmp_path / "plain.jsonl", rows)
    assert main([str(source_file), "--out", str(tmp_path / "page.html"), "--title", title]) == 0
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_hostile_texts_come_through_unchanged_and_add_no_element(tmp_path, capsys):
    rows = [
        {"id": evil, "question": evil, "text": f"[THOUGHT]{evil}[SOLUTION]{evil}[RETURN]", "answer": evil}
        for evil in EVIL
    ]
    html = page_of(tmp_path, rows, title=EVIL[1])
    plain = Page(page_of(tmp_path, [{"id": "a", "question": "q", "text": "a", "answer": "a"}] * len(EVIL)))
    page = Page(html)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    for place, evil in enumerate(EVIL):
        prompt, text, _ = page.trace(place)
        assert (prompt, text) == (evil, rows[place]["text"])
        assert (page.index["rows"][place]["doc"], page.index["rows"][place]["gold"]) == (evil, evil)
    assert html.isascii() or not re.search("[\u2028\u2029\u202e]", html)


def test_page_loads_nothing_and_allows_one_script_and_one_style(tmp_path, capsys):
    html = page_of(tmp_path, [{"question": "q", "text": "see https://example.org/x.png"}])
    page = Page(html)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    (script,) = [text for tag, attrs, text in page.contents if tag == "script" and not attrs]
    (style,) = [text for tag, _, text in page.contents if tag == "style"]
    for directive, content in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert not [a for _, attrs in page.elements for a in attrs if a in ("src", "href", "style") or a.startswith("on")]
    assert set(re.findall(r"https?://[^\"'\s]+", html)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1998/Math/MathML",
    }
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\bFunction\(|@import|url\(", html)


def test_structure_of_a_page_is_the_outline(tmp_path):
    ids = [9, *malformed(random.Random(3), HCOT, 200)]
    (source,) = find_sources([write_notes(tmp_path / "n.jsonl", [(ids, 1)])])
    write_page(tmp_path / "p.html", note_traces(source), [source], Verdicts(), "t")
    page = Page((tmp_path / "p.html").read_text())
    (trace,) = note_traces(source)
    outline, (prompt, text, structure) = outline_of(trace), page.trace(0)
    assert (prompt, text) == (trace.prompt, trace.text)
    assert [s[:2] + s[3:5] for s in structure["segments"]] == [
        [s.kind.value[0], s.count, s.depth, s.gone or 0] for s in outline.segments
    ]
    assert sum(s[2] for s in structure["segments"]) == len(text)
    row = page.index["rows"][0]
    assert row["malformed"] == outline.statistics.malformed and len(row["spark"]) == 48
    assert row["generated_tokens"] == len(ids) - 1 and page.index["sources"][0]["facts"]["max_context"] == 1024


def test_a_failure_leaves_the_old_page(tmp_path):
    out = tmp_path / "p.html"
    out.write_text("old")
    path = write_notes(tmp_path / "n.jsonl", [([9, OPEN, 10, SPLIT, 11, CLOSE], 1)])
    path.write_text(path.read_text().replace('"live": 4', '"live": 3'))
    assert main([str(path), "--out", str(out)]) == 1
    assert out.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["n.jsonl", "p.html"]


@given(st.text(max_size=30), st.data())
def test_indices_are_counted_as_javascript_does(text, data):
    indices = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    assert _units(text, indices) == [len(text[:i].encode("utf-16-le", "surrogatepass")) // 2 for i in indices]


def test_titles_leave_out_the_lines_that_all_prompts_share():
    rows = [{"source": 0, "task": "t", "title": f"system\nBe good.\nuser\nWhat is {i} + 1?"} for i in range(3)]
    alone = {"source": 1, "task": "t", "title": "one\nline"}
    shorten_titles([*rows, alone])
    assert [row["title"] for row in rows] == ["What is 0 + 1?", "What is 1 + 1?", "What is 2 + 1?"]
    assert alone["title"] == "one line"


# --- terminal and command ---------------------------------------------------------------------------------------------


def printed(tmp_path, ids, expand=False, width=60, colors=False):
    (source,) = find_sources([write_notes(tmp_path / "n.jsonl", [(ids, 1)], words={7: "\x1b[2J\u202e"})])
    (trace,) = note_traces(source)
    file = io.StringIO()
    print_trace(trace, Verdicts(), Style(file, width, colors), expand=expand)
    return file.getvalue()


def test_terminal_folds_what_was_pruned(tmp_path):
    ids = [9, 20, OPEN, 21, OPEN, 22, SPLIT, 23, CLOSE, SPLIT, 24, CLOSE, 25, CLOSE]
    folded = printed(tmp_path / "a", ids)
    assert "▸ thought 6 tokens → solution 1 token  depth 1, from 2, pruned 5 (2 before, with blocks within)" in folded
    assert "w24" in folded and "⚠ stray_close" in folded
    assert "w22" not in folded and "depth 2" not in folded
    expanded = printed(tmp_path / "b", ids, expand=True)
    assert "w22" in expanded and "depth 2, from 4, pruned 2\n" in expanded


def test_terminal_shows_controls_and_keeps_its_width(tmp_path):
    text = printed(tmp_path, [9, 7, *[20] * 300], width=50)
    assert "\x1b" not in text and "\u202e" not in text and "⟨U+001B⟩[2J⟨U+202E⟩" in text
    assert max(map(len, text.splitlines()[5:])) <= 50
    assert "\x1b[1m" in printed(tmp_path / "c", [9, 20], colors=True)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=200), st.integers(1, 120))
def test_curve_fits_and_reaches_its_peak(heights, width):
    lines = list(curve(heights, width))
    assert len(lines) == 6 and max(map(len, lines)) <= max(width, 18)
    assert max(heights) == 0 or "█" in lines[0]


def test_visible_leaves_ordinary_text_alone():
    text = "Grüße, 你好, مرحبا\u200f, e\u0301, 👩\u200d🔬\n\tnext"
    assert visible(text) == text
    assert visible("a\x07\ud800b") == "a⟨U+0007⟩⟨U+D800⟩b"


def test_command_writes_and_prints(tmp_path, capsys):
    notes = write_notes(tmp_path / "n.jsonl", [(nested_ids(seed, 60), 1) for seed in range(3)])
    build_run(
        tmp_path / "out", [1, 0, 1], task="toy", statistics=lambda i: {"generated_tokens": len(nested_ids(i, 60)) - 1}
    )
    assert main([str(notes), "--samples", str(tmp_path / "out"), "--out", str(tmp_path / "deep" / "p.html")]) == 0
    assert "3 traces" in capsys.readouterr().out
    assert [row["score"] for row in Page((tmp_path / "deep" / "p.html").read_text()).index["rows"]] == [1.0, 0.0, 1.0]
    assert main([str(notes), "--terminal", "--doc", "1"]) == 0
    out = capsys.readouterr().out
    assert "problem 1" in out and "problem 2" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NOTES", "--doc", "77", "--terminal"], "no trace fits"),
        (["NOTES", "--doc", "77"], "there are no traces to show"),
        (["PLAIN", "--samples", "."], "--samples belongs to notes"),
        (["NOTES", "--samples", "."], "no run"),
        (["missing"], "does not exist"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_notes(tmp_path / "NOTES", [([9, 10], 1)])
    write_rows(tmp_path / "PLAIN", [{"text": "x"}])
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_help_is_light():
    """Nothing heavy is imported to say what the options are."""
    code = "import sys; sys.argv = ['v', '--help']\nfrom hcot_lmeval.report.viewer.cli import main\ntry: main()\n"
    code += "finally: print(sorted({'torch', 'transformers', 'latex2mathml', 'lm_eval'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip().endswith("[]") and "--terminal" in result.stdout


def test_assets_are_those_that_the_page_names():
    from hcot_lmeval.report.viewer.build import SCRIPTS

    folder = Path(math_module.__file__).with_name("web")
    assert {path.name for path in folder.iterdir()} == {*SCRIPTS, "page.html", "style.css"}
    for path in folder.iterdir():
        assert "</script" not in path.read_text() or path.name == "page.html"
    assert Kind.TEXT.value[0] + Kind.OPEN.value[0] + Kind.SPLIT.value[0] + Kind.CLOSE.value[0] == "tosc"


# --- what the decoder did ---------------------------------------------------------------------------------------------


def test_notes_of_a_controlled_run_are_replayed_and_told(tmp_path, capsys):
    """What was forced, illegal and repeated stands among the events and parts runs of text; no replay can know it."""
    import torch

    from hcot_lmeval.engine import Engine, Request, SamplingParams
    from hcot_lmeval.notes import NoteTaker
    from tests.tiny import favour, tiny_model, tiny_tokenizer

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
        with NoteTaker(
            tmp_path / name / "n.jsonl", engine.decode, run={"pruning": "recompute", "markup": "hcot"}
        ) as notes:
            done = engine.generate(requests, notes)
        [source] = find_sources([tmp_path / name / "n.jsonl"])
        outlines = {trace.doc_id: outline_of(trace) for trace in note_traces(source)}
        for completion in done:
            ours, noted = outlines[completion.request.meta["doc_id"]].statistics, completion.statistics
            assert (ours.illegal_tokens, ours.forced, ours.loops) == (noted.illegal_tokens, noted.forced, noted.loops)
            assert ours.malformed == noted.malformed
        found[name] = [completion.statistics for completion in done]
    assert any(stats.illegal_tokens for stats in found["free"])
    assert any(stats.forced for stats in found["all"]) and any(stats.loops for stats in found["loops"])
    assert main([str(tmp_path / "all" / "n.jsonl"), "--terminal", "--limit", "2"]) == 0
    assert "changed by the decoder: " in capsys.readouterr().out
