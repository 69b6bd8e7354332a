"""Requests, the rows that serve them, what ends them, and what comes back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hcot_lmeval.control import FREE, Budget, Controller, Directive, LoopDetector
from hcot_lmeval.engine.sampling import Choice, Draw, SamplingParams, derive_seed
from hcot_lmeval.engine.slots import Chunk, Span
from hcot_lmeval.events import Prune, Recorder, Statistics, statistics
from hcot_lmeval.notes import Note
from hcot_lmeval.trace import LiveContext, Policy, Step
from hcot_lmeval.vocabulary import Pair, changes

Decode = Callable[[Sequence[int]], str]

NO_ROOM = "context"
"""Finish reason of a row whose next token does not fit."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        id: the caller's name for it.
        prompt_ids: the prompt, at least one token.
        params: how to sample and when to stop.
        thinking: whether the prompt leaves a thinking section open.
        forced_ids: the first tokens to generate, whatever the model prefers; log-probabilities are still the model's.
            For scoring a given trace, and for timing engines on equal work.
        meta: copied to the notes.

    Raises:
        ValueError: the prompt is empty.
        TypeError: the prompt is not a tuple of token ids.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    thinking: bool = False
    forced_ids: tuple[int, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt_ids, tuple) or not all(isinstance(i, int) for i in self.prompt_ids):
            raise TypeError(
                f"request {self.id!r}: prompt_ids is {type(self.prompt_ids).__name__} {str(self.prompt_ids)[:40]!r}; "
                "give a tuple of token ids, e.g. tuple(encode_prompt(tokenizer, text))"
            )
        if not self.prompt_ids:
            raise ValueError(f"request {self.id!r} has an empty prompt; it needs at least one token, such as BOS")


@dataclass(frozen=True)
class Completion:
    """What became of one sample of a request.

    Attributes:
        request: the request.
        sample: which of its samples, from 0.
        token_ids: every generated token, those pruned later and the end token included.
        live_ids: the live context at the end, prompt included.
        finish_reason: eos, stop (a stop string or stop id), length (max_gen_toks), context (the next token did not fit
            into max_context; it is not part of `token_ids`) or loop (the trace repeats itself).
        stop: the stop string or id that matched.
        text: the generated text without special tokens other than markers and thinking tokens, cut at a stop string.
        logprobs: of each generated token, if asked for (see `SamplingParams.logprobs`).
        legal_logprobs: the same under the distribution that constraints and forced tokens leave; without any, equal.
        directives: what constraints held for each generated token; None without any, or without log-probabilities.
        note: all events.
    """

    request: Request
    sample: int
    token_ids: tuple[int, ...]
    live_ids: tuple[int, ...]
    finish_reason: str
    stop: str | int | None
    text: str
    logprobs: tuple[float, ...] | None
    legal_logprobs: tuple[float, ...] | None
    directives: tuple[Directive, ...] | None
    note: Note
    statistics: Statistics


@dataclass(frozen=True)
class Limits:
    """When a row has to end.

    Attributes:
        context: most live tokens.
        position: the trace stays shorter than this under policy evict, whose position ids count the trace.
        eos_ids: token ids that end a row.
    """

    context: int
    position: int
    eos_ids: frozenset[int]


OnToken = Callable[[Request, int, int, Step, Sequence[int]], None]
"""Called with (request, sample, token, what it did, live token ids afterwards) as each token is generated."""


class IncrementalText:
    """The text of a growing token sequence; a token is decoded together with its neighbours.

    A decoder may hold back bytes until a character is complete and may drop a space at the start of a sequence, so each
    addition is decoded behind tokens that are known already and their text is taken off.
    """

    def __init__(self, decode: Decode) -> None:
        self.text = ""
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # decoding starts here
        self._read = 0  # up to here the text is in self.text

    def append(self, token: int) -> None:
        """Adds a token; its text appears once its characters are complete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._read])
        after = self._decode(self._ids[self._context :])
        if len(after) > len(before) and not after.endswith("�"):
            self.text += after[len(before) :]
            self._context, self._read = self._read, len(self._ids)


class StopStrings:
    """Looks for stop strings in the answer part of one row: outside the thinking section and with no block open.

    Args:
        strings: what ends the row.
        decode: token ids to text, markers and thinking tokens included, other special tokens left out.
        think: the strings around the thinking section, or None if the model has none.
        thinking: whether the prompt left a thinking section open.
    """

    def __init__(
        self, strings: Sequence[str], decode: Decode, think: Pair | None = None, thinking: bool = False
    ) -> None:
        self._strings = strings
        self._longest = max(map(len, strings), default=0)
        self._text = IncrementalText(decode)
        self._think = think
        self._thinking = thinking and think is not None
        self._start = 0  # the answer part begins here, as far as is known
        self._passed = 0  # what ends here or before does not count
        self._depth = 0

    @property
    def text(self) -> str:
        return self._text.text

    def append(self, token: int, depth: int) -> None:
        """Adds a generated token after which `depth` blocks are open."""
        known = len(self.text)
        self._text.append(token)
        self._follow_thinking(known)
        if self._thinking or depth or self._depth:  # a closing marker belongs to its block
            self._start = len(self.text)
        self._depth = depth

    def pass_over(self) -> None:
        """What the text ends with now is no match, be it a stop string."""
        self._passed = len(self.text)

    def find(self) -> tuple[str, int] | None:
        """Returns the stop string that appears first and where, or None."""
        starts = [max(self._start, self._passed - len(string) + 1) for string in self._strings]
        hits = [(self.text.find(s, start), s) for s, start in zip(self._strings, starts, strict=True)]
        found = [(at, string) for at, string in hits if at >= 0]
        if not found:
            self._start = max(self._start, len(self.text) - self._longest)
            return None
        at, string = min(found)
        return string, at

    def _follow_thinking(self, known: int) -> None:
        """Notices every opening and closing of the thinking section that the text added after `known` completes."""
        if self._think is None:
            return
        tail = max(0, known - max(map(len, self._think)) + 1)
        for thinking, at in changes(self.text, self._think, self._thinking, tail):
            self._thinking, self._start = thinking, max(self._start, at)


class Row:
    """One sample of one request while it is generated, in one slot of the pool.

    A row holds the steps whose tokens are still to be forwarded. `next_chunk` hands them out in pieces, `forwarded`
    takes note that a piece is in the pool, `accept` takes the token sampled from the last output.

    Attributes:
        positions: position ids of the live tokens whose keys and values are in the slot, or on their way into it.
        shared: prompt tokens copied from another slot instead of forwarded.
        finished: the finish reason, empty while the row runs.
    """

    def __init__(
        self,
        request: Request,
        sample: int,
        slot: int,
        context: LiveContext,
        limits: Limits,
        *,
        stops: StopStrings | None = None,
        controller: Controller | None = None,
        loops: LoopDetector | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        self.request, self.sample, self.slot = request, sample, slot
        self.context, self.limits, self.stops = context, limits, stops
        self.controller, self.loops, self.on_token = controller, loops, on_token
        self.recorder = Recorder()
        self.positions: list[int] = []
        self.shared = 0
        self.generated: list[int] = []
        self.choices: list[Choice] = []
        self.directives: list[Directive] = []
        self.finished = ""
        self.stop: str | int | None = None
        self.stop_at: int | None = None
        self._seed = derive_seed(request.params.seed, sample)
        self._steps: deque[Step] = deque()
        self._done = 0  # tokens of the first step that are in the pool
        self._directive = FREE

    def load_prompt(self, *, acts: bool) -> None:
        """Queues the prompt; `acts` lets its markers open and close blocks."""
        push = self.context.push if acts else self.context.push_inert
        self._steps.extend(_merged([push(token) for token in self.request.prompt_ids]))
        if acts and self.controller is not None:
            self.controller.begin(self.request.prompt_ids)
        if self.context.peak > self.limits.context:
            self._note_prefill()
            self._end(NO_ROOM)

    def skip_prompt(self, tokens: int) -> None:
        """The first `tokens` of the prompt are in the slot already. Only before anything was forwarded."""
        self.shared = self._done = tokens
        self.positions = list(range(tokens))

    @property
    def prunes(self) -> int:
        """How often a thought was thrown away so far."""
        return sum(isinstance(event, Prune) for event in self.recorder.events)

    @property
    def needs_token(self) -> bool:
        """Whether everything is forwarded, so that the last output predicts the next token."""
        return not self._steps

    @property
    def reads_prompt(self) -> bool:
        """Whether a part of the prompt is still to be forwarded."""
        return not self.generated and not self.needs_token

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end the row."""
        return self.limits.eos_ids.union(self.request.params.stop_ids)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the current step that are still to be forwarded."""
        return len(self._steps[0].forward) - self._done

    def next_chunk(self, limit: int) -> Chunk:
        """Returns at most `limit` tokens to forward now. A rewind happens here: the row becomes shorter."""
        step = self._steps[0]
        if self._done == 0:
            del self.positions[step.rewind :]
        start, stop = len(self.positions), min(len(step.forward), self._done + limit)
        self.positions += step.positions[self._done : stop]
        return Chunk(self.slot, start, step.forward[self._done : stop], self.positions)

    def forwarded(self, tokens: int) -> tuple[Span, ...]:
        """Takes note that `tokens` of the current step are in the pool.

        Returns:
            The spans that the pool has to drop now, ascending.
        """
        self._done += tokens
        if self._done < len(self._steps[0].forward):
            return ()
        self._done, spans = 0, self._steps.popleft().drop
        for start, stop in reversed(spans):
            del self.positions[start:stop]
        return spans

    def draw(self) -> Draw:
        """Returns what the sampler has to know."""
        params, count = self.request.params, len(self.generated)
        banned = tuple(self.end_ids) if count < params.min_gen_toks else ()
        seen = (*self.request.prompt_ids, *self.generated) if params.repetition_penalty != 1 else ()
        forced = self.request.forced_ids[count] if count < len(self.request.forced_ids) else None
        if self.controller is not None:
            self._directive = self.controller.directive(self._budget())
        illegal, only, _ = self._directive
        return Draw(params, self._seed, count, banned, seen, forced, illegal, only)

    def _budget(self) -> Budget:
        tokens = self.request.params.max_gen_toks - len(self.generated)
        if self.context.policy is Policy.EVICT:
            tokens = min(tokens, self.limits.position - self.context.length)
        return Budget(tokens, self.limits.context - len(self.context.live))

    def accept(self, choice: Choice) -> Step | None:
        """Appends the sampled token and returns its step, or ends the row and returns None because it does not fit."""
        if not self.generated:
            self._note_prefill()
        if not self._fits(choice.token):
            self._end(NO_ROOM)
            return None
        index = self.context.length
        self._note_control(index, choice)
        step = self.context.push(choice.token)
        self.generated.append(choice.token)
        if self.request.params.logprobs:
            self.choices.append(choice)
            self.directives.append(self._directive)
        self.recorder.step(index, choice.token, step, len(self.context.live))
        if self.on_token is not None:
            self.on_token(self.request, self.sample, choice.token, step, tuple(self.context.live))
        reason = self._reason_to_end(choice.token)
        if reason:
            self._end(reason)
        else:
            self._steps.append(step)
        return step

    def _note_control(self, index: int, choice: Choice) -> None:
        """Tells the controller of the token, and the recorder of what the controller did or found."""
        if self.controller is None:
            return
        token, preferred, directive = choice.token, choice.preferred, self._directive
        if (
            preferred is not None
            and preferred != token
            and token not in self.request.forced_ids[len(self.generated) :][:1]
        ):
            cause = directive.cause or self.controller.cause(preferred)
            self.recorder.forced(index, token, cause.value, preferred)
        state = self.controller.cursor.state
        if not self.controller.push(token):
            self.recorder.illegal(index, token, state.name.lower())

    def _note_prefill(self) -> None:
        self.recorder.prefill(len(self.request.prompt_ids), len(self.context.live), self.shared)

    def _fits(self, token: int) -> bool:
        if self.context.policy is Policy.EVICT and self.context.length >= self.limits.position:
            return False
        return self.context.rows_needed(token) <= self.limits.context

    def _reason_to_end(self, token: int) -> str:
        params = self.request.params
        if self.stops is not None:
            self.stops.append(token, self.context.depth)
            if len(self.generated) < params.min_gen_toks:
                self.stops.pass_over()
        if token in self.limits.eos_ids:
            return "eos"
        if token in params.stop_ids:
            self.stop = token
            return "stop"
        if self.stops is not None:
            hit = self.stops.find()
            if hit is not None:
                self.stop, self.stop_at = hit
                return "stop"
        if self._repeats_itself(token):
            return "loop"
        return "length" if len(self.generated) >= params.max_gen_toks else ""

    def _repeats_itself(self, token: int) -> bool:
        """Whether the row has to end for it; if its answer can be forced, it goes on with that."""
        if self.loops is None:
            return False
        again = self.loops.push(token, self.context.depth)
        if self.controller is not None and self.controller.is_closing:
            self.loops.forget()  # closing markers that are forced one after the other are nobody's loop
            return False
        if not again:
            return False
        self.recorder.loop(self.context.length - 1)
        self.loops.forget()
        return self.controller is None or not self.controller.end()

    def _end(self, reason: str) -> None:
        self.finished = reason
        self.recorder.finish(reason, self.stop, self.context.depth)

    def completion(self, decode: Decode) -> Completion:
        """What became of the row, which has finished; `decode` gives its text where no stop string cut it."""
        request, tokens, events = self.request, tuple(self.generated), tuple(self.recorder.events)
        choices = self.choices if request.params.logprobs else None
        cut = self.stops is not None and self.stop_at is not None
        return Completion(
            request=request,
            sample=self.sample,
            token_ids=tokens,
            live_ids=tuple(self.context.live),
            finish_reason=self.finished,
            stop=self.stop,
            text=self.stops.text[: self.stop_at] if cut else decode(tokens),  # type: ignore[union-attr]
            logprobs=None if choices is None else tuple(choice.logprob for choice in choices),
            legal_logprobs=None if choices is None else tuple(choice.legal_logprob for choice in choices),
            directives=tuple(self.directives) if any(each is not FREE for each in self.directives) else None,
            note=Note(request.id, self.sample, request.prompt_ids, tokens, events, request.meta),
            statistics=statistics(events),
        )


def _merged(steps: Sequence[Step]) -> list[Step]:
    """Joins steps that only append, so that a prompt is forwarded in large chunks."""
    merged: list[Step] = []
    start = 0
    for index, step in enumerate(steps):
        last = index + 1 == len(steps)
        if last or step.drop or steps[index + 1].rewind != step.rewind + len(step.forward):
            merged.append(_joined(steps[start : index + 1]))
            start = index + 1
    return merged


def _joined(steps: Sequence[Step]) -> Step:
    return steps[-1]._replace(
        rewind=steps[0].rewind,
        forward=tuple(token for step in steps for token in step.forward),
        positions=tuple(position for step in steps for position in step.positions),
        source=tuple(source for step in steps for source in step.source),
    )
