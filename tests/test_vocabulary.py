"""Where thinking begins and ends, in every form that models and vocabularies give it."""

import itertools

import pytest
import torch
from tokenizers import AddedToken

from hcot_lmeval import answers
from hcot_lmeval.engine import Request, SamplingParams
from hcot_lmeval.lm import HcotLM
from hcot_lmeval.markup import PRESETS, get_markup
from hcot_lmeval.vocabulary import PAIRS, answer_of, changes, leaves_open, read_vocabulary, split_thinking
from tests.tiny import tiny_model, tiny_tokenizer

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


def with_tokens(*texts, **parts):
    tokenizer = tiny_tokenizer(**parts)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    return tokenizer


def decoder(tokenizer, **arguments):
    model = tiny_model("qwen2", torch.float64, vocab_size=len(tokenizer))
    return HcotLM(pretrained=model, tokenizer=tokenizer, journal="off", max_context=256, compute="torch", **arguments)


def answer(lm, text, stop=()):
    """What the model hands to lm-eval if it writes `text`."""
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    params = SamplingParams(max_gen_toks=len(ids), stop_strings=tuple(stop))
    (done,) = lm.engine.generate([Request("r", (70,), params, forced_ids=tuple(ids))])
    return lm._response(done)


def graded(lm, text):
    return answers.extract_answer(answer(lm, text))


@pytest.mark.parametrize(
    ("parts", "pruning"),
    [
        *itertools.product([{}, {"think": False}], ["off", "recompute", "evict"]),
        ({"think": False, "markers": False}, "off"),
    ],
    ids=str,
)
def test_an_unfinished_thought_is_no_answer_under_any_policy(parts, pruning):
    lm = decoder(tiny_tokenizer(**parts), pruning=pruning)
    assert graded(lm, r"<think>maybe \boxed{5}") is None
    assert graded(lm, r"<think>maybe \boxed{5}</think>\boxed{6}") == "6"
    assert graded(lm, r"[THOUGHT]maybe \boxed{5}") is None
    assert graded(lm, r"[THOUGHT]maybe \boxed{5}[SOLUTION]so \boxed{6}[RETURN]") == "6"
    assert graded(lm, r"\boxed{5}") == "5"


@pytest.mark.parametrize("begin", ["<seed:think>", "◁think▷", "[THINK]", "<|channel|>analysis<|message|>"])
def test_a_vocabulary_without_tokens_for_it_spells_its_thinking(begin):
    lm = decoder(tiny_tokenizer(think=False), pruning="off")
    assert graded(lm, rf"{begin}maybe \boxed{{5}}") is None
    assert graded(lm, rf"{begin}maybe \boxed{{5}}{dict(PAIRS)[begin]}\boxed{{6}}") == "6"


@pytest.mark.parametrize("pair", PAIRS[1:], ids=str)
def test_tokens_of_other_models_are_known_by_themselves(pair):
    tokens = HARMONY if pair[0].startswith("<|channel|>") else pair
    lm = decoder(with_tokens(*tokens, think=False), pruning="off")
    assert (lm.think, lm.vocabulary.has_thinking, lm.engine.think) == (pair, True, pair)
    assert graded(lm, rf"{pair[0]}maybe \boxed{{5}}") is None
    assert graded(lm, rf"{pair[0]}maybe \boxed{{5}}{pair[1]}\boxed{{6}}") == "6"


@pytest.mark.parametrize(
    ("tokens", "end", "begin"),
    [
        (HARMONY, "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"),
        (("<channel|>", "<|channel>"), "<channel|>", "<|channel>"),
        (("<|channel>",), "<|channel>final", "<|channel>analysis"),
        (("<seed:think>", "</seed:think>"), "</seed:think>", "<seed:think>"),
        (("<|reason|>", "<|/reason|>"), "<|/reason|>", "<|reason|>"),
        (("<|my_start|>", "<|my_end|>"), "<|my_end|>", "<|my_start|>"),
    ],
)
@pytest.mark.parametrize("pruning", ["off", "recompute"])
def test_an_end_that_is_named_is_found_and_has_its_own_beginning(tokens, end, begin, pruning):
    lm = decoder(with_tokens(*tokens), pruning=pruning, think_end_token=end)
    assert lm.think == (begin, end)
    assert graded(lm, rf"{begin}maybe \boxed{{5}}") is None
    assert graded(lm, rf"{begin}maybe \boxed{{5}}{end}\boxed{{6}}") == "6"
    found = answer(lm, f"{begin}a STOP b{end}c STOP d", stop=["STOP"])
    assert (found, found.finish_reason) == ("c ", "stop")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("<|im_start|>final<|message|>", "neither in the vocabulary"),  # one of two tokens
        ("</thnk>", r"'</thnk>' is neither in the vocabulary nor .*; did you mean </think>"),
        ("</seed:think>", "neither in the vocabulary"),  # of a model that has tokens of its own
        ("<|channel|>final<|message|>", "neither in the vocabulary"),
        ("", "neither in the vocabulary"),
        (100_000, "think_end_token=100000 is no token: the vocabulary has ids from 0 to 319"),
    ],
)
def test_an_end_that_cannot_come_is_refused(end, message):
    with pytest.raises(ValueError, match=message):
        read_vocabulary(tiny_tokenizer(), get_markup("hcot"), end=end)


def test_an_end_may_be_spelled_out_where_nothing_else_is_known():
    bare, markup = tiny_tokenizer(think=False), get_markup("hcot")
    assert read_vocabulary(bare, markup, end="</seed:think>").think == ("<seed:think>", "</seed:think>")
    assert read_vocabulary(bare, markup, begin="So", end="Thus").think == ("So", "Thus")
    bare.chat_template = "{{ '<fin/>' }}"
    assert read_vocabulary(bare, markup, end="<fin/>").think == ("<fin>", "<fin/>")
    with pytest.raises(ValueError, match="name its beginning too: think_start_token="):
        read_vocabulary(with_tokens("<fin>"), markup, end="<fin>")
    with pytest.raises(ValueError, match="name its end too, with think_end_token"):
        read_vocabulary(bare, markup, begin="<fin>")


def test_what_a_text_leaves_out():
    tokenizer = with_tokens(*HARMONY, think=False)
    hidden = {tokenizer.convert_ids_to_tokens(i) for i in read_vocabulary(tokenizer, PRESETS["hcot"]).hidden_ids}
    assert hidden == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|return|>"}


def test_the_answer_of_any_model():
    for begin, end in PAIRS:
        assert answer_of(f"{begin}a{end}b") == answer_of(f"a{end} b") == "b"
        assert answer_of(f"a{begin}b") == ""
        assert answers.extract_answer(rf"{begin}\boxed{{5}}") is None
    assert answer_of(" plain ") == " plain "


@pytest.mark.parametrize("cut", range(1, 8))
def test_following_a_text_as_it_grows_ends_as_reading_it_at_once(cut):
    """`StopStrings` follows, `split_thinking` reads; both by `changes`."""
    think = ("<think>", "</think>")
    text = "a<think>b<think>c</think></think>d<think>e</think>f<thi</think"
    opened, known = False, 0
    for end in range(cut, len(text) + cut, cut):
        states = [state for state, _ in changes(text[:end], think, opened, max(0, known - 7))]
        opened, known = states[-1] if states else opened, end
        assert opened is (split_thinking(text[:end] + "x", think).answer == "" and "<think>" in text[:end])


def test_a_prompt_that_leaves_the_thinking_open():
    think = ("<think>", "</think>")
    assert leaves_open("<user>q<bot><think>\n", think, "<bot>")
    assert not leaves_open("<user>q<bot><think>\n\n</think>\n", think, "<bot>")
    assert leaves_open("<user><think>\n", think, "") is not leaves_open("<user>q <think> r", think, "")
