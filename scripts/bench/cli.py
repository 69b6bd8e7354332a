"""Times engines on equal work, in one run: ``scripts/bench.py``."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.work import DTYPES, ENGINES, SHAPES, Script, Work, fitted, make_work
from hcot_lmeval.errors import run_command

if TYPE_CHECKING:
    from bench.engines import Contender, Setting, Timing

SUMMARY = """\
Times engines on equal work, in one run: models with random weights are made to generate the same scripted tokens, and
take turns. Two parts have options of their own, which `bench.py PART --help` lists:

  prune   what a prune event costs beside a bare forward of as many tokens
  guard   a run of seconds on a tiny model, for tests: fails if a ratio within the run has collapsed
"""
EXAMPLES = """\
examples:
  %(prog)s                                                  the shape 26M, batch 1 and 4, all engines
  %(prog)s --shape 0.5B --dtype bfloat16 --batch 1 16 --tokens 256 --engines generate recompute llama.cpp
  %(prog)s --shape 0.5B --temperature 0.6 --top-p 0.95 --engines generate recompute llama.cpp
  %(prog)s --tokens 16384 --thought 480 --solution 4 --text 2 --engines off recompute evict
  %(prog)s --option compute=torch --json bench.json
  %(prog)s --device cuda --dtype bfloat16 --shape 1.5B --batch 64 256 --tokens 8192 --live 8192 4096 2048 1024
  %(prog)s prune --shape 0.5B --solution 4 64 --context 256 4096

"x generate" compares whole runs of the same work: the median of the ratios within each repeat. "x best" compares with
the best batch of generate. Where that is not among the engines, the first one stands in. docs/benchmark.md tells more.
"""
TRACE = {
    "prompt": "of the prompt",
    "tokens": "to generate",
    "thought": "of each thought",
    "solution": "of each solution",
    "text": "between blocks",
}
"""Fields of `Script` -> what they count."""
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""Kinds of time in which a processor is not free; `steal` is what a virtual machine's host took."""
TOLERABLE = 0.05
"""Cores, of each, that others may use before it is worth a warning; an idle system uses about a hundredth."""

Report = Callable[[str], None]
"""Called with what is being done, once for each run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 1 if something failed, 130 if it was interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    parts = {"prune": make_prune_parser, "guard": make_guard_parser}
    args = parts[given[0]]().parse_args(given[1:]) if given and given[0] in parts else make_parser().parse_args(given)
    return run_command(lambda: args.action(args), extra="dev")


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the comparison of engines."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=SUMMARY, epilog=EXAMPLES, formatter_class=form)
    parser.set_defaults(action=run)
    add = parser.add_argument
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="NAME",
        help=f"some of {', '.join(ENGINES)} (all)")  # fmt: skip
    add("--batch", type=int, nargs="+", default=[1, 4], help="rows side by side (1 4)")
    _add_model(parser)
    trace = parser.add_argument_group("the trace (tokens a row)")
    for name, text in TRACE.items():
        trace.add_argument(f"--{name}", type=int, default=getattr(Script(), name), help=f"{text} (%(default)s)")
    trace.add_argument("--live", dest="lives", type=int, nargs="+", default=[], metavar="TOKENS",
                       help="peak of the pruned context: thoughts as long as fit, in place of --thought")  # fmt: skip
    trace.add_argument("--stagger", action="store_true", help="rows end their blocks in different steps")
    add("--temperature", type=float, default=0.0, help="sample; 0, the default, decodes greedily")
    add("--top-p", type=float, default=1.0, help="with a temperature (%(default)s is off)")
    add("--top-k", type=int, default=0, help="with a temperature (%(default)s is off)")
    return parser


def make_prune_parser() -> argparse.ArgumentParser:
    """Returns the parser of ``prune``."""
    parser = argparse.ArgumentParser(prog="bench.py prune", description="What a prune event costs: its step in the "
        "engine, beside a bare forward of the tokens that it forwards again.")  # fmt: skip
    parser.set_defaults(action=run_prune)
    add = parser.add_argument
    add("--solution", type=_count, nargs="+", default=[4, 16, 64], help="tokens of the solution (4 16 64)")
    add("--context", type=_count, nargs="+", default=[256, 1024, 4096], help="live tokens before (256 1024 4096)")
    add("--thought", type=_count, default=512, help="tokens thrown away (%(default)s)")
    _add_model(parser)
    return parser


def make_guard_parser() -> argparse.ArgumentParser:
    """Returns the parser of ``guard``."""
    parser = argparse.ArgumentParser(
        prog="bench.py guard", description="Fails if a ratio within the run has collapsed."
    )
    parser.set_defaults(action=run_guard)
    _add_engine(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="26M", help="size of the model (%(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    add("--repeats", type=_count, default=3, help="timed runs, by turns, after one to warm up (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write all measurements here")
    _add_engine(parser)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads (%(default)s)")
    add("--option", action="append", default=[], type=_option, metavar="NAME=VALUE",
        help="a field of EngineOptions for our own engine, such as compute=torch")  # fmt: skip


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    words = {"true": True, "false": False, "none": None}
    return name, int(value) if value.isdigit() else words.get(value.lower(), value)


def run(args: argparse.Namespace) -> int:
    """Measures every piece of work and prints the table."""
    load, found = OtherLoad(), list[Measurement]()
    for setting in settings(args):
        with progress((args.repeats + 1) * len(args.engines)) as report:
            found += measure(setting, args.engines, args.repeats, report)
    print(table(found))
    finish(args, args.threads, {"results": [one.as_dict() for one in found]}, load)
    return 0


def run_prune(args: argparse.Namespace) -> int:
    """Times prune events and prints their table."""
    from bench.engines import make_model
    from bench.events import Place, event_table, time_events
    from hcot_lmeval.engine.options import read_options

    read_options(dict(args.option))  # errors come before the model is made
    load = OtherLoad()
    places = [Place(solution, context, args.thought) for solution in args.solution for context in args.context]
    model = make_model(args.shape, args.dtype, args.device, args.threads)
    with progress(len(places)) as report:
        found = time_events(model, places, args.repeats, report, dict(args.option))
    print(event_table(found))
    finish(args, args.threads, {"results": [event.as_dict() for event in found]}, load)
    return 0


def run_guard(args: argparse.Namespace) -> int:
    """Prints the ratios that are guarded; 1 if one is beyond its bound."""
    from bench.events import guard
    from hcot_lmeval.engine.options import read_options

    read_options(dict(args.option))
    with progress(None) as report:
        found = guard(report, args.threads, dict(args.option))
    print("\n".join(map(str, found)))
    return int(not all(finding.passed for finding in found))


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """The work of each batch size, and of each live context that is asked for, for one model."""
    from bench.engines import Setting, make_model
    from hcot_lmeval.engine import SamplingParams
    from hcot_lmeval.engine.options import read_options

    if not args.temperature and (args.top_p < 1 or args.top_k):
        raise ValueError("--top-p and --top-k do nothing at --temperature 0; set a temperature")
    # errors come before the model is made
    params = SamplingParams(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    read_options(dict(args.option))
    script = Script(stagger=args.stagger, **{name: getattr(args, name) for name in TRACE})
    scripts = [fitted(script, live) for live in args.lives] or [script]
    vocabulary = SHAPES[args.shape]["vocab_size"]
    works = [make_work(batch, one, vocabulary) for batch in args.batch for one in scripts]
    model = make_model(args.shape, args.dtype, args.device, args.threads)
    for work in works:
        yield Setting(model, work, args.threads, dict(args.option), params)


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """All runs of one engine on one piece of work; `reason` says why there are none."""

    engine: str
    work: Work
    timings: list[Timing] = field(default_factory=list)
    reason: str = ""

    @property
    def speed(self) -> float | None:
        """Tokens a second of all rows together, prefill included; the median run."""
        if not self.timings or self.reason:
            return None
        return self.work.batch * self.work.tokens / statistics.median(timing.seconds for timing in self.timings)

    def times(self, base: Measurement | None) -> float | None:
        """How many times as fast as another on this work: the median of the ratios within each repeat."""
        if base is None or base.reason or self.reason:
            return None
        return statistics.median(b.seconds / a.seconds for a, b in zip(self.timings, base.timings, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Everything by name."""
        seconds = [timing.seconds for timing in self.timings]
        peak = self.timings[0].peak_live if self.timings else None
        facts = {"engine": self.engine, "batch": self.work.batch, "peak_live": peak, "seconds": seconds}
        return facts | {"tokens_per_second": self.speed, "reason": self.reason}


class WrongTokensError(RuntimeError):
    """An engine did not generate what the script says, or held another number of tokens than the rule says."""


def measure(setting: Setting, engines: Sequence[str], repeats: int, report: Report) -> list[Measurement]:
    """Runs every engine once to warm up, then `repeats` times, taking turns; one measurement for each, in order.

    Raises:
        WrongTokensError: an engine did other work than it was given.
    """
    from bench.engines import UnavailableError, prepare

    found = {name: Measurement(name, setting.work) for name in engines}
    ready: dict[str, Contender] = {}
    try:
        for number in range(repeats + 1):
            for name, one in found.items():
                report(f"{name}: {number or 'warm-up'}")
                if one.reason:
                    continue
                try:
                    contender = ready[name] if name in ready else ready.setdefault(name, prepare(name, setting))
                    timing = checked_run(name, contender)
                except UnavailableError as error:
                    one.reason = str(error)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    one.reason = f"out of memory: {str(error).splitlines()[0]}"
                else:
                    one.timings += [timing] if number else []
    finally:
        for contender in ready.values():
            contender.close()
    return list(found.values())


def is_out_of_memory(error: Exception) -> bool:
    """Whether work did not fit into memory; what was taken on CUDA is given back for the others."""
    import torch

    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return False
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return True


def checked_run(name: str, contender: Contender) -> Timing:
    """Runs an engine once.

    Raises:
        WrongTokensError: it did other work than it was given.
    """
    work, timing = contender.setting.work, contender.run()
    if timing.tokens != work.traces:
        raise WrongTokensError(f"{name} did not generate the tokens of the script")
    expected = work.peak_live(contender.policy)
    if timing.peak_live != expected:
        raise WrongTokensError(
            f"{name} held {timing.peak_live} tokens of a row at most; under policy {contender.policy} it is {expected}"
        )
    return timing


def table(found: Sequence[Measurement]) -> str:
    """Returns a row for each engine and piece of work, and why others did not run."""
    from tabulate import tabulate

    base = "generate" if any(one.engine == "generate" for one in found) else found[0].engine
    bases = {id(one.work): one for one in found if one.engine == base}
    best = max(one.speed or 0.0 for one in bases.values())
    heads = ["engine", "batch", "tokens", "peak live", "tokens/s", f"x {base}", f"x best {base}"]
    rows = [
        [one.engine, one.work.batch, one.work.tokens, one.timings[0].peak_live, f"{one.speed:.1f}",
         _ratio(one.times(bases[id(one.work)])), _ratio(one.speed / best if best else None)]
        for one in found if one.speed
    ]  # fmt: skip
    notes = [f"{one.engine}, batch {one.work.batch}: not run: {one.reason}" for one in found if one.reason]
    if not any(one.work.prunes for one in found):
        notes.append("nothing is pruned: no row generates as far as its first return")
    aligned = ("left", *["right"] * 6)
    return "\n".join([tabulate(rows, heads, "simple", colalign=aligned, disable_numparse=True), *notes])


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# --- around it --------------------------------------------------------------------------------------------------------


class OtherLoad:
    """Counts the processors' time that was used by neither this process nor its children, from its making on."""

    def __init__(self) -> None:
        import psutil

        self._psutil, self._process = psutil, psutil.Process()
        self._others, self._time = self._read(), time.perf_counter()

    def _read(self) -> float:
        everyone, own = self._psutil.cpu_times(), self._process.cpu_times()
        return sum(getattr(everyone, kind, 0.0) for kind in BUSY) - sum(own[:4])

    def cores(self) -> float:
        """Returns how many cores others kept busy on average."""
        return max(0.0, self._read() - self._others) / max(time.perf_counter() - self._time, 1e-9)


@contextmanager
def progress(total: int | None) -> Iterator[Report]:
    """A bar on the standard error; yields what moves it on."""
    from tqdm import tqdm

    with tqdm(total=total, file=sys.stderr, leave=False) as bar:

        def report(doing: str) -> None:
            bar.set_postfix_str(doing)
            bar.update()

        yield report


def finish(args: argparse.Namespace, threads: int, results: dict[str, Any], load: OtherLoad | None = None) -> None:
    """Prints what the figures were measured with, and writes the file if `args.json` names one."""
    from hcot_lmeval.provenance import machine, versions

    facts = {"versions": versions(), "machine": machine(args.device, threads)}
    if load is not None:
        used, cores = load.cores(), os.cpu_count() or 1
        facts["machine"]["cores used by others"] = f"{used:.2f}"
        if used > TOLERABLE * cores:
            print(
                f"warning: others used {used:.1f} of {cores} cores meanwhile. Steps wait for their slowest thread, so "
                "times are too long and ratios off: measure again when nothing else runs.",
                file=sys.stderr,
            )
    print(", ".join(f"{name} {value}" for part in facts.values() for name, value in part.items()))
    if args.json:
        arguments = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({**facts, "arguments": arguments, **results}, indent=1, default=str) + "\n")
