"""Near duplicates: estimates against the exact similarity, and which rows are found."""

from __future__ import annotations

import base64
import random

import pytest

from hcot_lmeval.prepare.checks import ngrams, words
from hcot_lmeval.prepare.near import HASHES, MISSED, NearRows, band_width, signature, similarity


def text_of(rng, size=400):
    return " ".join(rng.choices([f"w{i}" for i in range(500)], k=size))


def jaccard(one, other):
    a, b = (ngrams(words(text), 5, whole=True) for text in (one, other))
    return len(a & b) / len(a | b)


def changed(rng, text, share):
    return " ".join(word if rng.random() > share else f"n{rng.random()}" for word in text.split())


def test_signatures_estimate_the_jaccard_similarity():
    rng = random.Random(1)
    errors = []
    for share in [0.01, 0.02, 0.05, 0.1, 0.3] * 12:
        one = text_of(rng)
        other = changed(rng, one, share)
        found = similarity(*(base64.b64decode(signature(text)) for text in (one, other)))
        errors.append(found - jaccard(one, other))
    assert max(map(abs, errors)) < 4 * 0.5 / HASHES**0.5  # four standard errors
    assert abs(sum(errors) / len(errors)) < 0.02  # and no bias


def test_near_rows_are_found_and_no_others():
    rng = random.Random(2)
    texts = [text_of(rng) for _ in range(300)]
    near = [changed(rng, text, 0.01) for text in texts]
    with NearRows(0.8) as rows:
        assert [rows.find_or_add(str(i), signature(text)) for i, text in enumerate(texts)] == [None] * 300
        assert rows.find_or_add("copy", signature(texts[7].upper().replace(" ", ",  "))) == ("7", 1.0)
        found = [rows.find_or_add("near", signature(text)) for text in near]
        alike = [jaccard(text, other) for text, other in zip(near, texts, strict=True)]
        assert sum(share > 0.9 for share in alike) > 100
        for number, (twin, share) in enumerate(zip(found, alike, strict=True)):
            if share > 0.9:
                assert twin is not None and twin[0] == str(number) and abs(twin[1] - share) < 0.2
        assert rows.find_or_add("new", signature(text_of(rng))) is None


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_miss_few_at_the_threshold(threshold):
    width = band_width(threshold)
    assert (1 - threshold**width) ** (HASHES // width) <= MISSED


def test_short_texts_are_compared_as_a_whole_and_empty_ones_never():
    with NearRows(0.8) as rows:
        assert rows.find_or_add("1", signature("two words")) is None
        assert rows.find_or_add("2", signature("two other")) is None
        assert rows.find_or_add("3", signature("Two words!")) == ("1", 1.0)
        assert [rows.find_or_add(name, signature("...")) for name in "45"] == [None, None]
