"""Blocks without a teacher: always legal, words unchanged, shorter solutions, ends where a reader would end them."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.markup import PRESETS
from hcot_lmeval.prepare.measure import cut, departure, make_counter
from hcot_lmeval.prepare.outline import Block, Outline, assemble
from hcot_lmeval.prepare.reasons import Refused
from hcot_lmeval.prepare.segmenter import (
    Material,
    SegmenterOptions,
    best_cuts,
    count_tokens,
    quotation,
    quote,
    segment,
    trailing_result,
)
from hcot_lmeval.prepare.sentences import Cues, guess_language, read_sentences, split_sentences
from hcot_lmeval.settings import parse_settings
from hcot_lmeval.trace import LiveContext, push_all
from tests.reference import FIRST_TEXT, MARKERS
from tests.test_prepare_text import is_legal, needs_data, real_traces, token_ids

MARKUP = PRESETS["hcot"]
SMALL = SegmenterOptions(target_tokens=40, min_tokens=15, max_tokens=90, solution_tokens=25, conclusion_tokens=30)

TRACE = """Okay, so I need the sum of all bases b > 9 for which 17_b divides 97_b. Let me think step by step.

First, I should write both in base 10. The digits give 17_b = b + 7 and 97_b = 9b + 7. So, b + 7 must divide 9b + 7.

Now, let me write 9b + 7 differently. Let's compute 9*(b + 7) = 9b + 63. The difference of the two is 63 - 7 = 56. \
Therefore, b + 7 must divide 56.

Next, I look at the divisors of 56:

1, 2, 4, 7, 8, 14, 28, 56.

Since b > 9, b + 7 is at least 17. The only ones that are left are 28 and 56. So, b = 21 or b = 49.

Wait, let me verify this. For b = 21, 17_b is 28 and 97_b is 196 = 7 * 28. For b = 49, they are 56 and 448 = 8 * 56. \
So, both bases are valid, and their sum is 21 + 49 = 70.

Therefore, the answer is 70.

**Final Answer**
\\boxed{70}"""


def thought_of(pieces: list[str], block: Block) -> str:
    return "".join(pieces[i] for i in block.thought)


def is_quoted(solution: str, sentences: list[str]) -> bool:
    """Whether a solution is some of the sentences, in their order, apart from white space."""
    said = solution.split()
    reached = {0}  # words of the solution that sentences so far can account for
    for words in map(str.split, sentences):
        reached |= {at + len(words) for at in reached if said[at : at + len(words)] == words}
    return len(said) in reached


def check(pieces: list[str], outline: Outline, depth: int) -> str:
    """Everything that is promised of an outline; returns the trace."""
    trace = assemble(pieces, outline, MARKUP)
    assert departure("".join(pieces), cut(trace, MARKUP, make_counter(None)), MARKUP) is None
    assert is_legal(trace, "hcot")
    assert outline.depth <= depth
    for block in outline.blocks:
        solution = block.solution or "".join(pieces[block.split : block.stop])
        thought = thought_of(pieces, block)
        assert solution.strip()
        assert len(solution.strip()) < len(thought.strip())
        assert count_tokens(solution) < count_tokens(thought)
        assert block.stop < len(pieces)  # the conclusion stays outside
        assert is_quoted(block.solution or "", [pieces[i] for i in block.thought])
    return trace


def test_blocks_end_where_a_reader_would_end_them():
    pieces = split_sentences(TRACE)
    outline = segment(pieces, options=SMALL)
    trace = check(pieces, outline, depth=2)
    starts = [pieces[block.start].split(" ")[0] for block in outline.blocks]
    assert starts == ["Okay,", "Now,", "Next,", "Wait,"]
    solutions = [block.solution or "".join(pieces[block.split : block.stop]).strip() for block in outline.blocks]
    assert solutions == [
        "So, b + 7 must divide 9b + 7.",
        "Therefore, b + 7 must divide 56.",
        "So, b = 21 or b = 49.",
        "So, both bases are valid, and their sum is 21 + 49 = 70.",
    ]
    assert trace.endswith("[RETURN]Therefore, the answer is 70.\n\n**Final Answer**\n\\boxed{70}")


def test_a_long_trace_is_grouped_by_depth():
    pieces = split_sentences("\n\n".join([TRACE.partition("**")[0].strip()] * 6))
    depths = [segment(pieces, options=SegmenterOptions(**{**vars(SMALL), "max_depth": d})).depth for d in range(4)]
    assert depths == [0, 1, 2, 3]
    peaks = []
    for depth in range(4):
        outline = segment(pieces, options=SegmenterOptions(**{**vars(SMALL), "max_depth": depth}))
        peaks.append(peak(check(pieces, outline, depth)))
    assert peaks[0] > 2 * peaks[1] and peaks[1] > 1.5 * peaks[2] >= peaks[3]


def peak(trace: str) -> int:
    """The most live tokens at once under `recompute`, a character of text being a token."""
    context = LiveContext(MARKERS["hcot"], "recompute")
    push_all(context, [FIRST_TEXT, *token_ids(trace, "hcot")])
    return context.peak


SENTENCES = st.sampled_from(
    [
        "So, x = 3. ", "Therefore, the sum is 12.\n\n", "Wait, let me check this. ", "Now, we need y:\n\n",
        "y = 2x + 1\n", "- one item\n", "Is it so? ", "I think maybe 4. ", "Let x denote the age, x > 0. ", "= 5,\n",
        "\\boxed{4}\n", "### Part\n\n", "OK. ", "**\n", "...\n\n", "所以答案是5。", "\n",
        "A word and another one and more of them go on here without end. ",
    ]
)  # fmt: skip


@given(st.lists(SENTENCES, max_size=60), st.integers(0, 3), st.sampled_from([1, 8, 30, 120]))
@settings(max_examples=200)
def test_any_text_gets_a_legal_trace(parts, depth, target):
    pieces = split_sentences("".join(parts))
    options = SegmenterOptions(
        target_tokens=target, min_tokens=max(1, target // 3), max_tokens=3 * target, solution_tokens=30,
        conclusion_tokens=20, max_depth=depth, group=2,
    )  # fmt: skip
    check(pieces, segment(pieces, options=options), depth)


@needs_data
@pytest.mark.parametrize("depth", [1, 2])
def test_real_traces(depth):
    """Legal, words unchanged, and at least half of the context saved over all 26; seven tenths where blocks nest."""
    full = live = 0
    for text in real_traces():
        pieces = split_sentences(text)
        outline = segment(pieces, options=SegmenterOptions(max_depth=depth))
        full, live = full + len(text), live + peak(check(pieces, outline, depth))
        assert len(outline.blocks) >= 2
    assert live < (0.4, 0.25)[depth - 1] * full


def test_a_result_that_is_too_long_is_not_the_solution():
    """It stays in the thought, and a shorter sentence is quoted."""
    pieces = ["Thus, n = 41. ", *["There are more of them to come. "] * 14, "So, x = 1" + " + 1" * 20 + ". ", "Done."]
    wide = {**vars(SMALL), "target_tokens": 150, "max_tokens": 400}
    blocks = [
        segment(pieces, options=SegmenterOptions(**{**wide, "solution_tokens": room})).blocks for room in (25, 100)
    ]
    assert blocks == [(Block(0, 16, "Thus, n = 41."),), (Block(0, 16, split=15),)]


def test_text_that_spells_a_marker_is_refused():
    with pytest.raises(Refused) as fault:
        segment(["So [RETURN] it is. ", "Done."])
    assert fault.value.code == "marker_in_source"


def test_blank_and_short_texts_get_no_blocks():
    for text in ("", " \n", "Yes.", "So, x = 3. Done."):
        pieces = split_sentences(text)
        assert segment(pieces) == Outline(len(pieces))


@given(st.data())
def test_no_segmentation_is_better(data):
    """The slow twin of the dynamic programming tries them all."""
    numbers = st.floats(-9, 9)
    gains = data.draw(st.lists(numbers, max_size=7))
    pairs = list(combinations(range(len(gains) + 1), 2))
    loss = dict(zip(pairs, data.draw(st.lists(numbers, min_size=len(pairs), max_size=len(pairs))), strict=True))

    def worth(cuts):
        return sum(gains[cut] for cut in cuts[1:-1]) - sum(loss[span] for span in pairwise(cuts))

    found = best_cuts(gains, lambda stop: [(start, loss[start, stop]) for start in range(stop)])
    if not gains:
        assert found == [0]
        return
    inner = [cuts for count in range(len(gains)) for cuts in combinations(range(1, len(gains)), count)]
    assert worth(found) == pytest.approx(max(worth([0, *cuts, len(gains)]) for cuts in inner))


def material_of(*pieces: str) -> Material:
    return Material(read_sentences(pieces), [count_tokens(piece) for piece in pieces], count_tokens)


def test_what_a_colon_announces_belongs_to_it():
    material = material_of(
        "We try. ", "So we have:\n", "x = 1\n", "y = 2\n", "Now go. ", "- a\n", "Items:\n", "- b\n", "- c\n"
    )
    assert material.units(0, 9) == [(0, 1), (1, 4), (4, 5), (5, 6), (6, 9)]


def test_results_that_end_a_thought():
    material = material_of("We add 4 and 5. ", "So, the sum is 9. ", "Therefore, x = 3. ", "So that works. ")
    assert trailing_result(material, 0, 3, limit=100) == 1
    assert trailing_result(material, 0, 3, limit=8) == 2
    assert trailing_result(material, 1, 3, limit=100) == 2  # a thought remains
    assert trailing_result(material, 0, 4, limit=100) is None


def test_a_quotation_is_in_order_and_says_no_thing_twice():
    material = material_of("Let n denote the age, n > 0. ", "I think so. ", "So, n = 9. ", "Thus n = 9. ", "Right? ")
    units = material.units(0, 5)
    assert quotation(material, quote(material, units, 30, 30)) == "Let n denote the age, n > 0. Thus n = 9."
    assert quotation(material, quote(material, units, 6, 6)) == "Thus n = 9."
    assert quotation(material, quote(material, units, 1, 1)) == "Right?"  # the shortest one
    assert quote(material, [], 9, 9) == []


@pytest.mark.parametrize(
    ("sentence", "better"),
    [
        ("Let me compute the sum. ", "So, the sum is 12. "),
        ("Maybe x = 3. ", "Thus x = 3. "),
        ("Is x = 3? ", "Then x = 3. "),
        ("So that works. ", "There are 5 ways. "),
        ("So, let me find x = 3. ", "So, x = 3. "),
        ("The number of ways, 5, is odd. ", "The number of ways is 5. "),
    ],
)
def test_which_sentence_is_more_of_a_result(sentence, better):
    worse, more = read_sentences([sentence, better])
    assert worse.result < more.result


@pytest.mark.parametrize(
    ("language", "turn", "conclusion"),
    [
        ("en", "But wait, is that so?", "So, x = 1."),
        ("de", "Moment, stimmt das?", "Also ist x = 1."),
        ("fr", "Attends, est-ce vrai ?", "Donc x = 1."),
        ("es", "Espera, ¿es cierto?", "Por lo tanto, x = 1."),
        ("it", "Aspetta, è vero?", "Quindi x = 1."),
        ("pt", "Espere, está certo?", "Portanto, x = 1."),
        ("ru", "Подожди, так ли это?", "Следовательно, x = 1."),
        ("zh", "等等，对吗？", "因此x=1。"),
        ("ja", "待って、本当か。", "したがってx=1。"),
        ("ko", "잠깐, 맞나?", "따라서 x=1."),
        ("ar", "انتظر، هل هذا صحيح؟", "إذن x = 1."),
        ("vi", "Khoan, đúng không?", "Do đó x = 1."),
        ("id", "Tunggu, apakah benar?", "Oleh karena itu x = 1."),
        ("ms", "Sekejap, betulkah?", "Oleh itu, x = 1."),
        ("th", "เดี๋ยว ถูกไหม", "ดังนั้น x = 1"),
        ("bn", "অপেক্ষা করি, ঠিক কি?", "সুতরাং x = 1।"),
        ("te", "ఆగండి, సరియేనా?", "కాబట్టి x = 1."),
        ("sw", "Subiri, ni sahihi?", "Kwa hiyo x = 1."),
    ],
)
def test_languages(language, turn, conclusion):
    assert guess_language([turn, conclusion, turn]) == language
    cues = Cues(language)
    assert cues.plays("turn", turn) and not cues.plays("turn", conclusion)
    assert cues.plays("conclude", conclusion) and not cues.plays("conclude", turn)


def test_words_are_whole_words_and_may_be_led_in():
    cues = Cues("en")
    assert not cues.plays("conclude", "Sometimes") and not cues.plays("turn", "Waiting")
    assert cues.plays("conclude", "**So, x") and cues.plays("final", "Therefore, the answer is 3")
    assert cues.plays("plan", "So now, let me see") and cues.plays("turn", "But let me check")
    assert cues.plays("doubt", "This contradicts it") and not cues.plays("doubt", "An almighty sum")
    assert guess_language(["17 + 4", ""]) == "en"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_tokens": 10}, "min_tokens=80, target_tokens=10"),
        ({"solution_share": 1.0}, "solution_share: Input should be less than 1"),
        ({"group": 1}, "group: Input should be greater than or equal to 2"),
        ({"max_depth": -1}, "max_depth: Input should be greater than or equal to 0"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        parse_settings(SegmenterOptions, options)
