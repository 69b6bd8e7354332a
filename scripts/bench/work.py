"""The work that every engine is given: prompts, and the tokens that it has to generate after them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.trace import LiveContext, Policy, Step

OPEN, SPLIT, CLOSE, FIRST_WORD = 1, 2, 3, 10
MARKERS = MarkerIds(OPEN, SPLIT, CLOSE)
PAD = 0
ENGINES = ("generate", "off", "recompute", "evict", "llama.cpp", "llama.cpp+flash")
DTYPES = ("float32", "bfloat16", "float16")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES: dict[str, dict[str, int]] = {
    name: {**dict(zip(SIZES, sizes, strict=True)), "num_key_value_heads": 2}
    for name, sizes in {
        "tiny": (512, 128, 384, 4, 4),
        "26M": (4096, 384, 1536, 8, 6),
        "0.5B": (151936, 896, 4864, 24, 14),
        "1.5B": (151936, 1536, 8960, 28, 12),
    }.items()
}
"""Sizes of Qwen2 models; 0.5B and 1.5B are those of Qwen2.5, tiny is for tests."""


@dataclass(frozen=True)
class Script:
    """Where a trace opens and closes blocks.

    Attributes:
        tokens: generated tokens a row.
        prompt: prompt tokens a row.
        thought: tokens of each thought.
        solution: tokens of each solution.
        text: tokens between two blocks.
        stagger: shift the rows against each other by equal parts of a block's length; otherwise all rows generate the
            same trace, and close their blocks in the same steps.

    Raises:
        ValueError: a number is too small.
    """

    tokens: int = 512
    prompt: int = 128
    thought: int = 60
    solution: int = 8
    text: int = 4
    stagger: bool = False

    def __post_init__(self) -> None:
        least = {"tokens": 2, "prompt": 1, "thought": 1, "solution": 1, "text": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it has to be at least {bound}")

    @property
    def block(self) -> int:
        """Tokens from one ``[open]`` to the next."""
        return self.thought + self.solution + self.text + 3


@dataclass(frozen=True)
class Work:
    """Prompts and traces, one of each for every row; all prompts have one length, and all traces another.

    Attributes:
        prompts: token ids; no two rows begin alike, so that no engine may share them.
        traces: the tokens to generate.
    """

    prompts: tuple[tuple[int, ...], ...]
    traces: tuple[tuple[int, ...], ...]

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.prompts)

    @property
    def prompt(self) -> int:
        """Prompt tokens of a row."""
        return len(self.prompts[0])

    @property
    def tokens(self) -> int:
        """Generated tokens of a row."""
        return len(self.traces[0])

    @property
    def prunes(self) -> bool:
        """Whether any row throws a thought away."""
        return any(step.is_prune for row in range(self.batch) for step in self.steps(row, Policy.RECOMPUTE))

    def context(self, row: int, policy: Policy | str) -> LiveContext:
        """Returns the live context of a row that has read its prompt."""
        context = LiveContext(MARKERS, policy)
        for token in self.prompts[row]:
            context.push_inert(token)
        return context

    def steps(self, row: int, policy: Policy | str) -> Iterator[Step]:
        """Yields what each generated token of a row does."""
        return map(self.context(row, policy).push, self.traces[row])

    def peak_live(self, policy: Policy | str) -> int:
        """Returns the largest number of live tokens of any row at any time: what its keys and values need."""
        contexts = [self.context(row, policy) for row in range(self.batch)]
        for context, trace in zip(contexts, self.traces, strict=True):
            for token in trace:
                context.push(token)
        return max(context.peak for context in contexts)


def make_work(batch: int, script: Script, vocabulary: int) -> Work:
    """Returns the work of `batch` rows; the same for the same arguments.

    Raises:
        ValueError: there are no rows, or too few words in the vocabulary.
    """
    if batch < 1 or vocabulary - FIRST_WORD < batch:
        raise ValueError(
            f"batch={batch} with a vocabulary of {vocabulary} is not allowed; 1 to {vocabulary - FIRST_WORD}"
        )
    rng = random.Random(1)
    firsts = rng.sample(range(FIRST_WORD, vocabulary), batch)
    prompts = tuple((first, *_words(rng, script.prompt - 1, vocabulary)) for first in firsts)
    trace = _trace(random.Random(0), script, vocabulary)
    lead = [row * script.block // batch if script.stagger else 0 for row in range(batch)]
    traces = tuple((*_words(rng, n, vocabulary), *trace)[: script.tokens] for n in lead)
    return Work(prompts, traces)


def fitted(script: Script, live: int) -> Script:
    """Returns the script with thoughts as long as they can be with so many live tokens at the peak, when it is pruned.

    Raises:
        ValueError: the prompt and what the blocks leave take more, however long the thoughts are.
    """
    low, high = 1, min(live, script.tokens)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _peak(script, middle) <= live else (low, middle - 1)
    if _peak(script, low) > live:
        raise ValueError(
            f"live={live} is too little for this trace, however long its thoughts are: the prompt and what the blocks "
            "leave take more; lower --prompt, --tokens, --solution or --text"
        )
    return replace(script, thought=low)


def _peak(script: Script, thought: int) -> int:
    return make_work(1, replace(script, thought=thought), FIRST_WORD + 1000).peak_live(Policy.RECOMPUTE)


def _trace(rng: random.Random, script: Script, vocabulary: int) -> tuple[int, ...]:
    """Thought, solution and a little text, over and over."""
    tokens: list[int] = []
    while len(tokens) < script.tokens:
        thought, solution, text = (_words(rng, n, vocabulary) for n in (script.thought, script.solution, script.text))
        tokens += [OPEN, *thought, SPLIT, *solution, CLOSE, *text]
    return tuple(tokens[: script.tokens])


def _words(rng: random.Random, count: int, vocabulary: int) -> list[int]:
    return [rng.randrange(FIRST_WORD, vocabulary) for _ in range(count)]
