"""Packing loses nothing and mixes nothing: every document whole, in one row, unseen by its neighbours."""

import datasets
import numpy as np
import pytest
import torch
from bench_training import pack
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.grammar import Grammar
from hcot_lmeval.masks import dense_mask
from hcot_lmeval.trace import IGNORE
from hcot_lmeval.training.data.dataset import DOCUMENT_FEATURES
from hcot_lmeval.training.data.documents import COLUMNS, Document, Example, compile_document
from hcot_lmeval.training.data.rows import PackedRows, assign, collate
from tests.random_traces import random_trace
from tests.reference import EOS, MARKERS, POLICIES
from tests.strategies import cases

NAMES = {"ids": "input_ids", "positions": "position_ids", "targets": "shift_labels"}


def document(ids, prompt_len, markers, policy) -> Document:
    grammar = Grammar(markers, (None, None), frozenset({EOS}))
    example = Example(tuple(ids[:prompt_len]), tuple(ids[prompt_len:]))
    return compile_document(example, grammar, policy, max_length=10_000)


def packed(documents, row_length, seed=0) -> PackedRows:
    features = datasets.Features({name: DOCUMENT_FEATURES[name] for name in COLUMNS})
    table = {name: [getattr(document, name) for document in documents] for name in COLUMNS}
    groups = assign([len(document) for document in documents], row_length, seed)
    return PackedRows(datasets.Dataset.from_dict(table, features=features), groups, row_length)


def some_documents(count=30) -> list[Document]:
    traces = (random_trace(seed, MARKERS["hcot"], 20 + 7 * seed % 50) for seed in range(count))
    return [document(*trace, MARKERS["hcot"], POLICIES[i % 3]) for i, trace in enumerate(traces)]


def check_row(row, documents):
    """`documents`, in this order, are all that is in `row`; each sees what it sees alone."""
    start = 0
    for each in documents:
        size = len(each)
        for name in COLUMNS:
            offset = start if name == "death" else 0
            assert row[name][start : start + size] == [value + offset for value in getattr(each, name)]
        start += size
    assert {len(row[name]) for name in COLUMNS} == {start}
    mask = dense_mask(torch.tensor([row["death"]])).squeeze()
    alone = [dense_mask(torch.tensor([each.death])).squeeze().reshape(len(each), len(each)) for each in documents]
    assert torch.equal(mask.reshape(start, start), torch.block_diag(*alone).bool())


@given(st.lists(cases(), min_size=1, max_size=5), st.integers(0, 3))
@settings(max_examples=100)
def test_documents_of_a_row_are_whole_and_apart(traces, seed):
    documents = [document(*case) for case in traces]
    rows = packed(documents, max(map(len, documents)) + 20, seed)
    for row, group in zip(rows, rows.groups, strict=True):
        check_row(row, [documents[i] for i in group])


def test_every_target_once_and_rows_no_longer_than_asked():
    documents = some_documents()
    rows = packed(documents, 200)
    assert len(rows) > 5
    assert max(len(row["ids"]) for row in rows) <= 200
    learned = sorted(t for row in rows for t in row["targets"] if t != IGNORE)
    assert learned == sorted(t for each in documents for t in each.targets if t != IGNORE)
    assert rows.tokens == sum(map(len, documents)) == sum(len(row["ids"]) for row in rows)
    assert rows.padding == pytest.approx(1 - rows.tokens / (200 * len(rows)))


def test_rows_from_a_table_are_those_from_memory():
    documents = some_documents()
    assert list(packed(documents, 200, seed=3)) == pack(documents, 200, seed=3)


def test_rows_are_read_by_index():
    rows = packed(some_documents(), 150)
    backwards = [rows[i] for i in reversed(range(len(rows)))]
    assert backwards[::-1] == list(rows) == rows[:]
    assert rows[-1] == rows[len(rows) - 1]
    with pytest.raises(IndexError):
        rows[len(rows)]


# --- where documents go -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 5), st.sampled_from([4, 1000]))
def test_packing_places_each_document_once(lengths, seed, window):
    groups = assign(lengths, 40, seed, window)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in group) <= 40 for group in groups)
    assert groups == assign(np.array(lengths, dtype=int), 40, seed, window)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 5))
def test_no_two_rows_of_a_window_fit_into_one(lengths, seed):
    sizes = sorted(sum(lengths[i] for i in group) for group in assign(lengths, 40, seed))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 40


def test_the_tightest_row_is_chosen():
    assert sorted(map(sorted, assign([7, 6, 3, 4], 10))) == [[0, 2], [1, 3]]


def test_many_documents_leave_little_padding():
    lengths = np.random.default_rng(0).integers(50, 1000, 5000)
    groups = assign(lengths, 2048)
    assert 1 - lengths.sum() / (2048 * len(groups)) < 0.01


def test_seed_decides_which_documents_meet():
    lengths = [10] * 100
    assert assign(lengths, 30, seed=1) == assign(lengths, 30, seed=1) != assign(lengths, 30, seed=2)


@pytest.mark.parametrize("lengths", [[41], [3, 0]])
def test_documents_that_fit_no_row_are_refused(lengths):
    with pytest.raises(ValueError, match="rows of 40"):
        assign(lengths, 40)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batch_is_the_rows_and_padding_that_sees_itself_alone():
    rows = packed(some_documents(9), 150)[:3]
    batch = collate(rows, 160, pad_id=5)
    assert {value.shape for value in batch.values()} == {(3, 160)}
    assert {value.dtype for value in batch.values()} == {torch.int64}
    fill = {"ids": 5, "positions": 0, "targets": IGNORE, "states": 0, "classes": 0}
    for i, row in enumerate(rows):
        size = len(row["ids"])
        for name in COLUMNS:
            assert batch[NAMES.get(name, name)][i, :size].tolist() == row[name]
        for name, value in fill.items():
            assert batch[NAMES.get(name, name)][i, size:].tolist() == [value] * (160 - size)
        mask = dense_mask(batch["death"])[i].squeeze()
        assert torch.equal(mask[size:], torch.eye(160, dtype=torch.bool)[size:])


def test_batch_names_are_those_of_a_transformers_model():
    assert set(collate([], 8, 0)) == {"input_ids", "position_ids", "death", "shift_labels", "states", "classes"}


def test_rows_are_never_cut():
    with pytest.raises(ValueError, match="length=4"):
        collate(packed(some_documents(1), 150)[:1], 4, 0)
