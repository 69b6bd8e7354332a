"""Times engines on equal work: ``scripts/bench.py``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.engines import ENGINES
from bench.models import DTYPES, SHAPES
from bench.output import finish, progress, run
from bench.work import LONG_LIVE, LONG_SCRIPT, Script

if TYPE_CHECKING:
    from bench.engines import Setting
    from bench.floor import FloorTime
    from bench.measure import Measurement

SUMMARY = """\
Times engines on equal work, in one run: models with random weights are made to generate the same scripted tokens.

  engines  every engine beside the floor: tokens/s, ms per step and per prune event, memory (the default)
  prune    what a prune event costs, by the length of solution, context and thought
  long     a trace of 16k tokens with at most 1k of them live, pruned and unpruned
  sampling what choosing a token costs, by batch and settings
  guard    a short form for tests: fails if a ratio is far from what it should be

Each has options of its own; those of the default are listed by `bench.py engines --help`.
"""
EXAMPLES = """\
examples:
  %(prog)s                                                  the shape 26M, batch 1 and 4, all engines
  %(prog)s --shape 0.5B --dtype bfloat16 --batch 1 16 --tokens 256 --engines generate recompute llama.cpp
  %(prog)s --check --engines off recompute llama.cpp        first compare logits with a plain forward
  %(prog)s --shape 0.5B --temperature 0.6 --top-p 0.95 --engines generate recompute llama.cpp
  %(prog)s --option compute=torch --json bench.json
  %(prog)s --device cuda --dtype bfloat16 --shape 1.5B --batch 64 256 --tokens 8192 --live 8192 4096 2048 1024
  %(prog)s prune --context 256 4096 --thought 64 1024
  %(prog)s long --batch 1 4 --tokens 4096

"""
TERMS = """\
"of floor" is the floor's step over the engine's median step (1 is the floor, which streams all weights through bare
matrix products and reads the live keys and values); "of memory" is the same for reading weights, keys and values and
multiplying nothing; "x generate" and "x off" compare whole runs. Ratios are medians of those within each repeat, in
which the engines take turns. docs/benchmark.md tells more.
"""
COMMANDS = ("engines", "prune", "long", "sampling", "guard")
LONG_ENGINES = ("off", "recompute", "evict")
TRACE = {
    "prompt": "of the prompt",
    "tokens": "to generate",
    "thought": "of each thought",
    "solution": "of each solution",
    "text": "between blocks",
}
"""Fields of `Script` -> what they count."""
VOCABULARY = 151_936
"""That of Qwen2.5 and Qwen3."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 1 if something failed, 130 if it was interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] not in (["-h"], ["--help"]) and (not given or given[0].startswith("-")):
        given.insert(0, "engines")
    args = make_parser().parse_args(given)
    from bench.machine import OtherLoad

    args.load = OtherLoad()
    return run(args.action, args)


# --- the command line -------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=SUMMARY, epilog=EXAMPLES + TERMS, formatter_class=form)
    kinds = parser.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")
    examples = EXAMPLES.replace("%(prog)s", parser.prog) + TERMS  # else they would name the command twice
    engines = kinds.add_parser("engines", help="every engine beside the floor", epilog=examples, formatter_class=form)
    _add_engines(engines, Script(), ENGINES, [1, 4], repeats=3)
    long = kinds.add_parser("long", help="a long trace with a short live context", epilog=TERMS, formatter_class=form)
    _add_engines(long, LONG_SCRIPT, LONG_ENGINES, [1, 4, 16], repeats=1)
    long.set_defaults(base=None)
    long.add_argument("--max-live", type=int, default=LONG_LIVE,
                      help="an error if the pruned trace has more live tokens at once (%(default)s)")  # fmt: skip
    prune = kinds.add_parser("prune", help="what a prune event costs")
    prune.set_defaults(action=run_prune)
    _add_several(prune, "--solution", [4, 16, 64], "tokens of the solution")
    _add_several(prune, "--context", [256, 1024, 4096], "live tokens before")
    _add_several(prune, "--thought", [64, 512, 4096], "tokens thrown away")
    _add_model(prune, repeats=3)
    sampling = kinds.add_parser("sampling", help="what choosing a token costs")
    sampling.set_defaults(action=run_sampling)
    _add_several(sampling, "--batch", [1, 16], "rows side by side")
    sampling.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens to choose from (%(default)s)")
    _add_machine(sampling, repeats=3)
    guard = kinds.add_parser("guard", help="a short form that fails on ratios")
    guard.set_defaults(action=run_guard)
    _add_threads(guard)
    _add_option(guard)
    return parser


def _add_engines(
    parser: argparse.ArgumentParser, script: Script, engines: Iterable[str], batch: list[int], *, repeats: int
) -> None:
    parser.set_defaults(action=run_engines, base="generate", max_live=None)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(engines), metavar="NAME",
                        help=f"some of {', '.join(ENGINES)} (default: {' '.join(engines)})")  # fmt: skip
    _add_several(parser, "--batch", batch, "rows side by side")
    group = parser.add_argument_group("the trace (tokens a row)")
    for name, text in TRACE.items():
        group.add_argument(f"--{name}", type=int, default=getattr(script, name), help=f"{text} (%(default)s)")
    parser.add_argument("--live", dest="lives", type=int, nargs="+", default=[], metavar="TOKENS",
                        help="peak of the pruned context: thoughts as long as fit, in place of --thought")  # fmt: skip
    parser.add_argument("--stagger", action="store_true", help="rows end their blocks in different steps")
    parser.add_argument("--temperature", type=float, default=0.0, help="sample; 0, the default, decodes greedily")
    parser.add_argument("--top-p", type=float, default=1.0, help="with a temperature (%(default)s is off)")
    parser.add_argument("--top-k", type=int, default=0, help="with a temperature (%(default)s is off)")
    parser.add_argument("--check", action="store_true", help="first compare each engine's logits with a plain forward")
    _add_model(parser, repeats=repeats)


def _add_several(parser: argparse.ArgumentParser, name: str, default: list[int], meaning: str) -> None:
    shown = " ".join(map(str, default))
    parser.add_argument(name, type=int, nargs="+", default=default, help=f"{meaning} ({shown})")


def _add_model(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="26M", help="size of the model (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (%(default)s)")
    parser.add_argument("--rounded", action="store_true",
                        help="weights with values of bfloat16, as most checkpoints have in any dtype")  # fmt: skip
    _add_machine(parser, repeats=repeats)
    _add_option(parser)


def _add_machine(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    _add_threads(parser)
    parser.add_argument("--repeats", type=int, default=repeats,
                        help="timed runs, by turns, after one to warm up (%(default)s; long: without)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all measurements here")


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (%(default)s)")


def _add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--option", action="append", default=[], type=_option, metavar="NAME=VALUE",
                        help="a field of EngineOptions for our own engine, such as compute=torch")  # fmt: skip


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    words = {"true": True, "false": False, "none": None}
    return name, int(value) if value.isdigit() else words.get(value.lower(), value)


# --- the commands -----------------------------------------------------------------------------------------------------


def run_engines(args: argparse.Namespace) -> int:
    """``engines`` and ``long``: a table for each batch size; ``long`` compares with the first engine."""
    from bench.measure import figures, measure
    from bench.tables import best_table, engine_table

    base, results = args.base or args.engines[0], list[dict[str, Any]]()
    all_made = []
    for setting in _settings(args):
        if args.check and not results:
            print(_checks(setting, args.engines))
        with progress((args.repeats + 1) * (len(args.engines) + 1) - 1) as report:
            warm_up = args.max_live is None
            found, floors = measure(setting, args.engines, args.repeats, report, warm_up=warm_up)
        made = figures(found, floors, setting.work, base=base)
        print(engine_table(made, floors, setting.work, base=base, sampling=setting.sampling) + "\n")
        all_made.append((setting.work, made))
        results.append(_result(setting, found, floors, made))
    best = best_table(all_made, base=base)
    print(best + "\n" if best else "", end="")
    finish(args, args.threads, {"results": results})
    return 0


def run_prune(args: argparse.Namespace) -> int:
    """``prune``: the curve of prune events."""
    from bench.models import make_model
    from bench.prune_events import places, time_events
    from bench.tables import event_table

    model = make_model(args.shape, args.dtype, args.device, args.threads, rounded=args.rounded)
    where = places(args.solution, args.context, args.thought)
    with progress(len(where)) as report:
        found = time_events(model, where, args.repeats, report, dict(args.option))
    print(event_table(found) + "\n")
    finish(args, args.threads, {"results": [event.as_dict() for event in found]})
    return 0


def run_sampling(args: argparse.Namespace) -> int:
    """``sampling``: a line for each batch and setting."""
    import torch

    from bench.choosing import SETTINGS, time_choices
    from bench.tables import choice_table

    torch.set_num_threads(args.threads)
    with progress(len(args.batch) * len(SETTINGS)) as report:
        found = time_choices(args.batch, args.vocabulary, torch.device(args.device), args.repeats, report)
    print(f"milliseconds to choose a token of each row, of {args.vocabulary}")
    print(choice_table(found) + "\n")
    finish(args, args.threads, {"results": [asdict(choice) for choice in found]})
    return 0


def run_guard(args: argparse.Namespace) -> int:
    """``guard``: 1 if a ratio is beyond its bound."""
    from bench.guard import guard

    with progress(None) as report:
        found = guard(report, args.threads, dict(args.option))
    print("\n".join(map(str, found)))
    return int(not all(finding.passed for finding in found))


def _settings(args: argparse.Namespace) -> Iterator[Setting]:
    """The work of each batch size, and of each live context that is asked for, for one model."""
    from bench.engines import Setting
    from bench.models import make_model
    from bench.work import Sampling, fitted, make_work
    from hcot_lmeval.engine.options import read_options

    sampling = Sampling(args.temperature, args.top_p, args.top_k)
    read_options(dict(args.option))
    script = Script(stagger=args.stagger, **{name: getattr(args, name) for name in TRACE})
    vocabulary = SHAPES[args.shape]["vocab_size"]
    scripts = [fitted(script, live) for live in args.lives] or [script]
    # errors come before the model is made
    works = [make_work(batch, one, vocabulary) for batch in args.batch for one in scripts]
    for peak in (work.peak_live("recompute") for work in works if args.max_live is not None):
        if peak > args.max_live:
            raise ValueError(
                f"the pruned trace has {peak} live tokens at its peak, more than --max-live {args.max_live}; "
                "lower --prompt, --thought, --solution or --text, or allow more"
            )
    model = make_model(args.shape, args.dtype, args.device, args.threads, rounded=args.rounded)
    for work in works:
        yield Setting(model, work, args.threads, dict(args.option), sampling)


def _checks(setting: Setting, engines: Sequence[str]) -> str:
    from bench.check import check_engines

    with progress(len(engines)) as report:
        found = check_engines(setting, engines, report)
    lines = [
        f"  {name}: {f'not compared: {gap}' if isinstance(gap, str) else f'{gap:.1e} standard deviations'}"
        for name, gap in found.items()
    ]
    return "\n".join(["largest difference of a logit from a forward of the live context", *lines]) + "\n"


def _result(
    setting: Setting, found: Iterable[Measurement], floors: Iterable[FloorTime], made: Iterable[Any]
) -> dict[str, Any]:
    return {
        "batch": setting.work.batch,
        "floors": [
            {**asdict(floor), "kind": floor.kind, "seconds": floor.seconds, "memory": floor.memory} for floor in floors
        ],
        "engines": [
            {**asdict(f), "runs": [{"seconds": t.seconds, "step": t.step, "prune": t.prune} for t in m.timings]}
            for f, m in zip(made, found, strict=True)
        ],
    }
