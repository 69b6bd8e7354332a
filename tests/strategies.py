"""Hypothesis strategies for traces: shrinkable, over the same token ids as `tests.reference`."""

from __future__ import annotations

from itertools import chain
from typing import Any

from hypothesis import strategies as st

from hcot_lmeval.markup import MarkerIds
from tests.reference import FIRST_TEXT, MARKERS, POLICIES

text = st.integers(FIRST_TEXT, FIRST_TEXT + 3)
texts = st.lists(text, max_size=3)
policies = st.sampled_from(POLICIES)
notations = st.sampled_from(sorted(MARKERS))


def _block(body: st.SearchStrategy[list[int]], markers: MarkerIds) -> st.SearchStrategy[list[int]]:
    lead = [] if markers.lead is None else [markers.lead]
    return st.tuples(body, body).map(
        lambda parts: [markers.open, *parts[0], markers.split, *lead, *parts[1], markers.close]
    )


def well_formed(markers: MarkerIds) -> st.SearchStrategy[list[int]]:
    """Text and closed blocks; blocks within blocks where the notation nests."""

    def bodies(inner: st.SearchStrategy[list[int]]) -> st.SearchStrategy[list[int]]:
        return st.lists(st.one_of(texts, _block(inner, markers)), max_size=3).map(
            lambda parts: [*chain.from_iterable(parts)]
        )

    return st.recursive(texts, bodies, max_leaves=12) if markers.nested else bodies(texts)


def soup(markers: MarkerIds) -> st.SearchStrategy[list[int]]:
    """Any tokens in any order: nearly always malformed."""
    return st.lists(st.one_of(st.sampled_from(sorted(markers.ids)), text), max_size=24)


@st.composite
def broken(draw: st.DrawFn, markers: MarkerIds) -> list[int]:
    """A well-formed trace with up to three tokens replaced by markers or left out."""
    ids = list(draw(well_formed(markers)))
    for _ in range(draw(st.integers(1, 3)) if ids else 0):
        at = draw(st.integers(0, len(ids) - 1))
        ids[at : at + 1] = draw(st.lists(st.sampled_from(sorted(markers.ids)), max_size=1))
        if not ids:
            break
    return ids


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> tuple[list[int], int, MarkerIds, str]:
    """Returns a trace, the length of its prompt, the notation and the policy: the arguments of `tests.invariants`.

    The first token is text, as in every real prompt. `fixed` sets `notation` or `policy`.
    """
    markers = MARKERS[fixed.get("notation") or draw(notations)]
    prompt = [draw(text), *draw(soup(markers).map(lambda ids: ids[:6]))]
    generated = draw(st.one_of(well_formed(markers), broken(markers), soup(markers)))
    return prompt + generated, len(prompt), markers, fixed.get("policy") or draw(policies)
