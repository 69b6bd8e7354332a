"""What is measured on held-out data while a model trains: losses by class of token, and what it writes by itself.

    with evaluation_mode(model):
        metrics = held_out_losses(batches, partial(loss_sums, model, settings=settings))
    run = free_run(model, tokenizer, problems, policy="recompute", markup="hcot", max_context=512, max_gen_toks=4096,
                   batch_size=32)
    metrics |= run.metrics                    # accuracy, illegal_traces, generated_tokens, ...

The loss says how well the model continues traces that others wrote; only a free run says whether it keeps to the
notation, comes to an end and finds the answer on its own. Generation is that of the evaluation, pruned on the way.

Every key is always there. A mean over nothing, such as the accuracy on problems without answers, is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Trainer

from hcot_lmeval import answers
from hcot_lmeval.engine import Completion, Engine, Request, SamplingParams
from hcot_lmeval.events import COMPLETE
from hcot_lmeval.grammar import Grammar, TokenClass, is_legal_trace
from hcot_lmeval.response import Response
from hcot_lmeval.trace import Malformed
from hcot_lmeval.training.config import SftConfig
from hcot_lmeval.training.data.dataset import Prepared
from hcot_lmeval.training.data.documents import COLUMNS
from hcot_lmeval.training.data.rows import PackedRow
from hcot_lmeval.training.forward import Batch, LossSettings, causal_lm, loss_sums
from hcot_lmeval.training.losses import LossSums
from hcot_lmeval.training.run import RunDirectory
from hcot_lmeval.vocabulary import leaves_open, read_vocabulary

Problem = tuple[Sequence[int], str | None]
"""The token ids of a prompt and the expected answer; a problem without one is generated but not graded."""

LOSSES = {
    "loss_text": TokenClass.TEXT,
    "loss_markers": TokenClass.MARKER,
    "loss_solution": TokenClass.SOLUTION,
    "loss_answer": TokenClass.ANSWER,
}
"""The losses by class of the target."""


@dataclass(frozen=True)
class Sample:
    """A generation for people to read, and in numbers.

    Attributes:
        prompt: as text, special tokens included.
        generated: as text, markers included, pruned parts too.
        answer: what was found behind the thinking, or None.
        expected: the expected answer, or None.
        right: whether they agree; None without an expected answer, or if they could not be compared.
        legal: whether the trace keeps to the notation; a budget that cuts it within a block is no fault of it.
        cut: whether a budget cut it within an open block.
        finish_reason: eos, stop, length or context.
        generated_tokens: pruned ones included.
        pruned_tokens: of those, how many were thrown away.
        prunes: blocks closed with a prune.
        peak_live_tokens: the most tokens that the model saw at once, prompt included.
        live_tokens: tokens in the context at the end, prompt included.
    """

    prompt: str
    generated: str
    answer: str | None
    expected: str | None
    right: bool | None
    legal: bool
    cut: bool
    finish_reason: str
    generated_tokens: int
    pruned_tokens: int
    prunes: int
    peak_live_tokens: int
    live_tokens: int


MEASURES: dict[str, Callable[[Sample], float]] = {
    "accuracy": lambda one: math.nan if one.expected is None else one.right is True,
    "completion": lambda one: one.finish_reason in COMPLETE,
    "illegal_traces": lambda one: not one.legal,
    "incomplete_traces": lambda one: one.cut,
    "generated_tokens": lambda one: one.generated_tokens,
    "peak_live_tokens": lambda one: one.peak_live_tokens,
    "live_tokens": lambda one: one.live_tokens,
    "pruned_share": lambda one: one.pruned_tokens / max(1, one.generated_tokens),
    "prunes": lambda one: one.prunes,
}
"""The metrics of `free_run`, each a mean over the problems; an answer that could not be compared is a wrong one."""


@dataclass(frozen=True)
class FreeRun:
    """The outcome of `free_run`.

    Attributes:
        metrics: `MEASURES` to means over the problems of all processes.
        samples: the first few problems of this process, the same ones in every evaluation.
    """

    metrics: dict[str, float]
    samples: tuple[Sample, ...]

    def records(self, step: int) -> list[dict[str, Any]]:
        """Returns the samples as JSON values with the optimiser step, for a log (see `training.curves`)."""
        return [{"step": step, **asdict(sample)} for sample in self.samples]


def free_run(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    max_gen_toks: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    keep: int = 4,
    shard: bool = True,
    progress: bool = False,
    **options: Any,
) -> FreeRun:
    """Lets a model in training solve problems under pruning, and leaves it as it was.

    In a distributed run every process calls it with the same problems and gets the same metrics.

    Args:
        model: a causal language model, bare or within PEFT, DDP, FSDP or `torch.compile` wrappers.
        tokenizer: its tokenizer, with the markers of the notation.
        problems: at least one.
        max_gen_toks: most generated tokens of a problem, pruned ones included.
        batch_size: problems that are generated side by side.
        temperature: 0 takes the most likely token.
        seed: of the sampling, without meaning at temperature 0.
        keep: how many generations to keep as samples.
        shard: every process solves its share. False: every process solves all of them, which sharded weights (FSDP)
            need, since there each forward is a common effort of all processes.
        progress: show a progress bar, on the first process.
        options: of the engine: policy, markup, max_context, ... Two differ from its defaults. The policy may be another
            than that of the model's training before; and ``self_check`` is off: once, at the start of a training, is
            enough, and later a model that has diverged would fail it for the wrong reason.

    Raises:
        ValueError: there are no problems, or an option is outside its range.
        UnsupportedModelError: the model's state cannot be rewound.
    """
    if not problems:
        raise ValueError("a free run needs at least one problem")
    rank, world = _place() if shard else (0, 1)
    mine = problems[rank::world]
    with evaluation_mode(model):
        touch(causal_lm(model), problems[0][0][0])
        options = {"any_policy": True, "self_check": False, **options}
        engine = Engine(causal_lm(model), tokenizer, slots=batch_size, **options)
        params = SamplingParams(max_gen_toks=max_gen_toks, temperature=temperature, seed=seed)
        requests = [Request(str(i), tuple(prompt_ids), params) for i, (prompt_ids, _) in enumerate(mine)]
        done = _generate(engine, requests, show=progress and _place()[0] == 0)
    reader = _Reader(engine)
    samples = [reader.read(completion, expected) for completion, (_, expected) in zip(done, mine, strict=True)]
    values = [[float(measure(one)) for measure in MEASURES.values()] for one in samples]
    rows = torch.tensor(values, dtype=torch.float64).reshape(-1, len(MEASURES))
    means = _mean(rows.nan_to_num(0).sum(0), rows.isfinite().sum(0), engine.decoder.device, reduce=shard)
    return FreeRun(dict(zip(MEASURES, means, strict=True)), tuple(samples[:keep]))


def held_out_losses(batches: Iterable[Any], measure: Callable[[Any], LossSums]) -> dict[str, float]:
    """Returns mean losses over held-out batches, in nats per target, without building gradients.

    ``loss`` is the plain cross-entropy over all targets, whatever the weights of the training loss; ``loss_text``,
    ``loss_markers``, ``loss_solution`` and ``loss_answer`` are those over the targets of one class; ``structure`` is
    the structure term per target, unweighted. In a distributed run each process brings its own batches, as many as the
    others, for a forward may be a common effort; the means are over the targets of all, and all get them.

    Args:
        batches: collated batches.
        measure: a batch to its losses; the model's mode is up to the caller (see `evaluation_mode`).

    Raises:
        ValueError: there is no batch.
    """
    total: LossSums | None = None
    with torch.no_grad():
        for batch in batches:
            sums = measure(batch).map(torch.Tensor.double)
            total = sums if total is None else total + sums
    if total is None:
        raise ValueError("held-out losses need at least one batch")
    loss, structure, by_class = total.map(_over_processes).means()
    return {"loss": loss, **{name: by_class[each] for name, each in LOSSES.items()}, "structure": structure}


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """While it is open every module of `model` is in evaluation mode; afterwards each is in the mode that it had.

    Evaluation mode also suspends dropout and gradient checkpointing.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.no_grad()
def touch(inner: Any, token: int) -> None:
    """Forwards one token, so that whatever is allocated by the first forward is so outside of inference mode.

    The engine decodes within it, and tensors made there cannot be trained with: FSDP2 keeps the buffers that it gathers
    weights into for the rest of the run.
    """
    inner(input_ids=torch.tensor([[token]], device=inner.get_input_embeddings().weight.device), use_cache=False)


def _generate(engine: Engine, requests: Sequence[Request], *, show: bool) -> list[Completion]:
    """Returns the completions in the order of the requests."""
    found: dict[str, Completion] = {}
    with tqdm(total=len(requests), desc="free run", unit="problem", disable=not show, leave=False) as bar:
        for completion in engine.stream(requests):
            found[completion.request.id] = completion
            bar.update()
    return [found[request.id] for request in requests]


class _Reader:
    """Reads completions: whether they are right and legal, and what they cost."""

    def __init__(self, engine: Engine) -> None:
        self._tokenizer, self._vocabulary = engine.tokenizer, read_vocabulary(engine.tokenizer, engine.markup)
        self._grammar = None
        if engine.markers is not None:  # policy off also runs without markers; then nothing can be illegal
            self._grammar = Grammar(engine.markers, self._vocabulary.think_ids, engine.limits.eos_ids)

    def read(self, done: Completion, expected: str | None) -> Sample:
        prompt = str(self._tokenizer.decode(done.request.prompt_ids))
        parts = self._vocabulary.split(done.text, opened=leaves_open(prompt, self._vocabulary.think))
        answer, stats = Response(parts.answer, thinking=parts.thinking), done.statistics
        return Sample(
            prompt=prompt,
            generated=done.text,
            answer=answers.extract_answer(answer),
            expected=expected,
            right=None if expected is None else answers.grade(answer, expected).correct,
            legal=self._is_legal(done),
            cut=done.finish_reason not in COMPLETE and Malformed.UNCLOSED in stats.malformed,
            finish_reason=done.finish_reason,
            generated_tokens=stats.generated_tokens,
            pruned_tokens=stats.pruned_tokens,
            prunes=stats.prune_events,
            peak_live_tokens=stats.peak_live_tokens,
            live_tokens=stats.live_tokens,
        )

    def _is_legal(self, done: Completion) -> bool:
        """Whether neither the pruning rule nor the grammar objects; a block that a budget left open is no objection."""
        if set(done.statistics.malformed) - {Malformed.UNCLOSED}:
            return False
        if self._grammar is None:
            return True
        ids, start = done.request.prompt_ids + done.token_ids, len(done.request.prompt_ids)
        return is_legal_trace(ids, start, self._grammar, finished=done.finish_reason in COMPLETE)


def _place() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _over_processes(sums: torch.Tensor) -> torch.Tensor:
    if _place()[1] > 1:
        dist.all_reduce(sums)
    return sums


def _mean(sums: torch.Tensor, counts: torch.Tensor, device: torch.device, *, reduce: bool) -> list[float]:
    """Returns sums / counts, over all processes if `reduce`; NaN where nothing was counted."""
    both = torch.stack([sums.double(), counts.double()]).to(device if reduce and _place()[1] > 1 else "cpu")
    if reduce and _place()[1] > 1:
        dist.all_reduce(both)
    means: list[float] = (both[0] / both[1]).tolist()
    return means


# --- of a run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What a run trains on, phase by phase, and what it holds out.

    Attributes:
        train: for each phase its rows.
        held_out: rows compiled for the policy of the last phase.
        problems: prompts and answers for free-running generation.
        grammar: of the markup.
    """

    train: Sequence[Prepared]
    held_out: Prepared
    problems: Sequence[tuple[Sequence[int], str]]
    grammar: Grammar


@dataclass
class Evaluator:
    """Measures a model on what is held out; every process calls it.

    Attributes:
        config: the settings.
        tokenizer: of the model.
        data: rows and problems.
        settings: of the losses.
        pad: a list of rows to a batch.
        run: where samples are written.
    """

    config: SftConfig
    tokenizer: PreTrainedTokenizerBase
    data: Data
    settings: LossSettings
    pad: Callable[[list[PackedRow]], dict[str, torch.Tensor]]
    run: RunDirectory

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Returns the held-out losses and, where there are problems, the metrics of free-running generation."""
        model = trainer.model_wrapped
        with evaluation_mode(model):
            metrics = held_out_losses(self._batches(trainer), partial(loss_sums, model, settings=self.settings))
        return metrics | (self._free_run(trainer) if self.data.problems else {})

    def _batches(self, trainer: Trainer) -> Iterator[Batch]:
        """This process's share of the held-out rows; padding fills up, for all processes forward as often."""
        place, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
        rows, size = self.data.held_out.rows, trainer.args.eval_batch_size
        nothing: PackedRow = {name: [] for name in COLUMNS}
        for start in range(0, len(rows), size * count):
            mine = range(start + place * size, min(start + (place + 1) * size, len(rows)))
            batch = self.pad([rows[i] for i in mine] or [nothing])
            yield {name: values.to(trainer.args.device) for name, values in batch.items()}

    def _free_run(self, trainer: Trainer) -> dict[str, float]:
        settings = self.config.evaluation
        done = free_run(
            trainer.model_wrapped,
            self.tokenizer,
            self.data.problems,
            policy=self.config.policy,
            markup=self.config.tokens.markup,
            max_context=settings.max_context,
            max_gen_toks=settings.max_gen_toks,
            batch_size=settings.batch_size,
            shard=not trainer.is_fsdp_enabled,
            progress=True,
        )
        if trainer.is_world_process_zero():
            self.run.add_samples(done.records(trainer.state.global_step))
        return done.metrics
