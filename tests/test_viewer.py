"""The viewer without a browser: verdicts, the parts of the page, the terminal, the command."""

from __future__ import annotations

import base64
import hashlib
import io
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hcot_lmeval.report.viewer import page as page_module
from hcot_lmeval.report.viewer.cli import main
from hcot_lmeval.report.viewer.page import shorten_titles, utf16_units, write_page
from hcot_lmeval.report.viewer.reading import ViewerError, find_sources, note_traces
from hcot_lmeval.report.viewer.terminal import curve, print_trace, visible
from hcot_lmeval.report.viewer.tree import outline_of
from hcot_lmeval.report.viewer.verdicts import Verdicts, read_verdicts
from hcot_lmeval.trace import Kind
from tests.random_traces import malformed
from tests.reference import CLOSE, MARKERS, OPEN, SPLIT
from tests.result_files import build_run
from tests.viewer_files import Page, nested_ids, write_notes, write_rows

HCOT = MARKERS["hcot"]
ROOT = Path(__file__).resolve().parents[1]


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
    outline, (prompt, text, structure) = outline_of(1, trace.events), page.trace(0)
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
    path.write_text(path.read_text().replace('"type": "Open"', '"type": "Opened"'))
    assert main([str(path), "--out", str(out)]) == 1
    assert out.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["n.jsonl", "p.html"]


@given(st.text(max_size=30), st.data())
def test_indices_are_counted_as_javascript_does(text, data):
    indices = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    assert utf16_units(text, indices) == [len(text[:i].encode("utf-16-le", "surrogatepass")) // 2 for i in indices]


def test_titles_leave_out_the_lines_that_all_prompts_share():
    rows = [{"source": 0, "task": "t", "title": f"system\nBe good.\nuser\nWhat is {i} + 1?"} for i in range(3)]
    alone = {"source": 1, "task": "t", "title": "one\nline"}
    shorten_titles([*rows, alone])
    assert [row["title"] for row in rows] == ["What is 0 + 1?", "What is 1 + 1?", "What is 2 + 1?"]
    assert alone["title"] == "one line"


# --- terminal and command ---------------------------------------------------------------------------------------------


def printed(tmp_path, ids, expand=False, width=120, colors=False):
    (source,) = find_sources([write_notes(tmp_path / "n.jsonl", [(ids, 1)], words={7: "\x1b[2J\u202e"})])
    (trace,) = note_traces(source)
    console = Console(file=io.StringIO(), width=width, force_terminal=colors, highlight=False)
    print_trace(trace, Verdicts(), console, expand=expand)
    return console.file.getvalue()


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
        (
            ["NOTES", "--out", "/dev/null/x/y"],
            "--out /dev/null/x/y cannot be written to (Not a directory); name another",
        ),
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
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert result.stdout.strip().endswith("[]") and "--terminal" in result.stdout


def test_assets_are_those_that_the_page_names():
    from hcot_lmeval.report.viewer.page import SERVED

    folder = Path(page_module.__file__).with_name("web")
    assert {path.name for path in folder.iterdir()} == {*SERVED, "page.html", "style.css"}
    for path in folder.iterdir():
        assert "</script" not in path.read_text() or path.name == "page.html"
    assert Kind.TEXT.value[0] + Kind.OPEN.value[0] + Kind.SPLIT.value[0] + Kind.CLOSE.value[0] == "tosc"
