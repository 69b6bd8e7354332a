"""The log of a run and its picture."""

import json
import math
import subprocess
import sys

import pytest

from hcot_lmeval.training.curves import Curves, draw, read_records, save_figure, series

TRAIN = [{"step": step, "loss": 9.0, "cross_entropy": 30 / step} for step in range(10, 101, 10)]
HELD_OUT = [
    {
        "step": step,
        "eval_loss": 31 / step,
        "eval_loss_text": 3.0,
        "eval_loss_markers": 2.0,
        "eval_loss_solution": 1.0,
        "eval_loss_answer": math.nan,
        "eval_accuracy": step / 200,
        "eval_completion": step / 100,
        "eval_illegal_traces": 0.1,
        "eval_generated_tokens": 200.0,
        "eval_peak_live_tokens": 90.0,
    }
    for step in (50, 100)
]
RECORDS = TRAIN + HELD_OUT


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    found = {line.get_label(): tuple(map(list, line.get_data())) for line in axes.get_lines()}
    return {label: data for label, data in found.items() if not label.startswith("_")}


def verticals(axes) -> list[float]:
    return [line.get_xdata()[0] for line in axes.get_lines() if list(line.get_ydata()) == [0, 1]]


def test_records_come_back(tmp_path):
    curves = Curves(tmp_path / "run" / "curves.jsonl")
    for record in RECORDS:
        curves.append(record)
    assert curves.records == RECORDS
    found = read_records(curves.path)
    assert found[:-2] == RECORDS[:-2]
    assert math.isnan(found[-1].pop("eval_loss_answer"))
    assert found[-1].items() <= HELD_OUT[-1].items()


def test_the_file_is_json_for_every_reader(tmp_path):
    curves = Curves(tmp_path / "curves.jsonl")
    curves.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "text": "größer"})

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    line = curves.path.read_text(encoding="utf-8")
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": None, "text": "größer"}


@pytest.mark.parametrize("step", [0, 49, 50, 55, 100])
def test_a_resumed_run_has_each_point_once(tmp_path, step):
    path = tmp_path / "curves.jsonl"
    ordered = sorted(RECORDS, key=lambda record: record["step"])
    first = Curves(path)
    for record in ordered:
        first.append(record)
    second = Curves(path, resumed_from=step)
    assert [r["step"] for r in second.records] == [r["step"] for r in ordered if r["step"] <= step]
    for record in ordered:
        if record["step"] > step:
            second.append(record)
    assert [list(r) for r in read_records(path)] == [list(r) for r in ordered]
    assert [r["step"] for r in read_records(path)] == [r["step"] for r in ordered]


def test_a_run_that_starts_forgets_the_one_before(tmp_path):
    path = tmp_path / "curves.jsonl"
    Curves(path).append({"step": 1})
    assert Curves(path).records == []
    assert read_records(path) == []
    assert Curves(tmp_path / "never.jsonl", resumed_from=7).records == []


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"loss": 1}', '{"step": "x"}', "\xff"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "curves.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"curves\.jsonl:2 is no record"):
        Curves(path, resumed_from=9)


@pytest.mark.parametrize("record", [{}, {"step": None}, {"step": 1.5}])
def test_a_record_needs_a_step(tmp_path, record):
    with pytest.raises(ValueError, match="'step'"):
        Curves(tmp_path / "curves.jsonl").append(record)


def test_series_take_the_last_of_each_step():
    records = [{"step": 2, "a": 1}, {"step": 1, "a": 5}, {"step": 2, "b": 3}, {"step": 2, "a": 4}]
    assert series(records, "a") == ([1, 2], [5.0, 4.0])
    assert series(records, "c") == ([], [])


def test_the_axes_carry_the_data():
    figure = draw(RECORDS, phases=[(0, "off"), (60, "recompute")], best_step=100)
    loss, classes, generation, tokens = figure.axes
    best = "best checkpoint (100)"
    assert set(lines(loss)) == {"training", "held out", best}
    assert lines(loss)["training"] == ([*range(10, 101, 10)], [30 / step for step in range(10, 101, 10)])
    assert lines(loss)["held out"] == ([50, 100], [31 / 50, 31 / 100])
    assert set(lines(classes)) == {"text", "markers", "solution", "answer", best}
    assert lines(generation)["solved"] == ([50, 100], [25.0, 50.0])
    assert lines(generation)["illegal trace"] == ([50, 100], [10.0, 10.0])
    assert lines(generation)["came to an end"] == ([50, 100], [50.0, 100.0])
    assert lines(tokens)["generated"][1] == [200.0, 200.0]
    assert lines(tokens)["most live at once"][1] == [90.0, 90.0]
    for axes in figure.axes:
        assert verticals(axes) == [0, 60, 100]
        assert [text.get_text().strip() for text in axes.texts] == ["off", "recompute"]
        assert axes.get_xlabel() == "optimiser steps"
        assert axes.get_title()
        assert {text.get_text() for text in axes.get_legend().get_texts()} == set(lines(axes))
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "nats per token",
        "nats per token",
        "% of the problems",
        "tokens per problem",
    ]


def test_the_training_loss_is_the_cross_entropy_if_it_is_told_apart():
    figure = draw([{"step": 1, "loss": 4.0}, {"step": 2, "loss": 9.0, "cross_entropy": 3.0}])
    assert lines(figure.axes[0])["training"] == ([1, 2], [4.0, 3.0])


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": math.nan}], RECORDS], ids=["none", "nan", "all"])
def test_the_png_is_written_whole(tmp_path, records):
    path = tmp_path / "curves.png"
    path.write_bytes(b"older")
    save_figure(records, path, best_step=1)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_logging_needs_no_matplotlib():
    code = "import sys, hcot_lmeval.training.curves; assert not {'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
