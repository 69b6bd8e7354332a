"""3-SAT: answers by full enumeration, searches whose every step is justified."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.synthetic import gold_trace, sat_dataset, sat_problems
from hcot_lmeval.synthetic.sat import SatProblem, literal_values, sample_sat
from hcot_lmeval.trace import Policy
from tests.synthetic_traces import Block, check_legality, root_block, run

seeded = given(size=st.integers(3, 6), satisfiable=st.booleans(), seed=st.integers(0, 10**6))

LABEL = "[①-⑳㉑-㉟㊱-㊿]"


def draw(size: int, satisfiable: bool, seed: int) -> SatProblem:
    return sample_sat(size, satisfiable, random.Random(seed))


def parse(prompt: str) -> list[str]:
    return re.split(LABEL, prompt.rstrip("?"))[1:]


def solve(prompt: str, assumed: str = "") -> bool:
    """Tries every assignment in which the literals `assumed` are true."""
    clauses = parse(prompt)
    names = sorted(set(prompt.lower()) & set("abcdefghij"))
    choices = [[x for x in (name, name.upper()) if x.swapcase() not in assumed] for name in names]
    return any(all(set(clause) & set(true) for clause in clauses) for true in itertools.product(*choices))


@seeded
@settings(max_examples=50)
def test_answers_are_those_asked_for_by_full_enumeration(size: int, satisfiable: bool, seed: int) -> None:
    problem = draw(size, satisfiable, seed)
    assert solve(problem.prompt) == satisfiable
    assert problem.answer == str(int(satisfiable))
    assert gold_trace(problem).endswith(f"[RETURN]</think>\\boxed{{{int(satisfiable)}}}")


@pytest.mark.parametrize("size", [8, 10])
def test_large_answers(size: int) -> None:
    for problem in itertools.islice(sat_problems("test", 0, [size]), 4):
        assert problem.answer == str(int(solve(problem.prompt))) == root_block(gold_trace(problem)).solution


@seeded
@settings(max_examples=40)
def test_shape(size: int, satisfiable: bool, seed: int) -> None:
    problem = draw(size, satisfiable, seed)
    clauses = parse(problem.prompt)
    assert len(clauses) == int(4.5 * size)
    assert all(len(set(clause.lower())) == len(clause) == 3 for clause in clauses)
    assert set("".join(clauses).lower()) <= set(problem.variables) and len(problem.variables) == size


def check_scan(text: str, solution: str, clauses: list[str], true: str) -> None:
    """A scan copies the clauses, values their literals under `true`, and its solution follows from the values."""
    entries = re.findall(rf"{LABEL}((?:[a-jA-J][01~])+)(!?)", text)
    assert text.count("!") == sum(mark == "!" for _, mark in entries)
    ended, fork = "", ""
    for clause, (entry, mark) in zip(clauses, entries, strict=False):
        assert not ended
        values = dict(re.findall("(.)(.)", entry))
        assert clause.startswith("".join(values))
        assert values == {x: "1" if x in true else "0" if x.swapcase() in true else "~" for x in values}
        assert ("1" in values.values()) == entry.endswith("1") and entry.count("1") <= 1
        assert entry.endswith("1") or len(values) == 3
        left = [x for x, value in values.items() if value == "~"]
        if not entry.endswith("1"):
            assert (mark == "!") == (len(left) > 1)
            fork = f"~{left[0]}" if mark else fork
            ended = "" if mark else "".join(left) or "0"
        else:
            assert not mark
    assert solution == (ended or fork or "1")
    assert ended or len(entries) == len(clauses)


def check_branch(block: Block, prompt: str, true: str) -> None:
    """The blocks of a branch are scans, then at most two branches; its solution is whether `true` can be extended."""
    assert block.solution == str(int(solve(prompt, true)))
    scans = [child for child in block.blocks if child.text[0] not in "abcdefghijABCDEFGHIJ"]
    branches = block.blocks[len(scans) :]
    for scan in scans:
        check_scan(scan.text, scan.solution, parse(prompt), true)
        true += scan.solution if scan.solution.isalpha() else ""
    if not branches:
        assert scans[-1].solution == block.solution
        return
    literal = scans[-1].solution.removeprefix("~")
    assert [child.text for child in branches] == [literal, literal.swapcase()][: len(branches)]
    assert len(branches) == 2 or branches[0].solution == "1"
    assert branches[-1].solution == block.solution
    for child in branches:
        check_branch(child, prompt, true + child.text)


@seeded
@settings(max_examples=30)
def test_every_step_of_the_search_is_justified(size: int, satisfiable: bool, seed: int) -> None:
    problem = draw(size, satisfiable, seed)
    check_branch(root_block(gold_trace(problem)), problem.prompt, "")


def test_values_of_a_clause() -> None:
    cases = {"": "~~~", "A": "0~~", "Ab": "00~", "AbC": "000", "AB": "01", "c": "~~1", "a": "1"}
    assert {true: literal_values("aBc", frozenset(true)) for true in cases} == cases


@pytest.mark.parametrize("policy", [Policy.RECOMPUTE, Policy.EVICT])
@seeded
@settings(max_examples=20)
def test_gold_traces_are_legal(policy: Policy, size: int, satisfiable: bool, seed: int) -> None:
    check_legality(draw(size, satisfiable, seed), policy)


def test_the_live_context_holds_one_scan() -> None:
    for size in (3, 6, 10):
        for problem in itertools.islice(sat_problems("train", 0, [size]), 6):
            clauses = int(4.5 * size)
            # the prompt, a scan, a result of four tokens and a branch of two or four for each variable, the root
            assert run(problem)[0].peak <= (4 * clauses + 1) + 8 * clauses + 8 * size + 8


def test_half_are_satisfiable_at_every_size() -> None:
    problems = list(itertools.islice(sat_problems("test", 1, [3, 4]), 24))
    assert [(p.size, p.answer) for p in problems[:4]] == [(3, "1"), (4, "1"), (3, "0"), (4, "0")]
    assert sum(p.answer == "1" for p in problems) == 12


@seeded
@settings(max_examples=40)
def test_fingerprint_ignores_names_and_order(size: int, satisfiable: bool, seed: int) -> None:
    problem, rng = draw(size, satisfiable, seed), random.Random(seed)
    other = dict(zip(problem.variables, rng.sample("abcdefghij", size), strict=True))
    other |= {name.upper(): new.upper() for name, new in other.items()}
    clauses = ["".join(rng.sample([other[x] for x in clause], 3)) for clause in problem.clauses]
    rng.shuffle(clauses)
    names = tuple(other[name] for name in problem.variables)
    assert SatProblem(names, tuple(clauses)).fingerprint == problem.fingerprint


def test_fingerprint_sees_signs_and_repeated_clauses() -> None:
    formulas = [("abc", "abD"), ("abc", "aBD"), ("abc", "abD", "abD"), ("abc", "abc", "abD"), ("abc", "acd")]
    prints = [SatProblem(tuple("abcd"), formula).fingerprint for formula in formulas]
    assert len(set(prints)) == 5


def test_problems_are_pinned() -> None:
    """Published results name a seed; if this fails, raise the version of the task."""
    assert [problem.prompt for problem in itertools.islice(sat_problems("test", 0, [3, 4]), 2)] == PINNED


PINNED = [
    "①Ghf②fhG③hgF④gfH⑤HFg⑥FHg⑦gHF⑧FHg⑨fhG⑩hfg⑪GfH⑫hgf⑬hFg?",
    "①cHJ②Icj③IHC④iCJ⑤HJC⑥cIH⑦Hic⑧jci⑨Chj⑩JiH⑪hiC⑫iJC⑬ijh⑭hjC⑮CIj⑯cJH⑰Cih⑱Icj?",
]


def test_dataset_for_the_harness() -> None:
    data = sat_dataset(sizes=[3, 5], size=8, pretrained="ignored")["test"]
    assert data["variables"] == [3, 5] * 4
    assert [int(answer) for answer in data["answer"]] == [solve(prompt) for prompt in data["problem"]]
    assert min(data["blocks"]) >= 3
