"""Costs counted by stretches equal those of the rule, token by token; tables say what was counted."""

from __future__ import annotations

import csv
import json
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.markup import PRESETS
from hcot_lmeval.prepare.measure import (
    Cost,
    CountOptions,
    Stretch,
    block_sizes,
    costs,
    cut,
    is_legal,
    make_counter,
    whole_blocks,
)
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow
from hcot_lmeval.prepare.stats import Distribution, gather, write_stats
from hcot_lmeval.trace import LiveContext, Policy, compile_trace
from tests import strategies
from tests.prepare_files import flat_row, prepared
from tests.reference import MARKERS

NAMES = st.sampled_from(sorted(PRESETS))


def stretches_of(ids, markers, markup):
    """Token ids of `tests.reference` as stretches: neighbouring text is one."""
    marks = {
        markers.open: markup.open,
        markers.split: markup.split,
        markers.close: markup.close,
        markers.lead: markup.lead,
    }
    found = []
    for mark, group in groupby(ids, key=lambda token: marks.get(token, "")):
        tokens = len(list(group))
        found += [Stretch(mark, mark, 1)] * tokens if mark else [Stretch("", "t" * tokens, tokens)]
    return found


def slowly(ids, prompt, markers, policy):
    """Peak, forwarded and live tokens by the rule itself."""
    context = LiveContext(markers, policy)
    for _ in range(prompt):
        context.push_inert(10**6)
    for token in ids:
        context.push(token)
    plan = compile_trace([10**6] * prompt + list(ids), prompt, markers, policy)
    return context.peak, len(plan), len(context.live)


@pytest.mark.parametrize("name", sorted(PRESETS))
@settings(max_examples=150)
@given(data=st.data(), prompt=st.integers(1, 4))
def test_costs_are_those_of_the_rule(name, data, prompt):
    markup, markers = PRESETS[name], MARKERS[name]
    ids = data.draw(st.one_of(strategies.well_formed(markers), strategies.soup(markers)))
    found = costs(stretches_of(ids, markers, markup), prompt, markup)
    for policy in Policy:
        cost = found[policy]
        assert (cost.peak, cost.forwarded, cost.live) == slowly(ids, prompt, markers, policy), policy


def test_costs_of_a_small_trace():
    trace = cut("a b[THOUGHT]c d e[SOLUTION]f[RETURN]g", PRESETS["hcot"], make_counter(None))
    found = costs(trace, 2, PRESETS["hcot"])
    assert found[Policy.OFF] == Cost(12, 12, 12)
    assert found[Policy.RECOMPUTE] == Cost(10, 13, 8)  # the solution is read again
    assert found[Policy.EVICT] == Cost(11, 12, 8)


def test_sizes_of_blocks_in_the_order_of_opening():
    text = "x[THOUGHT]a b [THOUGHT]c d e[SOLUTION]f[RETURN] g[SOLUTION] [RETURN]"
    trace = cut(text, PRESETS["hcot"], make_counter(None))
    assert is_legal(trace, PRESETS["hcot"])
    outer, inner = block_sizes(trace, PRESETS["hcot"])
    assert outer == (1, 10, 0, True, False)  # a b, the block within with three markers, g
    assert inner == (2, 3, 1, True, True)


def test_a_lead_belongs_to_no_size_and_has_to_be_there():
    text = "<|block_start|>a b c<|block_end|><|summary_start|>d e<|summary_end|>f"
    trace = cut(text, PRESETS["memento"], make_counter(None))
    assert block_sizes(trace, PRESETS["memento"]) == [(1, 3, 2, True, True)]
    without = cut(text.replace("<|summary_start|>", ""), PRESETS["memento"], make_counter(None))
    assert whole_blocks(without, PRESETS["memento"]) == []


def test_a_tokenizer_counts_as_it_encodes(tmp_path):
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    text = "<think>a sum[THOUGHT]of ten\n\n[SOLUTION]is 5[RETURN]</think>\n\nanswer"
    trace = cut(text, PRESETS["hcot"], make_counter(str(tmp_path)))
    assert sum(part.tokens for part in trace) == len(tokenizer.encode(text, add_special_tokens=False))
    assert make_counter(str(tmp_path))(["", "a b", ""])[::2] == [0, 0]


@given(st.lists(st.integers(0, 30), min_size=1), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_quantiles_are_exact(values, share):
    found = Distribution()
    found.counts.update(values)
    ordered = sorted(values)
    assert found.quantile(share) == next(v for i, v in enumerate(ordered, 1) if i >= share * len(values))
    assert (found.sum, found.size) == (sum(values), len(values))


def test_numbers_of_a_data_set():
    rows = [prepared(flat_row(number)) for number in range(6)]
    stats = gather(rows, CountOptions())
    count = make_counter(None)
    traces = [cut(row.trace, PRESETS["hcot"], count) for row in rows]
    assert stats.rows == 6
    assert stats.numbers["trace"].sum == sum(part.tokens for trace in traces for part in trace)
    assert stats.numbers["blocks"].sum == stats.numbers["thought"].size == sum(len(r.outline.blocks) for r in rows) > 6
    assert stats.numbers["depth"].quantile(1) == max(row.outline.depth for row in rows)
    peaks = {policy: stats.numbers[f"{policy.value} peak"].sum for policy in Policy}
    assert peaks[Policy.RECOMPUTE] <= peaks[Policy.EVICT] < peaks[Policy.OFF]
    forwarded = {policy: stats.numbers[f"{policy.value} forwarded"].sum for policy in Policy}
    assert forwarded[Policy.OFF] == forwarded[Policy.EVICT] < forwarded[Policy.RECOMPUTE]


def test_several_processes_count_the_same():
    rows = [prepared(flat_row(number)) for number in range(20)]
    assert gather(rows, CountOptions(), workers=2).as_dict() == gather(rows, CountOptions()).as_dict()


def test_tables_are_written(tmp_path):
    rows = [prepared(flat_row(number)) for number in range(4)]
    rows.append(PreparedRow(SourceRow("bad", "Q?", ""), "[THOUGHT]never closed"))
    written = {path.name for path in write_stats(gather(rows, CountOptions()), tmp_path)}
    assert written == {"stats.md", "stats.json", "rows.csv", "policies.csv"}
    found = json.loads((tmp_path / "stats.json").read_text())
    assert found["rows"] == 5 and found["counted"].startswith("pieces (words")
    assert "1 rows have malformed blocks" in (tmp_path / "stats.md").read_text()
    policies = list(csv.DictReader((tmp_path / "policies.csv").open()))
    assert [row["policy"] for row in policies] == ["off", "recompute", "evict"]
    assert float(policies[0]["peak_percent"]) == 100 > float(policies[1]["peak_percent"])
