"""The dense mask says what the plan says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.masks import dense_mask
from hcot_lmeval.trace import IGNORE, Policy, compile_trace
from hcot_lmeval.training.data import collate, pack

MARKERS = MarkerIds(open=1, split=2, close=3)
PAD = 0
traces = st.lists(st.integers(1, 6), min_size=2, max_size=40)
policies = st.sampled_from(Policy)


@given(traces, policies)
@settings(deadline=None)
def test_mask_is_the_visibility_of_the_plan(ids: list[int], policy: Policy) -> None:
    plan = compile_trace(ids, 1, MARKERS, policy)
    mask = dense_mask(torch.tensor([plan.death]))
    tokens = range(len(plan))
    assert mask.shape == (1, 1, len(plan), len(plan))
    assert mask[0, 0].tolist() == [[plan.visible(query, key) for key in tokens] for query in tokens]


@given(st.lists(traces, min_size=1, max_size=6), policies, st.integers(8, 48))
@settings(deadline=None)
def test_packed_documents_do_not_see_each_other(documents: list[list[int]], policy: Policy, length: int) -> None:
    """Every row, read back document by document, is a beginning of that document's plan; the rest is padding."""
    plans = [compile_trace(ids, 1, MARKERS, policy) for ids in documents]
    rows = list(pack(plans, length, min_room=4))
    batch = collate(rows, length, PAD)
    waiting = iter(plans)
    for row in range(len(rows)):
        start = 0
        while start < length and batch["position_ids"][row, start] == 0 and batch["input_ids"][row, start] != PAD:
            plan = next(waiting)
            stop = min(start + len(plan), length)
            size = stop - start
            for name, expected in (("input_ids", plan.ids), ("position_ids", plan.positions)):
                assert batch[name][row, start:stop].tolist() == expected[:size]
            assert batch["shift_labels"][row, start:stop].tolist() == plan.targets[:size]
            mask = batch["attention_mask"][row, 0]
            seen = [[plan.visible(query, key) for key in range(size)] for query in range(size)]
            assert mask[start:stop, start:stop].tolist() == seen
            assert not mask[start:stop, :start].any() and not mask[stop:, start:stop].any()
            start = stop
        assert (batch["input_ids"][row, start:] == PAD).all()
        assert (batch["shift_labels"][row, start:] == IGNORE).all()
        padding = batch["attention_mask"][row, 0, start:, start:]
        assert torch.equal(padding, torch.eye(length - start, dtype=torch.bool))
    assert next(waiting, None) is None


@pytest.mark.parametrize(
    ("death", "message"), [([1, 1], r"shape \(2,\)"), ([[1, 1]], "at least k \\+ 1"), ([[0, 2]], "at least k \\+ 1")]
)
def test_bad_deaths_are_refused(death: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_mask(torch.tensor(death))
