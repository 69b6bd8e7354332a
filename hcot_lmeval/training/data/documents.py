"""Compiled training documents: a trace as an exact decoder forwards it, and what losses want to know of its targets.

A trace that is too long is cut, never its plan: copies of a solution without the block that they came from would train
the model on contexts that no decoder sees. The cut is made between blocks, so that the model is not taught to stop in
the middle of one, and a cut trace does not end with the end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from hcot_lmeval.grammar import Cursor, Grammar, Label, State, label_tokens
from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.trace import IGNORE, Kind, LiveContext, Malformed, Plan, Policy, compile_trace


@dataclass(frozen=True)
class Example:
    """A trace to learn from.

    Attributes:
        prompt_ids: the prompt; no loss, and its markers are text.
        completion_ids: everything generated, markers and the end-of-turn token included.
        answer: the expected answer, or None.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    answer: str | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """The trace: prompt and completion."""
        return self.prompt_ids + self.completion_ids


@dataclass(frozen=True)
class Document:
    """The tokens that are forwarded for one trace; all lists have one length.

    Attributes:
        ids: token ids.
        positions: position ids.
        death: ``visible(q, k) <=> k <= q < death[k]``, at most the document's length.
        targets: the token that each output predicts, or `IGNORE`.
        states: the `grammar.State` in which that target is generated; 0 where there is none.
        classes: the target's `grammar.TokenClass`; 0 where there is none.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    death: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learned(self) -> int:
        """How many generated tokens are targets; fewer than the example has where it was cut."""
        return len(self.targets) - self.targets.count(IGNORE)


COLUMNS = tuple(f.name for f in fields(Document))
"""The lists of a document, which are the columns of a packed row."""


NO_STAGES = "data.form=stages exists for policy recompute alone; use form=packed with policy evict"


class TooLong(ValueError):
    """No beginning of the trace that ends between blocks fits."""


def compile_document(example: Example, grammar: Grammar, policy: Policy | str, *, max_length: int) -> Document:
    """Compiles the example, or the longest beginning of it that ends between blocks and fits.

    The result equals `trace.compile_trace` of that beginning.

    Args:
        example: prompt and completion.
        grammar: markers, thinking tokens and end tokens.
        policy: what a closing marker does.
        max_length: most forwarded tokens.

    Raises:
        TooLong: not even the shortest such beginning fits.
        ValueError: the prompt is empty.
    """
    ids, start = example.ids, len(example.prompt_ids)
    plan = compile_trace(ids, start, grammar.markers, policy) if len(ids) <= max_length else None
    if plan is None or len(plan) > max_length:  # a plan is never shorter than its trace
        ids = ids[: longest_beginning(example, grammar.markers, policy, max_length)]
        plan = compile_trace(ids, start, grammar.markers, policy)
    return _document(plan, label_tokens(ids, start, grammar))


def split_stages(example: Example, grammar: Grammar, policy: Policy | str, *, max_length: int) -> list[Document]:
    """Splits the trace at its prunes into plain causal documents: the slow twin of the packed plan.

    A stage is the live context as it stands, on which there is no loss, and the tokens up to and including the next
    marker that prunes. Each generated token is a target of one stage. Without prunes (`off`) there is one stage.

    Args:
        example: prompt and completion.
        grammar: markers, thinking tokens and end tokens.
        policy: `recompute` or `off`; under `evict` what is left was computed in other contexts.
        max_length: most tokens of a stage; the trace is cut as in `compile_document`, so that every stage fits.

    Raises:
        TooLong: not even the shortest such beginning fits.
        ValueError: the policy is `evict`, or the prompt is empty.
    """
    markers = grammar.markers
    if Policy(policy) is Policy.EVICT:
        raise ValueError(NO_STAGES)
    ids = example.ids[: longest_beginning(example, markers, policy, max_length, stages=True)]
    labels = label_tokens(ids, len(example.prompt_ids), grammar)
    context, documents = _after_prompt(example, markers, policy), list[Document]()
    before, first = list(context.live), len(example.prompt_ids)
    for end, token in enumerate(ids[first:], start=first + 1):
        if context.push(token).is_prune or end == len(ids):
            plan = compile_trace([*before, *ids[first:end]], len(before), markers, Policy.OFF)
            documents.append(_document(plan, labels[first - len(example.prompt_ids) :]))
            before, first = list(context.live), end
    return documents


def longest_beginning(
    example: Example, markers: MarkerIds, policy: Policy | str, max_length: int, *, stages: bool = False
) -> int:
    """Returns the length of the longest beginning of the trace whose plan has at most `max_length` tokens.

    A beginning ends with the trace, right behind a closing marker or right before an opening one, at any depth, and
    holds at least one generated token. With `stages` each stage has to fit, as long as it is before its prune.

    Raises:
        TooLong: there is none.
    """
    context, size, found = _after_prompt(example, markers, policy), len(example.prompt_ids), 0
    for index, token in enumerate(example.completion_ids, start=size):
        stage = len(context.live) + 1
        step = context.push(token)
        if step.kind is Kind.OPEN and index > len(example.prompt_ids):
            found = index
        size = stage if stages else size + len(step.forward)
        if size > max_length:
            return _fitting(found, max_length)
        if step.kind is Kind.CLOSE:
            found = index + 1
    return len(example.ids)


def faults(example: Example, grammar: Grammar) -> list[str]:
    """Returns how the example departs from the notation, sorted; nothing if the grammar accepts it.

    The kinds are those of `Malformed`, and for what the grammar alone forbids: ``early_end``, an end-of-turn token
    before the end; ``think_in_<state>`` and ``marker_in_<state>``, a thinking token or marker in a `grammar.State`
    where it may not come.
    """
    cursor, context, found = Cursor(grammar), LiveContext(grammar.markers, Policy.OFF), set[str]()
    for token in example.completion_ids:
        if token not in grammar.control_ids and cursor.state is not State.LEAD:
            continue  # text changes nothing, except where the lead token is due
        malformed, label = context.push(token).malformed, cursor.push(token)
        if malformed is not None:
            found.add(malformed.value)
        elif not label.legal and label.state is not State.LEAD:  # a missing lead is reported when its block closes
            found |= _misplaced(token, label.state, grammar)
    if not grammar.eos_ids.isdisjoint(example.completion_ids[:-1]):
        found.add("early_end")
    return sorted(found | ({Malformed.UNCLOSED.value} if context.depth else set()))


def _misplaced(token: int, state: State, grammar: Grammar) -> set[str]:
    if token in grammar.eos_ids:
        return set()  # either it is early, or a block is unclosed
    return {f"{'think' if token in grammar.think else 'marker'}_in_{state.name.lower()}"}


def _after_prompt(example: Example, markers: MarkerIds, policy: Policy | str) -> LiveContext:
    context = LiveContext(markers, policy)
    for token in example.prompt_ids:
        context.push_inert(token)
    return context


def _fitting(found: int, max_length: int) -> int:
    if not found:
        raise TooLong(f"no beginning of the trace that ends between blocks has a plan of {max_length} tokens or fewer")
    return found


def _document(plan: Plan, labels: Sequence[Label]) -> Document:
    """Puts the labels, one for each generated token in order, beside the targets of the plan."""
    states, classes = [0] * len(plan), [0] * len(plan)
    rows = (row for row, target in enumerate(plan.targets) if target != IGNORE)
    for row, label in zip(rows, labels, strict=False):
        states[row], classes[row] = int(label.state), int(label.token_class)
    return Document(plan.ids, plan.positions, plan.death, plan.targets, states, classes)
