"""From sources to packed rows: what is learned, what is left out and said so, what is held out, and what is cached."""

import json
from collections import Counter

import datasets
import pytest
from bench_training import pack

from hcot_lmeval.grammar import Grammar
from hcot_lmeval.markup import get_markup
from hcot_lmeval.trace import IGNORE
from hcot_lmeval.training.config import DataConfig
from hcot_lmeval.training.data import dataset
from hcot_lmeval.training.data.dataset import Finding, TrainingData, held_out_problems
from hcot_lmeval.training.data.documents import compile_document, split_stages
from hcot_lmeval.training.data.text import TextForm
from hcot_lmeval.vocabulary import marker_ids, token_id
from tests.tiny import THINK, tiny_tokenizer

HCOT = get_markup("hcot")
TOKENIZER = tiny_tokenizer()
GRAMMAR = Grammar(
    marker_ids(TOKENIZER), tuple(token_id(TOKENIZER, text) for text in THINK), frozenset({TOKENIZER.eos_token_id})
)
BLOCK = "[THOUGHT]Let us see.[SOLUTION]Then 7.[RETURN]"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def row(number, trace=None, **more):
    trace = (
        f"How?[THOUGHT]{'x ' * (number % 7)}{BLOCK * (number % 3)}[SOLUTION]{number}[RETURN]"
        if trace is None
        else trace
    )
    return {"question": f"What is {number}?", "hierarchical_cot": trace, "expected_answer": str(number)} | more


def save(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return {"path": name}


def data(rows=None, **config):
    config = {"row_length": 200} | config
    if rows is not None:
        config["train"] = [save("rows.jsonl", rows)]
    return TrainingData(DataConfig(**config), TOKENIZER, GRAMMAR, HCOT)


def expected_examples(rows):
    form = TextForm(TOKENIZER, HCOT)
    return [
        form.example(
            {
                "question": r["question"],
                "messages": None,
                "trace": r["hierarchical_cot"],
                "answer": r["expected_answer"],
            }
        )
        for r in rows
    ]


def learned(rows):
    """The targets of each row of a run, as a multiset."""
    return Counter(t for row in rows for t in row["targets"] if t != IGNORE)


ROWS = [row(n) for n in range(40)]


@pytest.mark.parametrize("policy", ["off", "recompute", "evict"])
def test_rows_are_the_compiled_documents_packed(policy):
    documents = [compile_document(e, GRAMMAR, policy, max_length=200) for e in expected_examples(ROWS)]
    prepared = data(ROWS).train(policy)
    assert list(prepared.rows) == pack(documents, 200)
    report = prepared.report
    assert (report.rows, report.used, report.truncated, report.findings) == (40, 40, 0, [])
    assert report.trace_tokens == sum(len(example.ids) for example in expected_examples(ROWS))
    assert report.forwarded_tokens == prepared.rows.tokens == sum(map(len, documents))
    assert report.targets == learned(prepared.rows).total() == sum(document.learned for document in documents)
    assert report.longest == max(map(len, documents))
    assert (report.packed_rows, report.padding) == (len(prepared.rows), prepared.rows.padding)


def test_stages_are_split_and_packed():
    documents = [d for e in expected_examples(ROWS) for d in split_stages(e, GRAMMAR, "recompute", max_length=200)]
    stages, packed = data(ROWS, form="stages").train("recompute"), data(ROWS).train("recompute")
    assert list(stages.rows) == pack(documents, 200) and len(documents) > 40
    assert learned(stages.rows) == learned(packed.rows)
    for name in ("rows", "used", "targets", "trace_tokens", "without_answer", "without_block", "findings"):
        assert getattr(stages.report, name) == getattr(packed.report, name)
    assert stages.digest != packed.digest


def test_rows_are_counted_once_however_many_stages_they_have():
    reports = [
        data(MIXED, form=form, malformed="keep", held_out=[save("held.jsonl", MIXED[5:6])]).train("recompute").report
        for form in ("stages", "packed")
    ]
    for name in ("rows", "used", "elsewhere", "truncated", "targets", "trace_tokens", "without_block", "findings"):
        assert getattr(reports[0], name) == getattr(reports[1], name)


def test_without_prunes_the_only_stage_is_the_plain_document():
    assert list(data(ROWS, form="stages").train("off").rows) == list(data(ROWS).train("off").rows)


def test_a_policy_without_stages_is_refused():
    with pytest.raises(ValueError, match="form=packed"):
        data(ROWS, form="stages").train("evict")


# --- rows that are left out -------------------------------------------------------------------------------------------

BAD = {
    1: (row(1, "[THOUGHT]a[SOLUTION]b"), ("think_in_solution", "unclosed")),
    3: (row(3, "a[RETURN]b[SOLUTION]c"), ("stray_close", "stray_split")),
    4: (row(4, ""), ("no_trace",)),
    6: (row(6, question=None), ("no_question",)),
    7: (row(7, "word " * 300), ("too_long",)),
    8: (row(8, "a <|endoftext|> b" + BLOCK), ("special_token",)),
}
MIXED = [BAD[n][0] if n in BAD else row(n) for n in range(10)]


def test_rows_are_left_out_with_their_reasons():
    prepared = data(MIXED).train("recompute")
    report = prepared.report
    assert report.findings == [Finding("rows.jsonl", n, reasons, kept=False) for n, (_, reasons) in BAD.items()]
    assert report.rejected == report.findings
    good = [r for n, r in enumerate(MIXED) if n not in BAD]
    assert learned(prepared.rows) == learned(data(good).train("recompute").rows)
    text = str(report)
    assert "4 of 10 rows" in text
    assert "left out: 6 rows" in text
    assert "too_long 1" in text


def test_malformed_rows_are_kept_on_request():
    report = data(MIXED, malformed="keep").train("recompute").report
    assert [f.row for f in report.findings if f.kept] == [1, 3, 8]
    assert [f.row for f in report.rejected] == [4, 6, 7]
    assert report.used == 7
    assert "kept: 3 rows (" in str(report)


def test_rows_without_a_block_are_counted_by_source():
    sources = [save("one.jsonl", ROWS[:4]), save("other.jsonl", [row(50, "flat"), row(51, "flat"), row(52)])]
    report = data(train=sources).train("recompute").report
    assert report.without_block == Counter({"other.jsonl": 2})
    assert "without a single block, so nothing is pruned in them: 2 of other.jsonl" in str(report)
    assert "without a single" not in str(data(ROWS).train("recompute").report)


@pytest.mark.parametrize("form", ["packed", "stages"])
def test_long_traces_are_cut_or_dropped(form):
    rows = [row(n, f"{n}" + BLOCK * 60) for n in range(3)] + [row(3)]
    cut = data(rows, form=form).train("recompute")
    assert (cut.report.truncated, cut.report.findings) == (3, [])
    assert cut.report.longest <= 200
    assert learned(cut.rows)[TOKENIZER.eos_token_id] == 1  # of the only whole trace
    dropped = data(rows, form=form, too_long="drop").train("recompute").report
    assert [(f.row, f.reasons) for f in dropped.rejected] == [(n, ("too_long",)) for n in range(3)]


def test_rows_without_an_answer_are_counted():
    rows = [row(0), row(1, expected_answer=None), row(2, expected_answer=" ")]
    assert data(rows).train("off").report.without_answer == 2


# --- held out ---------------------------------------------------------------------------------------------------------


def test_a_share_is_held_out_by_question():
    rows = [row(n) for n in range(200)] + [row(n, "Again." + BLOCK) for n in range(200)]
    split = data(rows, held_out_share=0.25)
    train, held_out = split.train("recompute"), split.held_out("recompute")
    assert learned(train.rows) + learned(held_out.rows) == learned(data(rows).train("recompute").rows)
    assert 60 <= held_out.report.used <= 140
    assert train.report.used + held_out.report.used == 400
    assert train.report.elsewhere == held_out.report.used
    assert held_out.report.elsewhere == train.report.used
    assert f"{train.report.used} of 400 rows" in str(train.report)
    assert held_out.report.used % 2 == 0  # both traces of a question are on one side
    prompts = {tuple(ids) for ids, _ in split.problems(400)}
    assert len(prompts) == held_out.report.used / 2


def test_nothing_is_held_out_by_default():
    split = data(ROWS)
    assert len(split.held_out("off").rows) == 0
    assert split.problems(5) == []


def test_held_out_questions_are_never_trained_on():
    split = data([row(n) for n in range(10)], held_out=[save("held.jsonl", [row(n) for n in (3, 5, 77)])])
    train, held_out = split.train("recompute"), split.held_out("recompute")
    assert [(f.row, f.reasons) for f in train.report.rejected] == [(3, ("in_held_out",)), (5, ("in_held_out",))]
    assert (train.report.used, held_out.report.used, held_out.report.findings) == (8, 3, [])
    assert sorted(answer for _, answer in split.problems(9)) == ["3", "5", "77"]


def test_problems_are_prompts_and_answers():
    rows = [row(0), row(1, expected_answer=None), row(2), row(0, "Again."), row(4, ""), row(5)]
    examples = data(rows).examples(DataConfig(train=[{"path": "rows.jsonl"}]).train)
    expected = [(list(e.prompt_ids), e.answer) for e in expected_examples([rows[0], rows[2], rows[5]])]
    assert held_out_problems(examples, 9) == expected
    some = held_out_problems(examples, 2, seed=1)
    assert some == held_out_problems(examples, 2, seed=1)
    assert len(some) == 2
    assert all(problem in expected for problem in some)


# --- sources, cache, digest -------------------------------------------------------------------------------------------


def test_several_sources_are_one_behind_the_other():
    sources = [save("a.jsonl", ROWS[:9]), save("b.jsonl", MIXED)]
    both = data(train=sources).train("evict")
    assert both.report.rows == 19
    assert {f.source for f in both.report.findings} == {"b.jsonl"}
    parts = [data(train=[source]).train("evict") for source in sources]
    assert learned(both.rows) == sum((learned(part.rows) for part in parts), Counter())
    own = data(train=sources[:1]).train("evict", DataConfig(train=sources[1:]).train)
    assert own.digest == parts[1].digest


def refuse(*args, **kwargs):
    raise AssertionError("computed again")


def test_second_run_comes_from_the_cache(monkeypatch):
    first = data(ROWS).train("recompute")
    monkeypatch.setattr(dataset, "tokenise", refuse)
    monkeypatch.setattr(dataset, "compile_rows", refuse)
    again = TrainingData(DataConfig(train=[{"path": "rows.jsonl"}], row_length=200), tiny_tokenizer(), GRAMMAR, HCOT)
    second = again.train("recompute")
    assert (second.digest, second.report) == (first.digest, first.report)
    assert list(second.rows) == list(first.rows)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"system_prompt": "Think."}, "tokenise"),
        ({"row_length": 150}, "compile_rows"),
        ({"malformed": "keep"}, "compile_rows"),
        ({"form": "stages"}, "compile_rows"),
        ({"too_long": "drop"}, "compile_rows"),
    ],
)
def test_other_options_are_not_taken_from_the_cache(monkeypatch, options, what):
    data(ROWS).train("recompute")
    monkeypatch.setattr(dataset, what, refuse)
    with pytest.raises(AssertionError, match="computed again"):
        data(**{"train": [{"path": "rows.jsonl"}]} | options).train("recompute")


def test_workers_change_nothing():
    one, two = data(MIXED), data(train=[{"path": "rows.jsonl"}], workers=2, row_length=201)
    assert two.train("recompute").report.findings == one.train("recompute").report.findings
    assert two.train("off").digest == one.train("off").digest


def test_digest_tells_data_apart():
    digests = {data(rows).train(policy).digest for rows in (ROWS, ROWS[1:]) for policy in ("off", "recompute")}
    assert len(digests) == 4
