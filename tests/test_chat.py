"""A chat in the terminal: what is shown while thoughts fold, the commands, and the turns of a conversation."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hcot_lmeval.chat import Chat, main
from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.notes import NotesFile
from hcot_lmeval.tokens import encode_prompt
from tests.test_bundled import load

PROBLEM = "c=4*7;a=b-c;b=c+c;a?"


@pytest.fixture(scope="module")
def loaded():
    return load("tiny-hcot")


def talk(loaded, *lines: str, **options) -> tuple[Chat, str]:
    model, tokenizer = loaded
    console = Console(file=io.StringIO(), width=300, force_terminal=False)
    chat = Chat(Engine(model, tokenizer), console, **options)
    waiting = iter(lines)

    def ask() -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    chat.run(ask)
    return chat, console.file.getvalue()


@pytest.mark.parametrize("loop", ["host", "device"])
def test_each_token_is_told_of_as_it_comes_with_the_context_that_it_leaves(loaded, loop):
    model, tokenizer = loaded
    engine = Engine(model, tokenizer, loop=loop)
    requests = [
        Request(name, tuple(encode_prompt(tokenizer, text)), SamplingParams(max_gen_toks=100))
        for name, text in (("long", PROBLEM), ("short", "a=1+1;a?"))
    ]
    told: dict[str, list] = {"long": [], "short": []}

    def listen(request, sample, token, step, live):
        told[request.id].append((token, step.is_prune, tuple(live)))

    done = {d.request.id: d for d in engine.stream(requests, on_token=listen)}
    for name, heard in told.items():
        assert tuple(token for token, _, _ in heard) == done[name].token_ids
        assert heard[-1][2] == done[name].live_ids
        assert sum(pruned for _, pruned, _ in heard) == done[name].statistics.prune_events > 0


@pytest.mark.parametrize("name", ["tiny-hcot", "tiny-evict"])
def test_a_reply_shows_the_folded_context_and_what_it_cost(name):
    _, shown = talk(load(name), PROBLEM, "/quit", "never read")
    assert "<think>[THOUGHT]8[RETURN]</think>\\boxed{8}" in shown
    assert "generated 57 · live 29 · thrown away 48 · peak 44" in shown
    assert "a=b-c[THOUGHT]6[RETURN][THOUGHT]8[RETURN]6-8[SOLUTION]" in shown  # the outer thought, as it stood
    assert shown.rstrip().endswith("\\boxed{8}")


def test_commands_act_from_then_on(loaded, tmp_path):
    path = tmp_path / "notes.jsonl"
    chat, shown = talk(loaded, "/policy off", "/window 40", f"/save {path}", PROBLEM, "/new")
    assert (chat.engine.policy.value, chat.engine.limits.context, chat.messages) == ("off", 40, [])
    assert "thrown away 0" in shown and "(no answer: it ended with context)" in shown
    file = NotesFile(path)
    assert file.run["pruning"] == "off" and len(list(file)) == 1
    chat, shown = talk(loaded, f"/save {tmp_path / 'two'}", "/policy off", PROBLEM, f"/save {path}")
    assert "the notes end here" in shown and f"error: {path}: name a new file" in shown and chat.notes is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/policy on", "error: policy 'on' is not one of off, recompute, evict"),
        ("/window many", "error: window 'many' is no number of tokens"),
        ("/window 0", "error: max_context=0 is not allowed"),
        ("/save /proc/nowhere/x", "error: "),
        ("/help", "/policy off|recompute|evict"),
        ("/what", "/policy off|recompute|evict"),
    ],
)
def test_a_wrong_command_is_told_and_changes_nothing(loaded, line, told):
    chat, shown = talk(loaded, line)
    assert told in shown
    assert (chat.engine.policy.value, chat.notes) == ("recompute", None)


def test_earlier_turns_are_in_the_prompt_by_their_answers_alone(loaded):
    model, tokenizer = load("tiny-hcot")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }};{% endfor %}a?"
    chat, _ = talk((model, tokenizer), "a=1+1", "a=2+2", max_gen_toks=60)
    first, answer, second, _ = chat.messages
    assert (first["content"], second["content"]) == ("a=1+1", "a=2+2")
    assert "<think>" not in answer["content"] and "[THOUGHT]" not in answer["content"]


def test_ctrl_c_ends_a_reply_and_not_the_chat(loaded, monkeypatch):
    stream = Engine.stream

    def interrupted(self, *args, **kwargs):
        if not said:
            said.append(True)
            raise KeyboardInterrupt
        return stream(self, *args, **kwargs)

    said: list[bool] = []
    monkeypatch.setattr(Engine, "stream", interrupted)
    chat, shown = talk(loaded, PROBLEM, "a=1+1;a?")
    assert "stopped" in shown and shown.rstrip().endswith("\\boxed{2}")
    assert [message["content"] for message in chat.messages] == ["a=1+1;a?", "\\boxed{2}"]


def test_a_message_that_is_no_text_ends_no_conversation(loaded):
    _, shown = talk(loaded, "éé", "\udcff", "a=1+1;a?")
    assert shown.count("error: ") == 2 and shown.rstrip().endswith("\\boxed{2}")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["tiny-hcot", "--window", "0"], "max_context=0 is not allowed"),
        (["tiny-hcott"], "did you mean tiny-hcot?"),
        (["tiny-hcot", "--dtype", "bf16"], "dtype='bf16' is not one of auto"),
        (["tiny-hcot", "--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (["tiny-hcot", "--pace", "-1"], "pace=-1.0 is not allowed; give tokens a second"),
    ],
)
def test_what_cannot_be_used_is_one_line(capsys, line, told):
    assert main(line) == 1
    assert f"error: {told}" in capsys.readouterr().err.replace("'tiny-hcott' is neither bundled nor a directory; ", "")


def test_a_pace_slows_a_reply_and_changes_no_token(loaded, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr("hcot_lmeval.chat.time.sleep", slept.append)
    _, fast = talk(loaded, PROBLEM)
    _, slow = talk(loaded, PROBLEM, pace=0.01)
    assert fast == slow and len(slept) == 57 and slept[-1] > 5000
