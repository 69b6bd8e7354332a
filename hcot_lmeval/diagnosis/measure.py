"""Takes the measurements: scores gold traces in the contexts of every policy, and lets the model write by itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from hcot_lmeval import answers
from hcot_lmeval.diagnosis.measurements import AS_RENDERED, FirstFault, FreeWriting, Measurements, Scored
from hcot_lmeval.diagnosis.subject import Problem, Subject
from hcot_lmeval.engine import Completion, Engine, Request, SamplingParams
from hcot_lmeval.events import Illegal
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.response import Response
from hcot_lmeval.trace import IGNORE, Policy
from hcot_lmeval.training.data.documents import Document, Example, TooLong, compile_document
from hcot_lmeval.training.data.rows import collate
from hcot_lmeval.training.forward import column_logprobs, install, token_logprobs
from hcot_lmeval.vocabulary import Pair, leaves_open, split_thinking

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


# --- likelihoods ------------------------------------------------------------------------------------------------------


def score_traces(
    model: Any, examples: Iterable[Example], grammar: Grammar, policy: Policy, max_length: int
) -> Iterator[Scored]:
    """Scores traces one by one.

    Args:
        model: of transformers, in evaluation mode.
        examples: prompts and traces.
        grammar: names the control tokens.
        policy: what a closing marker does.
        max_length: most tokens forwarded for a trace, those that a prune forwards again included; of longer ones a
            beginning is scored, and those without a beginning that fits are passed over.
    """
    install(model)
    controls = sorted(grammar.control_ids)
    for example in examples:
        try:
            document = compile_document(example, grammar, policy, max_length=max_length)
        except TooLong:
            continue
        yield _score(model, document, controls)


@torch.no_grad()
def _score(model: Any, document: Document, controls: Sequence[int]) -> Scored:
    device = model.get_input_embeddings().weight.device
    batch = {name: values.to(device) for name, values in collate([asdict(document)], len(document), 0).items()}
    rows = [row for row, target in enumerate(document.targets) if target != IGNORE]
    chosen = token_logprobs(model, batch)[0, rows].tolist()
    columns = column_logprobs(model, batch, controls)[0, rows].T.tolist()
    ids = tuple(document.targets[row] for row in rows)
    return Scored(ids, tuple(chosen), {i: tuple(c) for i, c in zip(controls, columns, strict=True)})


def prompt_nats(model: Any, prompts: Iterable[Sequence[int]], grammar: Grammar) -> float:
    """Mean loss on the tokens of prompts behind their first, in nats; NaN if there are none."""
    install(model)
    found: list[float] = []
    for ids in prompts:
        if len(ids) > 1:
            example = Example(tuple(ids[:1]), tuple(ids[1:]))
            document = compile_document(example, grammar, Policy.OFF, max_length=len(ids))
            found += (-logprob for logprob in _score(model, document, []).logprobs)
    return fmean(found) if found else float("nan")
