"""Completions by the weights of a model in training, with what a reward and a policy gradient want to know of them.

    rollout = Rollout(tokenizer, policy="recompute", max_context=4096, max_gen_toks=8192, temperature=1.0)
    written = rollout(model, [prompt_ids, ...], seeds=[0, ...])

The engine is kept between calls, and reads the weights as they are at each. It leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hcot_lmeval.engine import Completion, Engine, Request, SamplingParams
from hcot_lmeval.grammar import Grammar, label_tokens
from hcot_lmeval.markup import Markup, get_markup
from hcot_lmeval.response import Response
from hcot_lmeval.trace import Kind, LiveContext, Policy
from hcot_lmeval.training.data.documents import Example
from hcot_lmeval.training.evaluation import evaluation_mode, touch
from hcot_lmeval.training.forward import causal_lm
from hcot_lmeval.vocabulary import leaves_open, read_vocabulary


@dataclass(frozen=True)
class Block:
    """A block of a trace.

    Attributes:
        thought: tokens of its thought that were in the context when it ended, so that of a block within it only the
            marker and the solution count.
        solution: tokens of its solution, counted likewise.
        depth: open blocks with it.
        copied: whether the same block, token for token, came before.
    """

    thought: int
    solution: int
    depth: int
    copied: bool


@dataclass(frozen=True)
class Shape:
    """What a trace looks like, as far as rewards ask.

    Attributes:
        blocks: the closed blocks, in the order in which they ended.
        unclosed: blocks that were left open.
        markers: generated markers, thinking tokens and end tokens.
        illegal: those of them that the grammar forbids where they came.
        generated: generated tokens, pruned ones included.
        peak: the most live tokens at once, prompt included.
        area: mean number of live tokens over the generated ones.
    """

    blocks: tuple[Block, ...]
    unclosed: int
    markers: int
    illegal: int
    generated: int
    peak: int
    area: float


def shape_of(trace: Example, grammar: Grammar, policy: Policy | str) -> Shape:
    """Returns the shape of a trace, found by the rule alone."""
    context = LiveContext(grammar.markers, Policy(policy))
    for token in trace.prompt_ids:
        context.push_inert(token)
    sizes: list[list[int]] = []  # of the open blocks: tokens of thought, of solution, where it began, -1 or its split
    blocks: list[Block] = []
    seen: set[tuple[int, ...]] = set()
    live = 0
    for index, token in enumerate(trace.completion_ids):
        kind = context.push(token).kind
        live += len(context.live)
        if kind is Kind.OPEN:
            if sizes:
                sizes[-1][sizes[-1][3]] += 1  # the marker of a block within stays
            sizes.append([0, 0, index, 0])
        elif kind is Kind.SPLIT and sizes:
            sizes[-1][3] = 1
        elif kind is Kind.CLOSE and sizes:
            thought, solution, start, _ = sizes.pop()
            ids = tuple(trace.completion_ids[start : index + 1])
            blocks.append(Block(thought, solution, len(sizes) + 1, ids in seen))
            seen.add(ids)
            if sizes:
                sizes[-1][sizes[-1][3]] += solution
        elif sizes:
            sizes[-1][sizes[-1][3]] += 1
    labels = label_tokens(trace.ids, len(trace.prompt_ids), grammar)
    pairs = zip(trace.completion_ids, labels, strict=True)
    legal = [label.legal for token, label in pairs if token in grammar.control_ids]
    count = len(trace.completion_ids)
    return Shape(
        tuple(blocks), len(sizes), len(legal), legal.count(False), count, context.peak, live / count if count else 0.0
    )


class Rollout:
    """Writes completions.

    Args:
        tokenizer: of the model, with the markers of the notation.
        grammar: of the notation in its vocabulary.
        policy: what a return does.
        markup: the notation.
        max_context: live tokens of a completion; None for the model's limit.
        max_gen_toks: generated tokens of a completion.
        temperature: of the sampling, above 0.
        batch_size: completions that are written side by side.
        controls: constraints, max_depth and the other fields of `hcot_lmeval.control.ControlOptions`.
    """

    def __init__(
        self,
        tokenizer: Any,
        grammar: Grammar,
        *,
        policy: Policy | str,
        markup: Markup | str = "hcot",
        max_context: int | None = None,
        max_gen_toks: int = 1024,
        temperature: float = 1.0,
        batch_size: int = 32,
        **controls: Any,
    ) -> None:
        self.tokenizer, self.grammar, self.policy = tokenizer, grammar, Policy(policy)
        self.vocabulary = read_vocabulary(tokenizer, get_markup(markup))
        self.max_gen_toks, self.temperature = max_gen_toks, temperature
        # the model may be trained under another policy than before; its check is made once, at the start of a run
        fixed = {"policy": self.policy, "markup": markup, "any_policy": True, "self_check": False}
        self._options = {**fixed, "eos_ids": sorted(grammar.eos_ids), "max_context": max_context, **controls}
        self._slots = batch_size
        self._engine: tuple[Any, Engine] | None = None

    def engine(self, model: Any) -> Engine:
        """Returns the engine of the model, which is made once."""
        inner = causal_lm(model)
        if self._engine is None or self._engine[0] is not inner:
            self._engine = inner, Engine(inner, self.tokenizer, slots=self._slots, **self._options)
        return self._engine[1]

    def __call__(self, model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        """Returns a completion for each prompt, in their order, with log-probabilities.

        Args:
            model: in training, bare or within PEFT, DDP or `torch.compile` wrappers.
            prompts: token ids; the same one may come several times.
            seeds: of each completion.
        """
        with evaluation_mode(model):
            touch(causal_lm(model), prompts[0][0])
            return self.engine(model).generate([self._request(*each) for each in zip(prompts, seeds, strict=True)])

    def _request(self, prompt: Sequence[int], seed: int) -> Request:
        params = SamplingParams(self.max_gen_toks, temperature=self.temperature, seed=seed, logprobs=True)
        opened = leaves_open(str(self.tokenizer.decode(prompt)), self.vocabulary.think)
        return Request(str(seed), tuple(prompt), params, thinking=opened)

    def response(self, done: Completion) -> Response:
        """Returns the answer part of a completion with its statistics, as tasks and rewards read it."""
        parts = self.vocabulary.split(done.text, opened=done.request.thinking)
        stats = done.statistics.as_dict()
        return Response(
            parts.answer, stats=stats, thinking=parts.thinking, raw=done.text, finish_reason=done.finish_reason
        )

    def shape(self, done: Completion) -> Shape:
        """Returns the shape of a completion."""
        return shape_of(Example(done.request.prompt_ids, done.token_ids), self.grammar, self.policy)
