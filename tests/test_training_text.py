"""Training texts: prompts are those of the evaluation token for token, completions close what they open."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from hcot_lmeval.lm.prompts import PromptEncoder
from hcot_lmeval.markup import get_markup
from hcot_lmeval.prepare.checks import Checker, CheckOptions
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow
from hcot_lmeval.provenance import tokenizer_digest
from hcot_lmeval.tokens import add_special_tokens
from hcot_lmeval.training.data.dataset import question_key
from hcot_lmeval.training.data.text import TextForm, Unusable, digest_of
from hcot_lmeval.vocabulary import read_vocabulary, special_ids
from tests.tiny import MARKERS, tiny_tokenizer

HCOT = get_markup("hcot")
BLOCK = "[THOUGHT]T[SOLUTION]S[RETURN]"
OPENS_THINKING = "<|im_start|>user\n{{ messages[-1]['content'] }}<|im_end|>\n<|im_start|>assistant\n<think>{{ '\\n' }}"


def row(trace=BLOCK, answer="7", question="How many?", messages=None):
    return {"question": question, "messages": messages, "trace": trace, "answer": answer}


def tokenizer(template=None, bos=None, **options):
    made = tiny_tokenizer(**options)
    if template is not None:
        made.chat_template = template
    if bos is not None:
        made.bos_token = bos
    return made


def inference_ids(tokenizer, question):
    """What the lm-eval model makes of a question (lm-eval renders with these very arguments)."""

    def render(messages):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, continue_final_message=False
        )

    think = read_vocabulary(tokenizer, HCOT).think
    return PromptEncoder(tokenizer, HCOT, think, chat=None, render=render)(question).ids


TOKENIZERS = {
    "chat": tokenizer(),
    "plain": tokenizer(chat=False),
    "opens thinking": tokenizer(OPENS_THINKING),
    "bos": tokenizer(chat=False, bos="<|endoftext|>"),
    "bos in the template": tokenizer("<|endoftext|>{{ messages[0]['content'] }}\nAnswer:", bos="<|endoftext|>"),
    "no thinking tokens": tokenizer(think=False),
}


@pytest.mark.parametrize("name", sorted(special_ids(tokenizer())))
def test_what_training_leaves_out_for_a_special_token_the_check_finds(tmp_path, name):
    made = tokenizer()
    text = made.convert_ids_to_tokens(name)
    made.save_pretrained(tmp_path)
    kept = text in (*HCOT.markers, *HCOT.think)
    form, options = TextForm(made, HCOT), CheckOptions(tokenizer=str(tmp_path), allow_flat=True)
    assert form.faults(row(f"a {text} b")) == ([] if kept else ["special_token"])
    assert form.faults(row(f"a b {made.eos_token}\n")) == []
    if not kept:
        found = Checker(options)(PreparedRow(SourceRow("1", "Q?", f"a {text} b"), f"a {text} b"))
        assert [fault.code for fault in found] == ["control_token_in_source"]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(question=st.text(max_size=20).map(lambda text: "q" + text))
def test_prompts_are_those_of_the_evaluation(name, question):
    made = TOKENIZERS[name]
    for text in (question, f"{question} [THOUGHT]", f"[RETURN]{question}</think><think>"):
        assert list(TextForm(made, HCOT).example(row(question=text)).prompt_ids) == inference_ids(made, text)


def test_bos_is_added_once_as_the_tokenizer_does():
    from tokenizers.processors import TemplateProcessing

    made = tokenizer(chat=False, bos="<|endoftext|>")
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    for text in ("What?", "<|endoftext|>What?"):
        ids = list(TextForm(made, HCOT).example(row(question=text)).prompt_ids)
        assert ids == inference_ids(made, text)
        assert ids.count(made.bos_token_id) == 1


def test_markers_are_text_in_the_prompt_and_tokens_in_the_completion():
    made = tokenizer()
    markers = {made.convert_tokens_to_ids(text) for text in MARKERS}
    example = TextForm(made, HCOT).example(row(question=BLOCK))
    assert markers.isdisjoint(example.prompt_ids)
    assert markers <= set(example.completion_ids)
    assert example.completion_ids[-1] == made.eos_token_id


@pytest.mark.parametrize(
    ("trace", "answer", "expected"),
    [
        (BLOCK, "7", f"<think>{BLOCK}</think>\n\n\\boxed{{7}}"),
        (BLOCK, None, f"<think>{BLOCK}</think>"),
        (f"<think>{BLOCK}", "7", f"<think>{BLOCK}</think>\n\n\\boxed{{7}}"),  # the opened section is closed
        (f"<think>{BLOCK}</think>\\boxed{{8}}", "7", f"<think>{BLOCK}</think>\\boxed{{8}}"),  # as it stands
        ("a</think>b", "7", "a</think>b"),
    ],
)
def test_completions(trace, answer, expected):
    form = TextForm(tokenizer(), HCOT)
    assert form.completion_text(trace, answer, form.prompt_text(row())) == expected


@pytest.mark.parametrize("trace", [BLOCK, f"<think>{BLOCK}", f"<think>{BLOCK}</think>", f"[THINK]{BLOCK}[/THINK]"])
def test_a_vocabulary_with_thinking_tokens_of_its_own_is_taught_these(trace):
    made = tokenizer(think=False)
    made.add_tokens([AddedToken(text, special=True) for text in ("[THINK]", "[/THINK]")])
    assert add_special_tokens(made).tokens == {}
    form = TextForm(made, HCOT)
    written = form.completion_text(trace, "7", form.prompt_text(row()))
    assert written.startswith(f"[THINK]{BLOCK}[/THINK]") and "think>" not in written
    assert read_vocabulary(made, HCOT).split(written, opened=False).answer in ("", "\\boxed{7}")
    ids = form.example(row(trace)).completion_ids
    assert [made.convert_tokens_to_ids(text) in ids for text in ("[THINK]", "[/THINK]")] == [True, True]


@pytest.mark.parametrize("start", ["", "<think>", "<think>\n"])
def test_thinking_that_the_prompt_opened_is_not_opened_again(start):
    form = TextForm(tokenizer(OPENS_THINKING), HCOT)
    prompt = form.prompt_text(row())
    assert prompt.endswith("<think>\n")
    assert form.completion_text(f"{start}x{BLOCK}</think>y", None, prompt) == f"x{BLOCK}</think>y"
    assert form.completion_text(f"{start}x{BLOCK}", "7", prompt) == f"x{BLOCK}</think>\n\n\\boxed{{7}}"


def test_traces_longer_than_the_context_are_no_reason_to_warn(caplog):
    made = tokenizer()
    made.model_max_length = 8
    assert len(TextForm(made, HCOT).example(row(trace=BLOCK * 9)).completion_ids) > 8
    assert "longer than" not in caplog.text


def test_without_thinking_tokens_the_trace_is_the_text():
    form = TextForm(tokenizer(think=False), HCOT)
    assert form.completion_text(BLOCK, "7", "prompt") == BLOCK


def test_an_end_of_turn_that_is_there_is_not_doubled():
    made = tokenizer()
    ids = TextForm(made, HCOT).example(row(trace="a</think>b<|im_end|>")).completion_ids
    assert ids.count(made.eos_token_id) == 1


def test_system_prompt_stands_before_rows_that_have_none():
    form = TextForm(tokenizer(), HCOT, system_prompt="Think.")
    assert form.prompt_text(row()).startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nHow many?")
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Q"}]
    text = form.prompt_text(row(messages=own))
    assert "Mine." in text
    assert "Think." not in text


def test_system_prompt_needs_a_template():
    with pytest.raises(ValueError, match=r"data\.system_prompt.*tokens\.chat_template"):
        TextForm(tokenizer(chat=False), HCOT, system_prompt="Think.")


def test_tokenizer_without_an_end_of_turn_is_refused():
    made = tokenizer()
    made.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        TextForm(made, HCOT)


CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


@pytest.mark.parametrize(
    ("chat", "bad", "reason"),
    [
        (True, row(trace=None), "no_trace"),
        (True, row(trace=" \n"), "no_trace"),
        (True, row(question=None), "no_question"),
        (True, row(messages=[{"role": "system", "content": "x"}]), "no_question"),
        (True, row(messages=[{"role": "user", "content": None}, *CONVERSATION]), "not_text"),
        (False, row(messages=CONVERSATION), "no_chat_template"),
    ],
)
def test_unusable_rows_say_why(chat, bad, reason):
    with pytest.raises(Unusable) as caught:
        TextForm(tokenizer(chat=chat), HCOT).example(bad)
    assert caught.value.args[0] == reason


def test_conversations_go_through_the_template():
    prompt = TextForm(tokenizer(), HCOT).prompt_text(row(messages=CONVERSATION))
    assert [part.partition("\n")[0] for part in prompt.split("<|im_start|>")[1:]] == [
        *("user", "assistant", "user", "assistant")
    ]


def test_a_question_has_one_key_however_it_is_put():
    asked = [{"role": "system", "content": "Think."}, {"role": "user", "content": " How many?\n"}]
    assert question_key(row()) == question_key(row(question=None, messages=asked))
    assert question_key(row()) != question_key(row(question="How few?"))


def test_digest_tells_tokenizers_apart_and_forgets_what_they_encoded():
    made = tokenizer()
    before = tokenizer_digest(made)
    made.encode("some text")
    assert tokenizer_digest(made) == before == tokenizer_digest(tokenizer())
    others = [tokenizer(chat=False), tokenizer(OPENS_THINKING), tokenizer(think=False), tokenizer(bos="<think>")]
    assert len({before, *map(tokenizer_digest, others)}) == 5
    assert digest_of(HCOT) != digest_of(get_markup("pencil"))
