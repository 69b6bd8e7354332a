"""Shipped chat templates: what is read at inference is where the training text begins."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.markup import PRESETS
from hcot_lmeval.templates import TEMPLATES, check_template, load_template
from hcot_lmeval.tokens import add_special_tokens, encode_prompt
from hcot_lmeval.vocabulary import token_id
from tests.tiny import tiny_model, tiny_tokenizer

END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "plain": "<|endoftext|>"}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1+1?"}
ASSISTANT = {"role": "assistant", "content": "<think>[THOUGHT]1+1[SOLUTION]2[RETURN]</think>2"}


def tokenizer_for(name: str, markup: str = "hcot"):
    tokenizer = tiny_tokenizer(markers=False, think=False, chat=False)
    if name == "llama3":
        words = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_tokens([AddedToken(text, special=True) for text in words])
        tokenizer.bos_token = words[0]
    tokenizer.eos_token = END_OF_TURN[name]
    add_special_tokens(tokenizer, markup=markup)
    tokenizer.chat_template = load_template(name)
    return tokenizer


def render(tokenizer, *messages, **options):
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


@pytest.mark.parametrize("thinking", [None, False, True])
@pytest.mark.parametrize("markup", PRESETS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_a_token_prefix_of_the_training_text(name, markup, thinking):
    check_template(tokenizer_for(name, markup), markup, enable_thinking=thinking)


QUESTIONS = ["x", "  x  ", "\nx\n\n", "x[THOUGHT]y[RETURN]", "<think>", "½語🙂", ""]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_completion_and_end_of_turn_are_the_conversation(name, question):
    """What a training document is made of, against the template's own text."""
    tokenizer = tokenizer_for(name)
    user = {"role": "user", "content": question}
    prompt = encode_prompt(tokenizer, render(tokenizer, SYSTEM, user, add_generation_prompt=True))
    completion = encode_prompt(tokenizer, ASSISTANT["content"])
    whole = encode_prompt(tokenizer, render(tokenizer, SYSTEM, user, ASSISTANT))
    built = [*prompt, *completion, tokenizer.eos_token_id]
    assert whole[: len(built)] == built
    assert tokenizer.decode(whole[len(built) :]).strip() == ""
    assert tokenizer.decode(whole).count(question) >= 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\n1+1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("plain", "Be brief.\n\n1+1?"),
    ],
)
def test_the_prompt_as_it_is_written(name, text):
    tokenizer = tokenizer_for(name)
    assert render(tokenizer, SYSTEM, USER, add_generation_prompt=True) == text
    assert render(tokenizer, SYSTEM, USER, add_generation_prompt=True, enable_thinking=True) == text + "<think>"


def test_plain_is_the_question_and_nothing_else():
    tokenizer = tokenizer_for("plain")
    assert render(tokenizer, USER, add_generation_prompt=True) == "1+1?"
    assert render(tokenizer, USER, ASSISTANT) == "1+1?" + ASSISTANT["content"] + "<|endoftext|>"
    with pytest.raises(Exception, match="not tool"):
        render(tokenizer, {"role": "tool", "content": "x"})


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_does_not_open_the_thinking_is_joined_to_a_prompt_that_does(name):
    tokenizer = tokenizer_for(name)
    without = {"role": "assistant", "content": ASSISTANT["content"].removeprefix("<think>")}
    assert render(tokenizer, USER, ASSISTANT, enable_thinking=True) == render(
        tokenizer, USER, without, enable_thinking=True
    )
    assert "<think>" not in render(tokenizer, USER, without)
    assert "<think>" not in render(
        tokenizer, USER, without, USER, enable_thinking=True
    )  # a turn gone by stays as it is


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_the_turn_is_what_stops_the_engine(name):
    tokenizer = tokenizer_for(name)
    vocabulary = 64 * -(-len(tokenizer) // 64)
    model = tiny_model("qwen2", vocab_size=vocabulary, eos_token_id=None)
    completion = tokenizer.encode(ASSISTANT["content"] + END_OF_TURN[name] + "xyz", add_special_tokens=False)
    prompt = encode_prompt(tokenizer, render(tokenizer, USER, add_generation_prompt=True))
    engine = Engine(model, tokenizer, self_check=False)
    request = Request("1", tuple(prompt), SamplingParams(max_gen_toks=len(completion)), forced_ids=tuple(completion))
    (done,) = engine.generate([request])
    assert (done.finish_reason, done.text) == ("eos", ASSISTANT["content"])
    assert done.token_ids[-1] == token_id(tokenizer, END_OF_TURN[name])


CHATML = load_template("chatml")
BROKEN = {
    "a newline behind the role in the prompt alone": (
        CHATML.replace("'<|im_start|>' + message['role'] + '\\n'", "'<|im_start|>' + message['role'] + ' '"),
        r"no token prefix of its training text.*the prompt reads .*'assistant' '\\n'|'\\n'",
    ),
    "one newline more in the prompt": (
        CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n\\n'"),
        r"no token prefix",
    ),
    "a prompt whose end joins the answer": (
        CHATML.replace("assistant\\n", "assistant\\n ")
        .replace("+ '\\n' -", "+ '\\n ' -")
        .replace("message['content'] + '", "message['content'].replace('<think>', 'is ') + '"),
        r"the prompt reads .*'\\n' ' ', the training text .*'\\n' ' is'",
    ),
    "thinking that only the prompt opens": (
        CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"),
        r"no token prefix",
    ),
    "a date at the end": (
        CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant (today)\\n'"),
        r"the prompt reads .*'\(' 't' 'o' 'd' 'ay', the training text ",
    ),
    "earlier turns without their thoughts, later ones with": (
        CHATML.replace("message['content'] + ", "(message['content'] if loop.last else message['content'][-1:]) + "),
        r"no token prefix",
    ),
    "no end of the turn": (
        CHATML.replace("+ '<|im_end|>\\n'", ""),
        r"ends the assistant's turn with .*, but generation stops at '<\|im_end\|>'",
    ),
    "another end of the turn": (CHATML.replace("<|im_end|>", "<|endoftext|>"), r"generation stops at '<\|im_end\|>'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_template_is_found(what):
    tokenizer = tokenizer_for("chatml")
    template, message = BROKEN[what]
    assert template != CHATML
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        check_template(tokenizer)


def test_both_ends_are_shown():
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = BROKEN["a date at the end"][0]
    with pytest.raises(ValueError) as error:
        check_template(tokenizer)
    before, _, after = str(error.value).partition(", the training text ")
    assert "'t' ' ' '(' 't' 'o' 'd' 'ay'" in before
    assert "'<think>'" in after and "'o' 'd'" not in after
    assert "chatml, llama3, plain" in after


def test_stops_of_the_generation_config_count():
    tokenizer = tokenizer_for("chatml")
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ValueError, match=r"generation stops at '<\|endoftext\|>'"):
        check_template(tokenizer)
    check_template(tokenizer, eos_ids=[token_id(tokenizer, "<|im_end|>")])


@pytest.mark.parametrize(("pattern", "fits"), [("<|im_start|> $A", True), ("$A <|im_end|>", False)])
@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_tokens_that_the_tokenizer_adds_itself(name, pattern, fits):
    """A BOS before the prompt is harmless; an end of sequence behind it is what no prompt may have."""
    tokenizer = tokenizer_for(name)
    added = [(text, token_id(tokenizer, text)) for text in ("<|im_start|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=added)
    assert len(tokenizer.encode("x")) == 2
    with nullcontext() if fits else pytest.raises(ValueError, match="no token prefix"):
        check_template(tokenizer)


def test_a_template_that_takes_no_system_message_may_do_so():
    tokenizer = tokenizer_for("plain")
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + load_template("plain")
    check_template(tokenizer)


def test_the_tests_own_template_passes_as_it_is_used():
    check_template(tiny_tokenizer())
    with pytest.raises(ValueError, match="no token prefix"):
        check_template(tiny_tokenizer(), enable_thinking=True)  # it opens the thinking in the prompt alone


@pytest.mark.parametrize("template", ["{{ messages", "{{ raise_exception('never') }}", load_template("plain")])
def test_a_template_that_cannot_be_rendered(template):
    tokenizer = tokenizer_for("plain")
    tokenizer.chat_template, tokenizer.eos_token = template, None  # which the template plain needs
    with pytest.raises(ValueError, match=r"the chat template cannot be rendered: .+"):
        check_template(tokenizer)


def test_a_tokenizer_without_a_template():
    with pytest.raises(ValueError, match="no chat template; set one, such as chatml, llama3, plain"):
        check_template(tiny_tokenizer(chat=False))


def test_a_template_from_a_file(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ 'ü' }}", encoding="utf-8")
    assert load_template(file) == load_template(str(file)) == "{{ 'ü' }}"


@pytest.mark.parametrize(("name", "hint"), [("chatlm", "did you mean chatml"), ("no/file.jinja", "nor a file")])
def test_an_unknown_template_names_the_known_ones(name, hint):
    with pytest.raises(ValueError, match=f"{name}.* is neither one of chatml, llama3, plain nor a file.*") as error:
        load_template(name)
    assert hint in str(error.value)
