"""The metrics of the tasks, by hand and against brute force."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcot_lmeval.response import Response
from hcot_lmeval.scoring import aggregate, process
from tests.tasks_hub import statistics

DOC = {"id": "low-en-0", "question": "What is 16+17?", "answer": "33", "language": "en", "level": "top"}


def response(answer: str, thinking: str = "", **changes: object) -> Response:
    stats = statistics(**changes)
    return Response(answer, stats=stats, thinking=thinking, finish_reason=stats["finish_reason"])


# ---- pass@k, maj@k, dw_acc


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = list(combinations(right, k))
    expected = Fraction(sum(any(s) for s in subsets), len(subsets))
    assert aggregate.pass_at_k(len(right), sum(right), k) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_what_has_no_meaning(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        aggregate.pass_at_k(n, c, k)


@pytest.mark.parametrize(("n", "ks"), [(1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (6, [2, 4, 6]), (8, [2, 4, 8])])
def test_the_k_of_pass_at_k(n: int, ks: list[int]) -> None:
    assert aggregate.pass_ks(n) == ks


def vote(answers: tuple[str | None, ...], gold: str) -> bool:
    """The plain vote: the most frequent answer, the one that came first among equals."""
    voters = [answer.lower() for answer in answers if answer is not None]
    return bool(voters) and max(voters, key=lambda a: (voters.count(a), -voters.index(a))) == gold


@given(st.lists(st.sampled_from(["a", "A", "b", "B", "c", None]), min_size=1, max_size=6))
def test_majority_is_the_mean_of_the_plain_vote_over_all_orders(answers: list[str | None]) -> None:
    # upper and lower case mean the same, so that grouping by equal strings would fail
    right = [answer in ("a", "A") for answer in answers]
    orders = list(permutations(answers))
    expected = sum(vote(order, "a") for order in orders) / len(orders)
    got = aggregate.majority(answers, right, lambda x, y: x.lower() == y.lower())
    assert got == pytest.approx(expected, abs=1e-12)


def test_difficulty_weighted_accuracy_by_hand() -> None:
    items = [("low", 1.0), ("low", 1.0), ("medium", 1.0), ("medium", 0.0), ("high", 0.5), ("high", 0.0)]
    items += [("top", 0.0), ("top", 1.0)]
    assert aggregate.difficulty_weighted(items) == pytest.approx((1 * 1 + 2 * 0.5 + 4 * 0.25 + 8 * 0.5) / 15)
    # sample variances: 0, 1/2, 1/8, 1/2; two problems in each level
    squares = (4 * 0.5 + 16 * 0.125 + 64 * 0.5) / 2
    assert aggregate.difficulty_weighted_stderr(items) == pytest.approx(math.sqrt(squares) / 15)


def test_difficulty_weighted_accuracy_needs_every_level() -> None:
    assert math.isnan(aggregate.difficulty_weighted([("low", 1.0), ("medium", 1.0), ("high", 1.0)]))
    assert aggregate.difficulty_weighted_stderr([(level, 1.0) for level in aggregate.LEVELS]) == "N/A"


# ---- one response


def test_a_right_answer_with_statistics() -> None:
    metrics = process.boxed(DOC, [response(r"It is clearly \boxed{33}.")])
    stats = statistics()
    assert metrics == {
        "acc": 1.0,
        "unchecked": 0.0,
        "boxed": 1.0,
        "completed": 1.0,
        "generated_tokens": 100.0,
        "pruned_share": 0.4,
        "peak_live_tokens": 80.0,
        "illegal_tokens": 0.0,
        "unclosed_blocks": 0.0,
        "forced_tokens": 0.0,
        "loops": 0.0,
        "lang_answer": 1.0,
        "lang_thinking": 1.0,
        "requests": [stats],
    }


def test_structure_is_counted() -> None:
    stats = {"illegal_tokens": 3, "malformed": {"unclosed": 2, "stray_close": 3}, "loops": 4}
    metrics = process.boxed(DOC, [response("", **stats, forced={"constraints": 2, "force_answer": 5})])
    assert [metrics[name] for name in ("illegal_tokens", "unclosed_blocks", "forced_tokens", "loops")] == [3, 2, 7, 1]


@pytest.mark.parametrize(
    ("text", "acc", "boxed"),
    [
        (r"\boxed{033}", 1.0, 1.0),
        (r"\boxed{34}", 0.0, 1.0),
        (r"\boxed{34} no, \boxed{33}", 1.0, 1.0),  # the last box counts
        ("33", 0.0, 0.0),
        (r"\boxed{33", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_answers(text: str, acc: float, boxed: float) -> None:
    metrics = process.boxed(DOC, [response(text)])
    assert (metrics["acc"], metrics["boxed"], metrics["unchecked"]) == (acc, boxed, 0.0)


def test_unchecked_is_told_from_wrong() -> None:
    metrics = process.boxed({"answer": "33"}, [response(r"\boxed{9^{9^{9^{9}}}}")])
    assert (metrics["acc"], metrics["boxed"]) == (0.0, 1.0)
    grade = process.answers.Grade(correct=None, answer="9^{9^{9}}", reason="timeout")
    assert process.judgement(grade) == {"acc": 0.0, "unchecked": 1.0, "boxed": 1.0}


@pytest.mark.parametrize(
    ("reason", "completed"), [("eos", 1.0), ("stop", 1.0), ("length", 0.0), ("context", 0.0), ("loop", 0.0)]
)
def test_completed(reason: str, completed: float) -> None:
    assert process.statistics(response("", finish_reason=reason))["completed"] == completed


def test_nothing_generated_is_nothing_pruned() -> None:
    assert process.statistics(response("", generated_tokens=0, pruned_tokens=0))["pruned_share"] == 0.0


def test_a_plain_string_has_no_statistics() -> None:
    assert process.polymath(DOC, [r"\boxed{33}"]) == {
        "acc": 1.0,
        "unchecked": 0.0,
        "boxed": 1.0,
        "lang_answer": 1.0,
        "dw_acc": ("top", 1.0),
        "dw_acc_stderr": ("top", 1.0),
    }


def test_the_standard_error_stands_behind_its_metric() -> None:
    keys = list(process.polymath(DOC, [response(r"\boxed{33}")]))
    assert keys.index("dw_acc_stderr") > keys.index("dw_acc")


@pytest.mark.parametrize("key", ["answer", "Answer", "ANSWER"])
def test_the_gold_field_may_be_written_in_any_case(key: str) -> None:
    assert process.gold_of({"id": 1, key: 33}) == "33"


def test_a_document_without_gold_is_an_error() -> None:
    with pytest.raises(ValueError, match="question"):
        process.gold_of({"question": "?"})


# ---- several responses


def test_repeats_by_hand() -> None:
    texts = [r"\boxed{33}", r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{33.0}", "none"]
    responses = [response(text, generated_tokens=100 + 10 * i, pruned_tokens=0) for i, text in enumerate(texts)]
    metrics = process.sampled_polymath(DOC, [responses])
    assert metrics["avg@5"] == 0.4
    # one half is written in two ways: two votes against the two of 33
    assert metrics["maj@5"] == 0.5
    assert metrics["pass@2"] == pytest.approx(1 - (3 * 2) / (5 * 4))
    assert metrics["pass@4"] == 1.0
    assert metrics["pass@5"] == 1.0
    assert metrics["boxed"] == 0.8
    assert metrics["generated_tokens"] == 120.0
    assert metrics["dw_acc"] == ("top", 0.4)
    assert [entry["generated_tokens"] for entry in metrics["requests"]] == [100, 110, 120, 130, 140]
    assert "acc" not in metrics
    assert "pass@1" not in metrics


def test_one_repeat_is_plain_accuracy() -> None:
    metrics = process.sampled({"answer": "33"}, [[r"\boxed{33}"]])
    assert metrics == {"avg@1": 1.0, "maj@1": 1.0, "unchecked": 0.0, "boxed": 1.0}


# ---- lm-eval's own number

OUTPUTS = [
    r"\boxed{33}",
    r"\boxed{033}",
    r"\boxed{33.0}",
    r"\boxed 33",
    r"\boxed {33}",
    r"\fbox{33}",
    r"\boxed{33",
    r"\boxed{\boxed{33}}",
    r"\boxed{12} then \boxed{33}",
    r"\boxed{33} then \boxed{12}",
    "33",
    " 33 ",
    "33.",
    "$33$",
    "so $x = 33$",
    "$x=33$ and $y=2$",
    "$1$ $33$",
    "$",
    "$$33$$",
    r"\boxed{33^\circ}",
    r"\boxed{33\text{ miles}}",
    r"\boxed{\frac{66}{2}}",
    r"\boxed{x=33}",
    r"\boxed{33\%}",
    "",
    "\\boxed{}",
    "\\text{ a \\text{ b",
    "\\frac",
]


@pytest.mark.parametrize("text", OUTPUTS)
@pytest.mark.parametrize("doc", [{"ID": "x", "Problem": "?", "Solution": "", "Answer": 33}, {"answer": "33"}])
def test_exact_match_is_that_of_lm_eval(text: str, doc: dict[str, object]) -> None:
    from lm_eval.tasks.aime.utils import process_results

    upstream = process_results(doc, [text])
    for given_text in (text, response(text)):
        metrics = process.aime24(doc, [given_text])
        assert next(iter(metrics)) == "exact_match"
        assert metrics["exact_match"] == upstream["exact_match"]
        assert type(metrics["exact_match"]) is type(upstream["exact_match"])


def test_the_table_of_outputs_holds_both_verdicts() -> None:
    verdicts = {process.aime24({"answer": "33"}, [text])["exact_match"] for text in OUTPUTS}
    assert verdicts == {0, 1}
