"""``hcot chat``: talk to a model, and watch its thoughts fold as they return.

The upper panel is what the model sees: its live context, which shrinks whenever a thought returns. The lower one is
what was thrown away last. Earlier turns are in the prompt as the chat template has them, by their answers alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from hcot_lmeval.assets import BUNDLED
from hcot_lmeval.engine import Completion, Engine, Request, SamplingParams
from hcot_lmeval.errors import run_command
from hcot_lmeval.notes import NoteTaker
from hcot_lmeval.tokens import encode_prompt
from hcot_lmeval.trace import Policy, Step
from hcot_lmeval.vocabulary import leaves_open, read_vocabulary

HELP = """\
/policy off|recompute|evict   what a return does from now on
/window N                     most live tokens
/save FILE                    write the notes of the replies to come, for hcot view
/new                          forget the conversation
/quit                         leave (Ctrl-D does it, too; Ctrl-C ends a reply)"""
GREETING = "Talk to {name} (policy {policy}, window {window}). /help lists the commands."
PACE = 30
"""Tokens a second of bundled models, which write a reply faster than eyes can follow."""
ROWS = 12
"""Lines of the live context that are shown: the last ones."""


class Screen:
    """What is shown while a reply is written.

    Args:
        engine: which writes it.
        prompt_ids: of its prompt, with which the trace begins.
    """

    def __init__(self, engine: Engine, prompt_ids: Sequence[int]) -> None:
        self._engine = engine
        self._marks = [*engine.markup.markers, *(engine.think or ())]
        self._trace = list(prompt_ids)
        self._gone = ""
        self.generated, self.pruned, self.peak = 0, 0, 0
        self.live: list[int] = []

    def push(self, token: int, step: Step, live: Sequence[int]) -> None:
        """Takes note of a token after which `live` is the context."""
        self._trace.append(token)
        self.live = list(live)
        self.generated += 1
        self.peak = max(self.peak, len(live))
        if step.is_prune:
            self.pruned += len(step.pruned)
            self._gone = self._engine.decode([self._trace[index] for index in step.pruned])

    def __rich__(self) -> Group:
        counts = f"generated {self.generated} · live {len(self.live)} · thrown away {self.pruned} · peak {self.peak}"
        panels = [Panel(self._marked(self._engine.decode(self.live)), title="what the model sees", subtitle=counts)]
        if self._gone:
            panels.append(Panel(Text(_last_lines(self._gone, 4), style="dim strike"), title="thrown away last"))
        return Group(*panels)

    def _marked(self, text: str) -> Text:
        shown = Text(_last_lines(text, ROWS))
        for mark in self._marks:
            shown.highlight_words([mark], "bold cyan")
        return shown


def _last_lines(text: str, rows: int, width: int = 100) -> str:
    room = rows * width
    text = text if len(text) <= room else "…" + text[-room:]
    return "\n".join(text.splitlines()[-rows:])


class Chat:
    """A conversation.

    Args:
        engine: which writes the replies.
        console: where they are shown.
        max_gen_toks: generated tokens of a reply, pruned ones included.
        temperature: of the sampling; 0 takes the most likely token.
        pace: most tokens a second, for eyes that want to follow; 0: as fast as it goes.

    Raises:
        ValueError: a value is not allowed.
    """

    def __init__(
        self,
        engine: Engine,
        console: Console,
        *,
        max_gen_toks: int = 32768,
        temperature: float = 0.0,
        pace: float = 0.0,
    ) -> None:
        if not 0 <= pace < float("inf"):
            raise ValueError(f"pace={pace} is not allowed; give tokens a second, or 0 for as fast as it goes")
        self.pace = pace
        self.engine, self.console = engine, console
        self.tokenizer = engine.tokenizer
        self.max_gen_toks, self.temperature = max_gen_toks, temperature
        self._params()  # what is not allowed is said now
        self.messages: list[dict[str, str]] = []
        self.notes: NoteTaker | None = None
        self._replies = 0

    def _params(self, seed: int = 0) -> SamplingParams:
        return SamplingParams(max_gen_toks=self.max_gen_toks, temperature=self.temperature, seed=seed)

    def _change(self, policy: str, window: int) -> None:
        if self.notes is not None:
            self.notes.close()
            self.notes = None
            self.console.print("the notes end here, for they are of one policy and window; /save begins others")
        model = self.engine.decoder.model
        self.engine = Engine(model, self.tokenizer, policy=policy, max_context=window, any_policy=True, max_slots=1)

    def run(self, ask: Callable[[], str]) -> None:
        """Answers what `ask` returns, until it raises `EOFError` or the user leaves."""
        while True:
            try:
                line = ask().strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self._try_to_reply(line)

    def _try_to_reply(self, line: str) -> None:
        """A message that cannot be read ends no conversation."""
        said = len(self.messages)
        try:
            line.encode()
            self.reply(line)
        except ValueError as error:  # of a text that is no Unicode, or of no token
            del self.messages[said:]
            self.console.print(f"error: {error}", style="red", markup=False)

    def command(self, line: str) -> None:
        """Carries out a command, or says why it cannot be."""
        name, _, value = line.partition(" ")
        value = value.strip()
        try:
            if name == "/policy":
                if value not in list(Policy):
                    raise ValueError(f"policy {value!r} is not one of {', '.join(Policy)}")
                self._change(value, self.engine.limits.context)
            elif name == "/window":
                if not value.isdecimal():
                    raise ValueError(f"window {value!r} is no number of tokens")
                self._change(self.engine.policy.value, int(value))
            elif name == "/save":
                path = Path(value).expanduser()
                if not value or path.exists():
                    raise ValueError(f"{value or 'no name'}: name a new file for the notes")
                facts = {"pruning": self.engine.policy.value, "markup": self.engine.markup.name}
                self.notes = NoteTaker(path, self.engine.decode, facts)
            elif name == "/new":
                self.messages.clear()
            else:
                self.console.print(HELP)
                return
        except (ValueError, OSError) as error:
            self.console.print(f"error: {error}", style="red", markup=False)
            return
        self.console.print(f"{name[1:]} {value}".strip(), style="dim", markup=False)

    def reply(self, text: str) -> Completion | None:
        """Writes the reply to a message and returns it; None if it was stopped."""
        self.messages.append({"role": "user", "content": text})
        request = self._request(text)
        screen = Screen(self.engine, request.prompt_ids)
        done: Completion | None = None
        began = time.monotonic()
        with Live(screen, console=self.console, refresh_per_second=12, transient=True) as live:

            def show(request: Request, sample: int, token: int, step: Step, ids: Sequence[int]) -> None:
                screen.push(token, step, ids)
                if step.is_prune:
                    live.refresh()
                if self.pace:
                    time.sleep(max(0.0, began + screen.generated / self.pace - time.monotonic()))

            try:
                [done] = self.engine.stream([request], self.notes, on_token=show)
            except KeyboardInterrupt:
                self.messages.pop()
        self.console.print(screen)
        if done is None:
            self.console.print("stopped", style="dim")
            return None
        parts = read_vocabulary(self.tokenizer, self.engine.markup).split(done.text, opened=request.thinking)
        self.messages.append({"role": "assistant", "content": parts.answer})
        told = parts.answer or f"(no answer: it ended with {done.finish_reason})"
        self.console.print(told, style="bold", markup=False, highlight=False)
        return done

    def _request(self, text: str) -> Request:
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        own = not self.tokenizer.chat_template
        ids = encode_prompt(self.tokenizer, text, self.engine.markup, add_special_tokens=own)
        self._replies += 1
        params = self._params(self._replies)
        return Request(str(self._replies), tuple(ids), params, thinking=leaves_open(text, self.engine.think))


def parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    parse = argparse.ArgumentParser(
        prog="hcot chat", description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parse.add_argument
    add("model", nargs="?", default="tiny-hcot", help="directory, id on the hub, or a bundled model (%(default)s)")
    add("--policy", choices=[policy.value for policy in Policy], help="what a return does (as it was trained)")
    add("--window", type=int, metavar="N", help="most live tokens (what the model allows)")
    add("--max-gen-toks", type=int, metavar="N", default=32768, help="tokens of a reply, pruned ones too (%(default)s)")
    add("--temperature", type=float, metavar="X", default=0.0, help="of the sampling (%(default)s: none)")
    add("--pace", type=float, metavar="N", help=f"most tokens a second ({PACE} for bundled models, else no limit: 0)")
    add("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    add("--dtype", default="auto", help="of the weights (%(default)s)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args), extra="chat")


def run(args: argparse.Namespace) -> None:
    """Loads the model and talks.

    Raises:
        ValueError, OSError: the model cannot be loaded, or an option is not allowed.
    """
    console = Console()
    engine = Engine.from_pretrained(
        args.model,
        device=args.device,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        policy=args.policy,
        max_context=args.window,
        any_policy=True,
        max_slots=1,
    )
    pace = args.pace if args.pace is not None else PACE if args.model in BUNDLED else 0
    chat = Chat(engine, console, max_gen_toks=args.max_gen_toks, temperature=args.temperature, pace=pace)
    policy, window = chat.engine.policy.value, chat.engine.limits.context
    console.print(GREETING.format(name=args.model, policy=policy, window=window), highlight=False)
    if args.model == "tiny-hcot":
        console.print("It knows nested arithmetic modulo 10; try  c=4*7;a=b-c;b=c+c;a?", style="dim", highlight=False)
    chat.run(lambda: console.input("[bold]> [/bold]"))
