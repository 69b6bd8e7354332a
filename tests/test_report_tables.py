"""Tables against an independent recount of real runs, and their renderings letter by letter."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hcot_lmeval.report import render
from hcot_lmeval.report.comparable import check_integrity
from hcot_lmeval.report.comparison import compare
from hcot_lmeval.report.results import ResultsError, read_runs
from hcot_lmeval.report.statistics import Estimate
from hcot_lmeval.report.tables import Head, Table, entries_of
from hcot_lmeval.trace import Malformed
from tests import quick_lm_eval
from tests.recount import recount
from tests.result_files import build_run

SETTINGS = {"pruned": "pruning=recompute,max_context=128", "unpruned": "pruning=off,max_context=96"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two real runs of a bundled model."""
    out = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, settings in SETTINGS.items():
        model = f"pretrained=tiny-hcot,journal=off,notes={out / name / 'notes'},{settings}"
        command = [sys.executable, quick_lm_eval.__file__, "--include_path", str(quick_lm_eval.TASKS)]
        command += ["--model", "hcot", "--model_args", model, "--tasks", "hcot_arith", "--limit", "8"]
        command += ["--batch_size", "8", "--device", "cpu", "--log_samples", "--output_path", str(out / name)]
        subprocess.run(command, check=True, capture_output=True, env=environment)
    return {name: out / name for name in SETTINGS}


def runs_of(*folders: Path):
    return [run for folder in folders for run in read_runs(folder)]


def table_of(folder: Path, key: str) -> Table:
    """A table of the one task whose runs lie below a folder."""
    [task] = compare(read_runs(folder)).tasks
    return next(table for table in task.tables if table.key == key)


def test_every_number_equals_a_recount_from_the_raw_samples(folders) -> None:
    comparison = compare(runs_of(*folders.values())).as_dict()
    tables = comparison["tasks"]["hcot_arith"]["tables"]
    kinds_of_faults = {kind.value for kind in Malformed}
    checked = 0
    for folder, name, window in zip(folders.values(), ("recompute", "off"), ("128", "96"), strict=True):
        expected = recount(folder)
        family = f"tiny-hcot, {name}"
        for key in ("accuracy", "completion"):
            rows = {row["depth"]: row[window] for row in tables[key]["rows"] if row["run"] == family}
            for level, value in expected[key].items():
                assert (rows[level]["value"] if level == "all" else rows[level]) == pytest.approx(value)
                checked += 1
        for key in ("tokens", "costs", "endings"):
            [row] = [row for row in tables[key]["rows"] if row["run"] == f"{family}, {window}"]
            # the file holds milliseconds
            assert row.pop("tokens_per_second", 0) == pytest.approx(expected[key].pop("tokens_per_second", 0), rel=0.01)
            kinds = dict.fromkeys(row.keys() - expected[key].keys() - {"run"}, 0)  # faults of the other run alone
            assert {k: v for k, v in row.items() if k != "run"} == pytest.approx(kinds | expected[key])
            assert kinds.keys() <= kinds_of_faults
            checked += len(expected[key].keys() - kinds_of_faults)
    assert checked == 2 * (5 + 1 + 6 + 6 + 11)


def test_pruned_and_unpruned_runs_differ(folders) -> None:
    """Were nothing ever pruned, the recount would still agree."""
    pruned, unpruned = (recount(folder) for folder in folders.values())
    assert pruned["tokens"]["pruned_tokens"] > 50 and unpruned["tokens"]["pruned_tokens"] == 0
    assert pruned["accuracy"]["all"] == 1 and unpruned["accuracy"]["all"] == 0


def test_every_format_is_written(folders, tmp_path: Path) -> None:
    comparison = compare(runs_of(*folders.values()))
    written = {path.name for path in comparison.write(tmp_path)}
    assert {"comparison.md", "comparison.tex", "comparison.json", "hcot_arith-tests.csv"} <= written
    plots = ("accuracy", "completion", "accuracy-live", "accuracy-generated", "live-context")
    for plot in plots:
        assert (tmp_path / f"hcot_arith-{plot}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (tmp_path / f"hcot_arith-{plot}.svg").read_text()[:1000]
    index = json.loads((tmp_path / "comparison.json").read_text())
    assert set(index.pop("files")) == written
    assert index == json.loads(json.dumps(comparison.as_dict()))
    for table in comparison.tasks[0].tables:
        assert all(line in comparison.text() for line in render.terminal(table).splitlines()[:6])
    again = tmp_path / "again"
    compare(runs_of(*folders.values())).write(again)
    for path in tmp_path.glob("comparison.*"):
        assert path.read_bytes() == (again / path.name).read_bytes(), "the same runs give the same files"


def test_files_of_tasks_that_are_gone_are_removed_and_no_others(tmp_path: Path) -> None:
    for task in ("one", "other"):
        build_run(tmp_path / "runs", [1, 0], task=task)
    runs, out = read_runs(tmp_path / "runs"), tmp_path / "out"
    compare(runs).write(out)
    (out / "other-mine.csv").write_text("kept")
    written = compare(runs[:1]).write(out, plots=False)
    assert {path.name for path in out.iterdir()} == {*(path.name for path in written), "other-mine.csv"}
    assert not any(path.name.startswith("other") or path.suffix == ".png" for path in written)


# --- constructed runs -------------------------------------------------------------------------------------------------


def test_layout_of_the_published_tables(tmp_path: Path) -> None:
    levels = ["top", "low", "low", "high"]
    for window, scores in ((1024, [0, 1, 0, 0]), (2048, [0, 1, 1, 1])):
        build_run(tmp_path, scores, policy="recompute", max_context=window, columns={"level": levels})
        build_run(tmp_path, [0, 0, 1, 0], policy="off", max_context=window, columns={"level": levels})
    [task] = compare(read_runs(tmp_path)).tasks
    table = next(table for table in task.tables if table.key == "accuracy")
    assert [head.name for head in table.heads] == ["level", "run", "1024", "2048"]
    cells = {row[:2]: row[2:] for row in table.rows}
    assert list(dict.fromkeys(level for level, _ in cells)) == ["low", "high", "top", "all"]
    assert cells["low", "model, recompute"] == (0.5, 1.0)
    assert cells["high", "model, recompute"] == (0.0, 1.0)
    assert [cell.value for cell in cells["all", "model, recompute"]] == [0.25, 0.75]
    assert [(t.name, t.baseline, t.paired.better, t.paired.worse) for t in task.tests] == [
        ("model, off, 1024", "model, recompute, 1024", 1, 1),
        ("model, off, 2048", "model, recompute, 2048", 0, 2),
    ]


def test_baselines(tmp_path: Path) -> None:
    build_run(tmp_path, [0, 1], policy="off", max_context=512)
    build_run(tmp_path, [1, 1], policy="recompute", max_context=128)
    build_run(tmp_path, [0, 0], kind="hf", model="org/other")
    runs = read_runs(tmp_path)

    def pairs(baseline: str | None) -> list[tuple[str, str]]:
        return [(test.name, test.baseline) for test in compare(runs, baseline=baseline).tasks[0].tests]

    assert pairs(None) == pairs("model, off") == pairs("model, off, 512")
    assert pairs("model, off, 512") == [("model, recompute, 128", "model, off, 512"), ("other (hf)", "model, off, 512")]
    assert pairs("other (hf)") == [("model, off, 512", "other (hf)"), ("model, recompute, 128", "other (hf)")]
    with pytest.raises(
        ValueError, match=r"baseline='flat' is not a run here; choose one of model, off; model, off, 512"
    ):
        compare(runs, baseline="flat")


def test_a_foreign_model_tells_nothing_of_its_tokens(tmp_path: Path) -> None:
    build_run(tmp_path, [0, 1], kind="hf")
    build_run(tmp_path, [1, 1])
    [task] = compare(read_runs(tmp_path)).tasks
    for table in task.tables:
        if table.key in ("tokens", "costs"):
            foreign, ours = table.rows
            assert set(foreign[1:]) == {None} and None not in ours[1:4]
            assert " - " in render.terminal(table)
    build_run(tmp_path / "alone", [0, 1], kind="hf")
    [task] = compare(read_runs(tmp_path / "alone")).tasks
    assert not {"tokens", "costs", "tests"} & {table.key for table in task.tables}


def test_several_responses_and_seeds(tmp_path: Path) -> None:
    def statistics(doc_id: int):
        return [{"generated_tokens": 10 * doc_id + i} for i in range(4)]

    for seed, scores in enumerate(([0.25, 0.5], [0.75, 1.0])):
        totals = {"seed": seed}
        build_run(tmp_path / str(seed), scores, metric="avg@4", statistics=statistics, totals=totals)
    runs = [run.named(f"m, recompute, 1024, seed {i}") for i, run in enumerate(runs_of(tmp_path / "0", tmp_path / "1"))]
    [entry] = entries_of(runs)
    assert (entry.name, entry.family, len(entry.runs)) == ("m, recompute, 1024", "m, recompute", 2)
    assert entry.scores == {0: 0.5, 1: 0.75}
    assert len(entry.requests) == 16
    [task] = compare(runs).tasks
    tokens = next(table for table in task.tables if table.key == "tokens")
    assert tokens.rows[0][2] == pytest.approx((1.5 + 11.5) / 2)


def test_the_number_of_seeds_is_said(tmp_path: Path) -> None:
    def named(policy: str, seeds: int):
        for seed in range(seeds):
            folder = tmp_path / f"{policy} {seeds} {seed}"
            build_run(folder, [1, 0], policy=policy, totals={"seed": seed})
            yield from (run.named(f"m, {policy}, 1024, seed {seed}") for run in read_runs(folder))

    def said(*runs) -> str:
        return compare(runs, resamples=50).tasks[0].tables[0].notes[-1]

    assert "seeds" not in said(*named("off", 1))
    assert said(*named("off", 3), *named("evict", 3)) == "means over 3 seeds"
    assert (
        said(*named("recompute", 3), *named("evict", 2))
        == "means over seeds: 3 of m, recompute, 1024; 2 of m, evict, 1024"
    )


def test_no_run_falls_into_the_cell_of_another(tmp_path: Path) -> None:
    build_run(tmp_path / "a", [1, 1], max_context=1024)
    build_run(tmp_path / "b", [0, 0], max_context=1024)
    [a], [b] = read_runs(tmp_path / "a"), read_runs(tmp_path / "b")
    [task] = compare([a.named("x, 1024"), b.named("x")]).tasks
    assert {row[1]: row[2].value for row in task.tables[0].rows} == {"x, 1024": 1.0, "x": 0.0}


OTHER_PLACES = [{"model_args": {"pretrained": f"runs/{place}/checkpoint-500"}} for place in ("one", "two")]


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({"policy": "off"}, {"policy": "evict"}, "'m' differ in more than their seed: model, off, .*; model, evict, "),
        (*OTHER_PLACES, "'m' differ in more than their seed"),  # of one base name
        ({}, {"totals": {"seed": 0}}, "2 runs of 'm' have seed 0"),
    ],
)
def test_what_are_no_seeds_of_one_setting_is_not_pooled(tmp_path: Path, one, other, told) -> None:
    for seed, settings in enumerate((one, other)):
        build_run(tmp_path / str(seed), [1, 1], **{"totals": {"seed": seed}} | settings)
    with pytest.raises(ResultsError, match=told):
        entries_of([run.named(name) for run, name in zip(read_runs(tmp_path), ("m", "m, seed 1"), strict=True)])


def test_a_weighted_accuracy_without_all_levels_is_empty(tmp_path: Path) -> None:
    def weigh(results, samples) -> None:
        for sample in samples:
            sample["dw_acc"] = [sample["doc"]["level"], sample["acc"]]

    levels = ["low", "medium", "high", "top"]
    build_run(tmp_path / "a", [1, 1, 0, 1], columns={"level": levels}, change=weigh)
    build_run(tmp_path / "b", [1, 1, 0], columns={"level": levels[:3]}, change=weigh)
    for folder, expected in (("a", (1 + 2 + 8) / 15), ("b", None)):
        comparison = compare(read_runs(tmp_path / folder))
        table = next(table for table in comparison.tasks[0].tables if table.key == "weighted")
        assert table.rows == (("model, recompute", pytest.approx(expected) if expected else None),)
        written = next(p for p in comparison.write(tmp_path / folder, plots=False) if p.name == "comparison.json")
        json.loads(written.read_text(), parse_constant=pytest.fail)  # NaN is no JSON


def test_ends_and_kinds_of_faults_are_counted(tmp_path: Path) -> None:
    faults = [{"unclosed": 2}, {}, {"stray_close": 1, "unclosed": 1}]
    reasons = ["context", "eos", "length"]
    build_run(tmp_path, [0, 1, 0], statistics=lambda i: {"finish_reason": reasons[i], "malformed": faults[i]})
    table = table_of(tmp_path, "endings")
    names = "responses eos stop length context loop blocks max_depth malformed illegal_tokens illegal_responses"
    assert [head.key for head in table.heads[1:]] == [*names.split(), "stray_close", "unclosed"]
    assert table.rows[0][1:] == (3, 1, 0, 1, 1, 0, 4, 2, pytest.approx(4 / 3), 0, 0, 1, 3)


def test_statistics_of_an_older_version_are_refused(tmp_path: Path) -> None:
    [file] = build_run(tmp_path, [0, 1]).parent.glob("samples_*.jsonl")
    file.write_text(file.read_text().replace('"illegal_tokens": 0, ', ""))
    [run] = read_runs(tmp_path)
    with pytest.raises(ResultsError, match="lack illegal_tokens, so an older version made them; run it again"):
        check_integrity(run)


def test_what_was_illegal_forced_and_repeated_is_counted(tmp_path: Path) -> None:
    found = [
        {"illegal_tokens": 3},
        {"forced": {"constraints": 2, "max_block_tokens": 1}},
        {"forced": {"constraints": 1}, "loops": 2, "finish_reason": "loop"},
        {},
    ]
    build_run(tmp_path, [0, 1, 0, 1], statistics=lambda i: found[i])
    table = table_of(tmp_path, "endings")
    row = dict(zip([head.key for head in table.heads], table.rows[0], strict=True))
    assert (row["illegal_tokens"], row["illegal_responses"]) == (0.75, 25)
    assert (row["forced_constraints"], row["forced_max_block_tokens"]) == (0.75, 0.25)
    assert (row["loop"], row["loops"]) == (1, 1)
    assert "forced_force_answer" not in row  # nothing was


def test_few_problems_come_with_a_warning_of_their_interval(tmp_path: Path) -> None:
    build_run(tmp_path / "a", [0] * 30)
    build_run(tmp_path / "b", [1] * 5 + [0] * 25, policy="off")
    build_run(tmp_path / "c", [1] * 8 + [0] * 22, policy="off")

    def warned(other: str) -> bool:
        return "believe p" in " ".join(compare(runs_of(tmp_path / "a", tmp_path / other)).tasks[0].tables[-1].notes)

    build_run(tmp_path / "d", [0] * 30, policy="off")
    assert warned("b") and not warned("c") and not warned("d")  # p = 0.063, 0.008, and 1 with 0 in the interval


# --- renderings -------------------------------------------------------------------------------------------------------

TABLE = Table(
    "toy",
    "A title",
    (
        Head("run"),
        Head("50% _ & |", "what it says", 1, 100, key="share"),
        Head("n", key="count"),
        Head("p", "", 4, least=1e-4),
    ),
    (("a_b & <c>", Estimate(0.5, 0.25, 0.75, 8), 1234567, 0.00001), ("d", None, 2, -0.25)),
    ("a note",),
)


def test_terminal() -> None:
    assert render.terminal(TABLE).splitlines() == [
        "A title",
        "",
        "run            50% _ & |          n        p",
        "---------  -------------  ---------  -------",
        "a_b & <c>  50.0 [25, 75]  1,234,567  <0.0001",
        "d                      -          2  -0.2500",
        "",
        "50% _ & |: what it says",
        "a note",
    ]


def test_a_wide_table_is_parted_and_loses_nothing() -> None:
    heads = (Head("run"), *(Head(f"column {i}") for i in range(20)))
    wide = Table("wide", "Wide", heads, (("a name", *range(20)), ("b", *range(100, 120))))
    lines = render.terminal(wide).splitlines()
    assert max(map(len, lines)) <= render.WIDTH
    values = [word for line in lines if line.startswith(("a name", "b ")) for word in line.split() if word.isdigit()]
    assert sorted(map(int, values)) == sorted([*range(20), *range(100, 120)])
    assert len([line for line in lines if line.startswith("run ")]) == 3
    texts = Table("texts", "Texts", (Head("a"), Head("b")), (("x", "y"),))
    assert list(render.parts(TABLE)) == [TABLE] and list(render.parts(texts)) == [texts]


def test_markdown_and_latex_escape_what_they_would_take_for_commands() -> None:
    markdown, latex = render.markdown(TABLE), render.latex(TABLE)
    assert "50% _ & \\|" in markdown and "a_b & &lt;c>" in markdown and "* a note" in markdown
    assert r"a\_b \& \ensuremath{<}c\ensuremath{>}" in latex and r"50\% \_ \&" in latex
    assert latex.index(r"\toprule") < latex.index(r"\midrule") < latex.index(r"\bottomrule")


def test_csv_has_all_digits_and_three_columns_for_an_estimate() -> None:
    heads, first, second = csv.reader(io.StringIO(render.csv_text(TABLE)))
    assert heads == ["run", "share", "share low", "share high", "count", "p"]
    assert first == ["a_b & <c>", "0.5", "0.25", "0.75", "1234567", "1e-05"] and second[1:4] == ["", "", ""]


def test_json_says_what_its_columns_mean() -> None:
    value = render.json_value(TABLE)
    assert value["columns"] == {"run": "run", "share": "what it says", "count": "n", "p": "p"}
    assert value["rows"][0]["share"] == {"value": 0.5, "low": 0.25, "high": 0.75, "problems": 8}
    assert value["rows"][1]["share"] is None
