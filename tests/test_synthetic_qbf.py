"""Quantified formulas: answers by full enumeration, traces that follow from the live context alone."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.synthetic import gold_trace, qbf_dataset, qbf_problems
from hcot_lmeval.synthetic.qbf import QbfProblem, sample_qbf
from hcot_lmeval.trace import LiveContext, Policy
from tests.synthetic_traces import Block, check_legality, ids_of, root_block, run, words

seeded = given(size=st.integers(3, 7), valid=st.booleans(), seed=st.integers(0, 10**6))

LABEL = "[①-⑳㉑-㉟㊱-㊿]"


def draw(size: int, valid: bool, seed: int) -> QbfProblem:
    return sample_qbf(size, valid, random.Random(seed))


def parse(prompt: str) -> tuple[list[tuple[str, str]], list[str]]:
    prefix = re.findall("([∃∀])([a-j])~", prompt)
    return prefix, re.split(LABEL, prompt.rstrip("?").replace("~", ""))[1:]


def solve(prompt: str, path: str = "") -> bool:
    """Evaluates the formula with the literals of `path` true, by trying everything: no rule decides early."""
    prefix, clauses = parse(prompt)
    if len(path) == len(prefix):
        return all([any(literal in path for literal in clause) for clause in clauses])
    quantifier, name = prefix[len(path)]
    values = [solve(prompt, path + literal) for literal in (name, name.upper())]
    return any(values) if quantifier == "∃" else all(values)


@seeded
@settings(max_examples=60)
def test_answers_are_those_asked_for_by_full_enumeration(size: int, valid: bool, seed: int) -> None:
    problem = draw(size, valid, seed)
    assert solve(problem.prompt) == valid
    assert problem.answer == str(int(valid))
    assert gold_trace(problem).endswith(f"[SOLUTION]{int(valid)}[RETURN]</think>\\boxed{{{int(valid)}}}")


@pytest.mark.parametrize("size", [8, 9, 10])
def test_large_answers(size: int) -> None:
    for problem in itertools.islice(qbf_problems("test", 0, [size]), 2):
        assert problem.answer == str(int(solve(problem.prompt)))


@seeded
@settings(max_examples=60)
def test_shape(size: int, valid: bool, seed: int) -> None:
    prefix, clauses = parse(draw(size, valid, seed).prompt)
    names = {name for _, name in prefix}
    tautologies = [clause for clause in clauses if len(set(clause.lower())) < len(clause)]
    others = [clause for clause in clauses if clause not in tautologies]
    assert len(prefix) == len(names) == size
    assert {quantifier for quantifier, _ in prefix} == {"∃", "∀"}
    assert len(others) == 2 * size and len(tautologies) <= 3
    assert {len(clause) for clause in clauses} <= {2, 3}
    assert set("".join(clauses).lower()) <= names
    assert all(any(("∃", literal) in prefix for literal in clause.lower()) for clause in others)


@seeded
@settings(max_examples=40)
def test_every_block_has_the_value_of_its_branch(size: int, valid: bool, seed: int) -> None:
    prompt = draw(size, valid, seed).prompt

    def check(block: Block, path: str) -> None:
        assert block.solution == str(int(solve(prompt, path)))
        for child in block.blocks:
            check(child, path + assigned(child.text[:4]))

    check(root_block(gold_trace(draw(size, valid, seed))), "")


def assigned(head: str) -> str:
    """The literal that the first four tokens of a block make true, as in C0c1."""
    negation, value, name, other = head
    assert negation == name.upper() and {value, other} == {"0", "1"}
    return name if other == "1" else negation


def predict(live: list[str]) -> str:
    """The next token of a gold trace, from the live context alone: it sees nothing of what was pruned."""
    prompt = "".join(live[: live.index("<think>")])
    rest = live[live.index("<think>") + 1 :]
    prefix, clauses = parse(prompt)
    path, inside, results = "", [], []  # literals of the open blocks; text and results of the innermost one
    if not rest:
        return "[THOUGHT]"
    if "</think>" in rest or (rest[-1] == "[RETURN]" and rest.count("[THOUGHT]") == 1):
        end = ["</think>", "\\boxed{", rest[1], "}"]
        return end[len(rest) - 3]
    for at, token in enumerate(rest):
        if token == "[THOUGHT]":
            closed = rest[at + 2 : at + 3] == ["[RETURN]"]
            inside, results = (inside, [*results, rest[at + 1]]) if closed else ([], [])
        elif token == "[SOLUTION]" or rest[at - 1] == "[SOLUTION]":
            inside.append(token)
        elif token != "[RETURN]" and rest[at + 1 : at + 2] != ["[RETURN]"]:
            inside.append(token)
            if at > 4 and rest[at - 4] == "[THOUGHT]" and rest[at - 2] != "[RETURN]":
                path += assigned("".join(rest[at - 3 : at + 1]))
    return after(prefix, clauses, path, "".join(inside), results)


def after(prefix: list[tuple[str, str]], clauses: list[str], path: str, inside: str, results: list[str]) -> str:
    """What the innermost block goes on with."""
    head, _, solution = inside.partition("[SOLUTION]")
    if "[SOLUTION]" in inside:
        return "[RETURN]" if solution else results[-1] if results else head[-1]
    body = head[4:] if path else head
    if len(path) < len(prefix):
        quantifier, name = prefix[len(path)]
        if len(body) < 2:
            return (quantifier + name)[len(body)]
        decided = results and (len(results) == 2 or results[-1] == str(int(quantifier == "∃")))
        return "[SOLUTION]" if decided else "[THOUGHT]"
    whole = leaf(clauses, path)
    return "[SOLUTION]" if len(body) == len(whole) else whole[len(body)]


def leaf(clauses: list[str], path: str) -> str:
    """The values that a leaf writes, literal by literal."""
    text = ""
    for number, clause in enumerate(clauses):
        text += chr(0x2460 + number)
        for literal in clause:
            text += literal + ("1" if literal in path else "0")
            if literal in path:
                break
        else:
            return text
    return text


@settings(max_examples=15)
@given(size=st.integers(3, 5), valid=st.booleans(), seed=st.integers(0, 10**6))
def test_every_token_follows_from_the_live_context(size: int, valid: bool, seed: int) -> None:
    """No token needs what was pruned: a predictor that sees the live context alone writes the whole trace."""
    problem = draw(size, valid, seed)
    tokens = [*words(problem.prompt), *words(gold_trace(problem))]
    ids, markers = ids_of(problem.prompt + gold_trace(problem))
    text = dict(zip(ids, tokens, strict=True))
    context = LiveContext(markers)
    start = len(words(problem.prompt)) + 1
    for token in ids[:start]:
        context.push_inert(token)
    for at, token in enumerate(ids[start:]):
        live = [text[i] for i in context.live]
        written = live[::-1].index("[THOUGHT]") if context.depth > 1 else 0
        opened = context.depth > 1 and written < 4 and "[RETURN]" not in live[len(live) - written :]
        expected = branch(live[: len(live) - written])[written] if opened else predict(live)
        assert text[token] == expected, (at, "".join(live))
        context.push(token)


def branch(live: list[str]) -> str:
    """What a block that has just opened begins with: its variable is true, or false behind a first result."""
    first = live[-2] != "[RETURN]"
    name = live[-2] if first else live[-5]
    return f"{name.upper()}0{name}1" if first else f"{name.upper()}1{name}0"


@pytest.mark.parametrize("policy", [Policy.RECOMPUTE, Policy.EVICT])
@seeded
@settings(max_examples=30)
def test_gold_traces_are_legal(policy: Policy, size: int, valid: bool, seed: int) -> None:
    steps = check_legality(draw(size, valid, seed), policy)
    assert max(step.depth for step in steps) == size + 1


def test_the_live_context_is_linear_and_the_trace_exponential() -> None:
    for size in (3, 6, 10):
        for problem in itertools.islice(qbf_problems("train", 0, [size]), 10):
            clauses = 2 * size + 3
            # the prompt, ten tokens a variable, a leaf, the markers of the root and of the leaf's solution
            assert run(problem)[0].peak <= (3 * size + 7 * clauses + 1) + 10 * size + 7 * clauses + 8
    lengths = [
        sum(run(problem)[0].length for problem in itertools.islice(qbf_problems("train", 0, [size]), 40))
        for size in (4, 7, 10)
    ]
    assert lengths[1] > 2.5 * lengths[0] and lengths[2] > 2.5 * lengths[1]


def test_half_are_valid_at_every_size() -> None:
    problems = list(itertools.islice(qbf_problems("test", 1, [3, 4]), 40))
    assert [(p.size, p.answer) for p in problems[:4]] == [(3, "1"), (4, "1"), (3, "0"), (4, "0")]
    assert sum(p.answer == "1" for p in problems) == 20


@seeded
@settings(max_examples=40)
def test_fingerprint_ignores_names_and_order(size: int, valid: bool, seed: int) -> None:
    problem, rng = draw(size, valid, seed), random.Random(seed)
    names = [name for _, name in problem.prefix]
    other = dict(zip(names, rng.sample("abcdefghij", size), strict=True))
    other |= {name.upper(): new.upper() for name, new in other.items()}
    clauses = ["".join(rng.sample([other[x] for x in clause], len(clause))) for clause in problem.clauses]
    rng.shuffle(clauses)
    same = QbfProblem(tuple((quantifier, other[name]) for quantifier, name in problem.prefix), tuple(clauses))
    assert same.fingerprint == problem.fingerprint


def test_fingerprint_sees_quantifiers_signs_and_clauses() -> None:
    problem = QbfProblem((("∃", "a"), ("∀", "b"), ("∃", "c")), ("ab", "Bc", "aC"))
    swapped = QbfProblem((("∀", "b"), ("∃", "a"), ("∃", "c")), problem.clauses)
    neighbours = QbfProblem((("∀", "b"), ("∃", "c"), ("∃", "a")), problem.clauses)
    others = [
        QbfProblem((("∃", "a"), ("∀", "b"), ("∀", "c")), problem.clauses),
        QbfProblem(problem.prefix, ("ab", "Bc", "ac")),
        QbfProblem(problem.prefix, ("ab", "Bc", "aC", "aC")),
        swapped,
    ]
    assert len({p.fingerprint for p in (problem, *others)}) == 5
    assert neighbours.fingerprint == swapped.fingerprint


def test_validity_cannot_be_guessed_from_the_quantifiers() -> None:
    """Drawn without care, valid formulas have more ∃ than others, and their number gives away four answers of five."""
    problems = list(itertools.islice(qbf_problems("train", 0, [4]), 400))
    right = 0
    for exists in range(1, 4):
        valid = [p.is_valid for p in problems if sum(quantifier == "∃" for quantifier, _ in p.prefix) == exists]
        right += max(sum(valid), len(valid) - sum(valid))
    assert right / 400 < 0.6


def test_problems_are_pinned() -> None:
    """Published results name a seed; if this fails, raise the version of the task."""
    assert [problem.prompt for problem in itertools.islice(qbf_problems("test", 0, [3, 4]), 2)] == PINNED


PINNED = [
    "∃e~∃g~∀j~①e~J~②e~G~j~③e~g~④e~g~J~⑤E~J~G~⑥e~J~?",
    "∃j~∀d~∀a~∃h~①J~j~d~②a~j~A~③j~D~H~④j~d~⑤d~h~⑥a~D~h~⑦h~d~a~⑧H~j~⑨h~J~⑩h~A~J~?",
]


def test_dataset_for_the_harness() -> None:
    data = qbf_dataset(sizes=[3, 5], size=8, pretrained="ignored")["test"]
    assert data["variables"] == [3, 5] * 4
    assert data["answer"] == ["1", "1", "0", "0"] * 2
    assert [int(answer) for answer in data["answer"]] == [solve(prompt) for prompt in data["problem"]]
    assert min(data["blocks"]) >= 3
