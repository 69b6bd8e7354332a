"""What a diagnosis is made from: likelihoods of gold traces in several contexts, and what the model itself writes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hcot_lmeval import answers
from hcot_lmeval.diagnosis.findings import AS_RENDERED
from hcot_lmeval.diagnosis.scores import Scored, prompt_nats, score_traces
from hcot_lmeval.engine import Completion, Engine, Request, SamplingParams
from hcot_lmeval.events import Illegal
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.response import Response
from hcot_lmeval.trace import Policy
from hcot_lmeval.training.data.documents import Example
from hcot_lmeval.vocabulary import Pair, leaves_open, split_thinking

if TYPE_CHECKING:
    from hcot_lmeval.diagnosis.subject import Subject

LONGER = 4
"""By default the model may write so many times the longest gold trace."""
LOOP_TOKENS = 256
"""Repeated tokens from which on a response counts as a loop."""
BEGINNING = 16
"""Tokens of a trace by which prompts are compared: what stands before them matters most to the first."""

VARIANTS: dict[str, Callable[[str], str]] = {
    AS_RENDERED: lambda text: text,
    "one more newline": lambda text: text + "\n",
    "one more blank": lambda text: text + " ",
    "no white space at the end": lambda text: text.rstrip(),
    "one newline less": lambda text: text.removesuffix("\n"),
}
"""A prompt, and small changes to its end, as templates make them by mistake."""


@dataclass(frozen=True)
class Problem:
    """A held-out row.

    Attributes:
        prompt: as text, rendered as at inference.
        example: prompt and gold trace as token ids, and the expected answer.
    """

    prompt: str
    example: Example


@dataclass(frozen=True)
class FirstFault:
    """The first token of a generation that the grammar forbids: at which generated token, which one, in which state."""

    index: int
    token: int
    state: str


@dataclass
class FreeWriting:
    """What the model writes by itself under one policy, greedily.

    Attributes:
        ends: finish reason to count.
        right: responses with the expected answer.
        looped: responses found to repeat themselves.
        faults: of each response its first fault, or None.
        generated: tokens of each response.
    """

    ends: Counter[str] = field(default_factory=Counter)
    right: int = 0
    looped: int = 0
    faults: list[FirstFault | None] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)

    @property
    def responses(self) -> int:
        return len(self.faults)

    @property
    def completed(self) -> float:
        """Share that ended by themselves."""
        return self.ends["eos"] / max(1, self.responses)

    @property
    def illegal(self) -> float:
        """Share with anything that the grammar forbids."""
        return sum(fault is not None for fault in self.faults) / max(1, self.responses)

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.responses)


@dataclass
class Measurements:
    """Everything that `findings` judges.

    Attributes:
        intended: the policy that the model would be run with.
        recorded: the policy of its training record, or None.
        scores: policy to the scored gold traces, the same ones under each.
        writing: policy to what the model writes.
        prompts: mean loss on the tokens of prompts, in nats.
        unigram: the same of a model that knows how often each token occurs in these prompts, and nothing else.
        beginnings: variant of the prompt's end to the first tokens of each trace behind it; the prompt as rendered is
            under ``as rendered``.
        names: control id to its text.
        grammar: of the notation.
    """

    intended: Policy
    recorded: Policy | None
    scores: dict[Policy, list[Scored]]
    writing: dict[Policy, FreeWriting]
    prompts: float
    unigram: float
    beginnings: dict[str, list[Scored]]
    names: dict[int, str]
    grammar: Grammar


def measure(
    examined: Subject,
    problems: Sequence[Problem],
    *,
    max_context: int | None = None,
    max_gen_toks: int | None = None,
    max_length: int = 16384,
    batch_size: int = 16,
    show: bool = False,
) -> Measurements:
    """Takes all measurements of a checkpoint.

    Args:
        examined: the checkpoint.
        problems: held-out rows.
        max_context: most live tokens while it writes; None: what its config allows.
        max_gen_toks: most tokens that it writes for a problem; None: `LONGER` times the longest gold trace.
        max_length: most tokens forwarded for a gold trace.
        batch_size: responses written side by side.
        show: whether to show progress bars.
    """
    model, grammar = examined.model, examined.grammar
    limit = max_gen_toks or LONGER * max(len(problem.example.completion_ids) for problem in problems)
    options = {"max_context": max_context, "slots": batch_size, "loop_tokens": LOOP_TOKENS}
    writing = {
        policy: write_freely(engine_for(examined, policy, **options), problems, max_gen_toks=limit, show=show)
        for policy in Policy
    }
    prompts, unigram = measure_prompts(model, problems, grammar)
    return Measurements(
        intended=examined.policy,
        recorded=None if examined.record is None else Policy(examined.record.policy),
        scores=score_policies(model, problems, grammar, max_length=max_length, show=show),
        writing=writing,
        prompts=prompts,
        unigram=unigram,
        beginnings=compare_prompts(model, problems, grammar, examined.policy, examined.form.encode, show=show),
        names=examined.names,
        grammar=grammar,
    )


def score_policies(
    model: Any, problems: Sequence[Problem], grammar: Grammar, *, max_length: int, show: bool
) -> dict[Policy, list[Scored]]:
    """Scores the gold traces under every policy."""
    found: dict[Policy, list[Scored]] = {}
    for policy in Policy:
        examples = tqdm([p.example for p in problems], f"gold traces, {policy}", disable=not show, leave=False)
        found[policy] = list(score_traces(model, examples, grammar, policy, max_length))
    return found


def compare_prompts(
    model: Any,
    problems: Sequence[Problem],
    grammar: Grammar,
    policy: Policy,
    encode: Callable[[str], Sequence[int]],
    *,
    show: bool,
) -> dict[str, list[Scored]]:
    """Scores the first `BEGINNING` tokens of every trace behind each end of its prompt.

    Variants that change no token of any prompt are left out.
    """
    found: dict[str, list[Scored]] = {}
    for name, change in VARIANTS.items():
        prompts = [tuple(encode(change(p.prompt))) for p in problems]
        if name != AS_RENDERED and all(ids == p.example.prompt_ids for ids, p in zip(prompts, problems, strict=True)):
            continue
        some = [
            Example(ids or p.example.prompt_ids[:1], p.example.completion_ids[:BEGINNING])
            for ids, p in zip(prompts, problems, strict=True)
        ]
        bar = tqdm(some, f"prompts: {name}", disable=not show, leave=False)
        found[name] = list(score_traces(model, bar, grammar, policy, 10**6))
    return found


def measure_prompts(model: Any, problems: Sequence[Problem], grammar: Grammar) -> tuple[float, float]:
    """Returns the model's loss on the prompts and that of the unigram model of these prompts, in nats per token."""
    prompts = [p.example.prompt_ids for p in problems]
    counts = Counter(token for ids in prompts for token in ids[1:])
    total = counts.total()
    unigram = -sum(n / total * math.log(n / total) for n in counts.values()) if total else math.nan
    return prompt_nats(model, prompts, grammar), unigram


def engine_for(examined: Subject, policy: Policy, **options: Any) -> Engine:
    """Returns an engine for the checkpoint under any policy; nothing is constrained, loops end a response."""
    return Engine(examined.model, examined.tokenizer, policy=policy, markup=examined.markup, any_policy=True, **options)


def write_freely(engine: Engine, problems: Sequence[Problem], *, max_gen_toks: int, show: bool) -> FreeWriting:
    """Lets the model solve the problems greedily under the engine's policy."""
    params = SamplingParams(max_gen_toks=max_gen_toks)
    requests = [
        Request(str(n), p.example.prompt_ids, params, leaves_open(p.prompt, engine.think))
        for n, p in enumerate(problems)
    ]
    expected = {str(n): p.example.answer for n, p in enumerate(problems)}
    found = FreeWriting()
    bar = tqdm(engine.stream(requests), f"writing, {engine.policy}", len(requests), disable=not show, leave=False)
    for done in bar:
        found.ends[done.finish_reason] += 1
        found.right += is_right(done, expected[done.request.id], engine.think)
        found.looped += done.statistics.loops > 0
        found.faults.append(first_fault(done))
        found.generated.append(done.statistics.generated_tokens)
    return found


def is_right(done: Completion, expected: str | None, think: Pair | None) -> bool:
    """Whether the response holds the expected answer."""
    if expected is None:
        return False
    parts = split_thinking(done.text, think, opened=done.request.thinking)
    return answers.grade(Response(parts.answer, thinking=parts.thinking), expected).correct is True


def first_fault(done: Completion) -> FirstFault | None:
    """The first token of a response that the grammar forbids."""
    start = len(done.request.prompt_ids)
    found = (event for event in done.note.events if isinstance(event, Illegal))
    return next((FirstFault(event.index - start, event.id, event.state) for event in found), None)
