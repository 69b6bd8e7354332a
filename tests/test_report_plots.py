"""The data behind the plots, counted again in an obvious way; and that files come out."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from hcot_lmeval.notes import Note, NoteTaker
from hcot_lmeval.report.comparison import compare
from hcot_lmeval.report.plots import (
    LOOKS,
    blocks,
    budget_curve,
    closed_blocks,
    live_context,
    most_pruned,
    notes_of,
    plot_task,
    roomiest,
)
from hcot_lmeval.report.results import read_runs
from hcot_lmeval.report.tables import entries_of
from hcot_lmeval.report.viewer.tree import live_curve
from hcot_lmeval.trace import LiveContext
from tests.random_traces import random_trace
from tests.reference import MARKERS, POLICIES, rewrite
from tests.result_files import build_run
from tests.viewer_files import note_of

HCOT = MARKERS["hcot"]


def noted(seed: int, policy: str, doc_id: int = 0) -> Note:
    """A note of a random trace."""
    return note_of(*random_trace(seed, HCOT, 60), LiveContext(HCOT, policy), doc_id=doc_id)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_saw_tooth_is_the_live_context(policy: str) -> None:
    falls = 0
    for seed in range(40):
        note, context = noted(seed, policy), LiveContext(HCOT, policy)
        live = [len([context.push_inert(token) for token in note.prompt_ids])]
        for token in note.token_ids:
            context.push(token)
            live.append(len(context.live))
        assert live_curve(note.events) == live
        falls += any(b < a for a, b in itertools.pairwise(live))
    assert (falls > 10) == (policy != "off")


@pytest.mark.parametrize("policy", POLICIES)
def test_lengths_are_those_of_the_rewritten_trace(policy: str) -> None:
    seen = 0
    for seed in range(60):
        found = closed_blocks(noted(seed, policy))
        blocks = rewrite(*random_trace(seed, HCOT, 60), HCOT).blocks
        assert sorted(b.thought for b in found) == sorted(b.split - b.open - 1 for b in blocks)
        assert sorted(b.solution for b in found) == sorted(b.close - b.split - 1 for b in blocks)
        assert len(found) == len(blocks) and min((b.depth for b in found), default=1) >= 1
        seen += len(blocks)
    assert seen > 100


def test_budget_curve_by_asking_at_every_budget(tmp_path: Path) -> None:
    rng = random.Random(3)
    scores = [rng.choice([0, 1]) for _ in range(40)]
    costs = [rng.randint(5, 60) for _ in range(40)]
    build_run(tmp_path, scores, statistics=lambda i: {"peak_live_tokens": costs[i]})
    [entry] = entries_of(read_runs(tmp_path))
    x, y = budget_curve(entry, "peak_live_tokens")
    for budget in range(70):
        expected = sum(s for s, c in zip(scores, costs, strict=True) if c <= budget) / 40
        under = np.flatnonzero(x <= budget)
        assert (y[under[-1]] if len(under) else 0) == pytest.approx(expected)


def test_the_roomiest_of_a_family_stands_for_it(tmp_path: Path) -> None:
    for window in (256, 1024, 512):
        build_run(tmp_path, [1], policy="off", max_context=window)
    build_run(tmp_path, [1], policy="evict", max_context=128)
    entries = entries_of(read_runs(tmp_path))
    assert [(entry.family, entry.window) for entry in roomiest(entries)] == [
        ("model, off", 1024),
        ("model, evict", 128),
    ]


def test_twenty_runs_look_different() -> None:
    looks = [tuple(sorted(look.items())) for look in LOOKS]
    assert len(set(looks)) == 28


def test_the_saw_tooth_shows_the_rule_and_not_an_ablation(tmp_path: Path) -> None:
    notes = [noted(seed, "recompute", doc_id=seed) for seed in range(20)]
    *rule, ablated = sorted(notes, key=lambda note: note.statistics.prune_events)
    most = rule[-1].statistics.prune_events
    assert ablated.statistics.prune_events > most > 0
    assert most_pruned([rule, [ablated]]) == ablated.meta["doc_id"]
    for name, kept, totals in (("rule", rule, {}), ("other", [ablated], {"ablation": "random"})):
        with NoteTaker(tmp_path / name / "n.jsonl") as taker:
            for note in kept:
                taker.add(note)
        build_run(tmp_path / "out", [1, 0], model_args={"notes": str(tmp_path / name)}, totals=totals)
    titles = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "set_title", lambda self, title, **settings: titles.append(title))
        plot_task("toy", entries_of(read_runs(tmp_path / "out")), tmp_path)
    [title] = titles
    most_often = [note.meta["doc_id"] for note in rule if note.statistics.prune_events == most]
    assert title in {f"problem {doc_id}, that of the response with most prunes" for doc_id in most_often}


def test_what_there_is_no_data_for_is_not_drawn(tmp_path: Path) -> None:
    build_run(tmp_path / "a", [1, 0], kind="hf")
    assert plot_task("toy", entries_of(read_runs(tmp_path / "a")), tmp_path) == []
    build_run(tmp_path / "b", [1, 0])
    drawn = {path.name for path in plot_task("toy", entries_of(read_runs(tmp_path)), tmp_path) if path.suffix == ".png"}
    assert drawn == {f"toy-{name}.png" for name in ("accuracy", "completion", "accuracy-live", "accuracy-generated")}


def write_run(folder: Path, notes: list[Note], statistics: dict[str, Any], **settings: Any) -> None:
    """A run with notes, one problem each."""
    with NoteTaker(folder / "notes" / "n.jsonl") as taker:
        for note in notes:
            taker.add(note)
    arguments = {"notes": str(folder / "notes")}
    build_run(folder, [0] * len(notes), model_args=arguments, statistics=lambda i: statistics, **settings)


EMPTY = {"generated_tokens": 0, "peak_live_tokens": 20, "finish_reason": "context"}


def test_prompts_that_all_fill_the_window_leave_tables_and_the_plots_that_can_be_drawn(tmp_path: Path) -> None:
    empty = [note_of([1], 1, LiveContext(HCOT), doc_id=doc_id, finish="context") for doc_id in range(2)]
    write_run(tmp_path / "a", empty, EMPTY)
    written = {path.name for path in compare(read_runs(tmp_path / "a")).write(tmp_path / "out")}
    assert {"comparison.md", "toy-costs.csv"} <= written
    drawn = {name for name in written if name.endswith(".png")}
    assert drawn == {f"toy-{name}.png" for name in ("accuracy", "completion", "accuracy-live")}
    write_run(tmp_path / "b", [noted(1, "off")] * 2, {}, policy="off")  # one run that can be drawn brings them back
    both = {path.name for path in compare(read_runs(tmp_path)).write(tmp_path / "out")}
    assert {"toy-accuracy-generated.png", "toy-live-context.png"} <= both


def test_runs_that_coincide_both_show(tmp_path: Path) -> None:
    note = noted(1, "off")
    axes = live_context({"one": [note], "other": [note]}, 0).axes[0]
    one, other = axes.lines
    assert list(one.get_ydata()) == list(other.get_ydata())
    assert one.get_linestyle() != other.get_linestyle()
    assert axes.get_title() == "problem 0, that of the longest response"


def test_notes_bring_the_saw_tooth_and_the_blocks(tmp_path: Path) -> None:
    with NoteTaker(tmp_path / "notes" / "n.jsonl") as taker:
        for doc_id in range(3):
            taker.add(noted(doc_id + 1, "recompute", doc_id=doc_id))
    build_run(tmp_path / "out", [1, 0, 1], model_args={"notes": str(tmp_path / "notes")})
    drawn = {path.name: path for path in plot_task("toy", entries_of(read_runs(tmp_path / "out")), tmp_path)}
    assert {"toy-live-context.png", "toy-live-context.svg", "toy-blocks.png"} <= drawn.keys()
    (tmp_path / "again").mkdir()
    for path in plot_task("toy", entries_of(read_runs(tmp_path / "out")), tmp_path / "again"):
        if path.suffix == ".png":
            assert path.read_bytes() == drawn[path.name].read_bytes(), "the same data gives the same file"


def test_notes_of_another_run_in_the_same_folder_are_left_out(tmp_path: Path) -> None:
    """And of a request that stands there twice, as after a restart, the last one counts."""
    for policy in ("off", "recompute"):
        with NoteTaker(tmp_path / "notes" / f"{policy}.jsonl", run={"pruning": policy, "max_context": 1024}) as taker:
            for seed in (0, 1, 1):
                taker.add(replace(noted(seed, policy, doc_id=seed), request=str(seed)))
    (tmp_path / "notes" / "old.jsonl").write_text('{"schema": "hcot-notes/1", "run": {"pruning": "off"}}\n')
    build_run(tmp_path / "out", [1, 0], policy="off", model_args={"notes": str(tmp_path / "notes")})
    [entry] = entries_of(read_runs(tmp_path / "out"))
    found = notes_of(entry)
    assert len(found) == 2
    assert not any(note.statistics.pruned_tokens for note in found)


def test_a_curve_of_blocks_is_the_share_that_is_at_most_so_long() -> None:
    """Also where all are alike, and beside a run that closed none."""
    found = closed_blocks(noted(1, "recompute"))
    alike = [found[0]] * 5
    panels = blocks({"none": [], "some": found, "alike": alike}).axes
    for axes, kind in zip(panels, ("thought", "solution", "depth"), strict=True):
        for line, these in zip(axes.lines, (found, alike), strict=True):
            values = [getattr(block, kind) for block in these]
            assert (line.get_xdata()[0], line.get_ydata()[0]) == (min(values), 0)
            for x, y in zip(line.get_xdata()[1:], line.get_ydata()[1:], strict=True):
                assert y == pytest.approx(100 * sum(value <= x for value in values) / len(values))
            assert line.get_ydata()[-1] == 100
