"""Times engines on equal work: ``scripts/bench.py``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.engines import ENGINES
from bench.shapes import DTYPES, SHAPES
from bench.work import LONG_LIVE, LONG_SCRIPT, Script

if TYPE_CHECKING:
    from bench.engines.contract import Setting
    from bench.floor import FloorTime
    from bench.measure import Measurement
    from bench.prune_events import EventTime

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
which the engines take turns. docs/speed.md tells more.
"""
LONG_ENGINES = ("off", "recompute", "evict")
COMMANDS = ("engines", "prune", "long", "sampling", "guard")
VOCABULARY = 151_936
"""That of Qwen2.5 and Qwen3."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 1 if something failed, 130 if it was interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] not in (["-h"], ["--help"]) and (not given or given[0].startswith("-")):
        given.insert(0, "engines")
    args = make_parser().parse_args(given)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, MemoryError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    """Runs the command that was chosen and counts who else computes meanwhile."""
    from bench.neighbours import Neighbours

    args.neighbours = Neighbours()
    return int(args.action(args))


# --- the command line -------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=SUMMARY, epilog=EXAMPLES + TERMS, formatter_class=form)
    kinds = parser.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")
    examples = EXAMPLES.replace("%(prog)s", parser.prog) + TERMS  # else they would name the command twice
    engines = kinds.add_parser("engines", help="every engine beside the floor", epilog=examples, formatter_class=form)
    _add_engines(engines)
    _add_prune(kinds.add_parser("prune", help="what a prune event costs"))
    long = kinds.add_parser("long", help="a long trace with a short live context", epilog=TERMS, formatter_class=form)
    _add_long(long)
    _add_sampling(kinds.add_parser("sampling", help="what choosing a token costs"))
    guard = kinds.add_parser("guard", help="a short form that fails on ratios")
    guard.set_defaults(action=run_guard)
    _add_threads(guard)
    _add_option(guard)
    return parser


def _add_engines(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=run_engines)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="NAME",
                        help=f"some of {', '.join(ENGINES)} (default: all)")  # fmt: skip
    _add_several(parser, "--batch", [1, 4], "rows side by side")
    _add_script(parser, Script())
    parser.add_argument("--live", dest="lives", type=int, nargs="+", default=[], metavar="TOKENS",
                        help="peak of the pruned context: thoughts as long as fit, in place of --thought")  # fmt: skip
    parser.add_argument("--stagger", action="store_true", help="rows end their blocks in different steps")
    parser.add_argument("--temperature", type=float, default=0.0, help="sample; 0, the default, decodes greedily")
    parser.add_argument("--top-p", type=float, default=1.0, help="with a temperature (%(default)s is off)")
    parser.add_argument("--top-k", type=int, default=0, help="with a temperature (%(default)s is off)")
    parser.add_argument("--check", action="store_true", help="first compare each engine's logits with a plain forward")
    parser.add_argument("--repeats", type=int, default=3,
                        help="timed runs of each engine, after one to warm up (%(default)s)")  # fmt: skip
    _add_common(parser)


def _add_prune(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=run_prune)
    _add_several(parser, "--solution", [4, 16, 64], "tokens of the solution")
    _add_several(parser, "--context", [256, 1024, 4096], "live tokens before")
    _add_several(parser, "--thought", [64, 512, 4096], "tokens thrown away")
    parser.add_argument("--repeats", type=int, default=3,
                        help="events at each place, after one to warm up (%(default)s)")  # fmt: skip
    _add_common(parser)


def _add_long(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=run_long, stagger=False, temperature=0.0, top_p=1.0, top_k=0)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(LONG_ENGINES), metavar="NAME",
                        help=f"the first is the base (default: {' '.join(LONG_ENGINES)})")  # fmt: skip
    _add_several(parser, "--batch", [1, 4, 16], "rows side by side")
    _add_script(parser, LONG_SCRIPT)
    parser.add_argument("--max-live", type=int, default=LONG_LIVE,
                        help="an error if the pruned trace has more live tokens at once (%(default)s)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=1,
                        help="timed runs of each engine; none to warm up (%(default)s)")  # fmt: skip
    _add_common(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=run_sampling)
    _add_several(parser, "--batch", [1, 16], "rows side by side")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens to choose from (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way, after one to warm up (%(default)s)")
    _add_machine(parser)


def _add_several(parser: argparse.ArgumentParser, name: str, default: list[int], meaning: str) -> None:
    shown = " ".join(map(str, default))
    parser.add_argument(name, type=int, nargs="+", default=default, help=f"{meaning} ({shown})")


def _add_script(parser: argparse.ArgumentParser, script: Script) -> None:
    group = parser.add_argument_group("the trace (tokens a row)")
    meaning = {
        "prompt": "of the prompt",
        "tokens": "to generate",
        "thought": "of each thought",
        "solution": "of each solution",
        "text": "between blocks",
    }
    for name, text in meaning.items():
        group.add_argument(f"--{name}", type=int, default=getattr(script, name), help=f"{text} (%(default)s)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="26M", help="size of the model (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (%(default)s)")
    parser.add_argument("--rounded", action="store_true",
                        help="weights with values of bfloat16, as most checkpoints have in any dtype")  # fmt: skip
    _add_machine(parser)
    _add_option(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all measurements here")
    _add_threads(parser)


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
    """``engines``: a table for each batch size."""
    from bench.measure import figures, measure
    from bench.tables import best_table, engine_table

    results: list[dict[str, Any]] = []
    all_made = []
    for setting in _settings(args, args.lives):
        if args.check and not results:
            print(_checks(setting, args.engines))
        with _progress((args.repeats + 1) * (len(args.engines) + 1) - 1) as report:
            found, floors = measure(setting, args.engines, args.repeats, report)
        made = figures(found, floors, setting.work)
        print(engine_table(made, floors, setting.work, sampling=setting.sampling) + "\n")
        all_made.append((setting.work, made))
        results.append(_result(setting, found, floors, made))
    best = best_table(all_made)
    print(best + "\n" if best else "", end="")
    _finish(args, results)
    return 0


def run_long(args: argparse.Namespace) -> int:
    """``long``: the same on a long trace, against the first engine."""
    from bench.long_trace import measure_long
    from bench.measure import figures
    from bench.tables import engine_table

    results, base = [], args.engines[0]
    for setting in _settings(args):
        with _progress((args.repeats + 1) * (len(args.engines) + 1) - 1) as report:
            found, floors = measure_long(setting, args.engines, args.repeats, report, max_live=args.max_live)
        made = figures(found, floors, setting.work, base=base)
        print(engine_table(made, floors, setting.work, base=base))
        print("peak live tokens are those of the simulation, exactly\n")
        results.append(_result(setting, found, floors, made))
    _finish(args, results)
    return 0


def run_prune(args: argparse.Namespace) -> int:
    """``prune``: the curve of prune events."""
    from bench.prune_events import places, time_events
    from bench.shapes import make_model
    from bench.tables import event_table

    model = make_model(args.shape, args.dtype, args.device, args.threads, rounded=args.rounded)
    where = places(args.solution, args.context, args.thought)
    with _progress(len(where)) as report:
        found = time_events(model, where, args.repeats, report, dict(args.option))
    print(event_table(found) + "\n")
    _finish(args, [_event_result(event) for event in found])
    return 0


def run_sampling(args: argparse.Namespace) -> int:
    """``sampling``: a line for each batch and setting."""
    import torch

    from bench.choosing import SETTINGS, time_choices
    from bench.tables import choice_table

    torch.set_num_threads(args.threads)
    with _progress(len(args.batch) * len(SETTINGS)) as report:
        found = time_choices(args.batch, args.vocabulary, torch.device(args.device), args.repeats, report)
    print(f"milliseconds to choose a token of each row, of {args.vocabulary}")
    print(choice_table(found) + "\n")
    _finish(args, [asdict(choice) for choice in found])
    return 0


def run_guard(args: argparse.Namespace) -> int:
    """``guard``: 1 if a ratio is beyond its bound."""
    from bench.guard import guard

    with _progress(None) as report:
        found = guard(report, threads=args.threads, options=dict(args.option))
    print("\n".join(map(str, found)))
    return int(not all(finding.passed for finding in found))


def _settings(args: argparse.Namespace, lives: Sequence[int] = ()) -> Iterator[Setting]:
    """The work of each batch size, and of each live context that is asked for, for one model."""
    from bench.engines.contract import Setting
    from bench.shapes import make_model
    from bench.work import Sampling, fitted, make_work
    from hcot_lmeval.engine.options import read_options

    sampling = Sampling(args.temperature, args.top_p, args.top_k)
    read_options(dict(args.option))
    script = Script(args.tokens, args.prompt, args.thought, args.solution, args.text, args.stagger)
    vocabulary = SHAPES[args.shape]["vocab_size"]
    scripts = [fitted(script, live) for live in lives] or [script]
    # errors come before the model is made
    works = [make_work(batch, one, vocabulary) for batch in args.batch for one in scripts]
    model = make_model(args.shape, args.dtype, args.device, args.threads, rounded=args.rounded)
    for work in works:
        yield Setting(model, work, args.threads, dict(args.option), sampling)


def _checks(setting: Setting, engines: Sequence[str]) -> str:
    from bench.check import check_engines

    with _progress(len(engines)) as report:
        found = check_engines(setting, engines, report)
    told = [f"{d.deviation:.1e} standard deviations" if d.reason == "" else f"not compared: {d.reason}" for d in found]
    lines = [f"  {d.engine}: {text}" for d, text in zip(found, told, strict=True)]
    return "\n".join(["largest difference of a logit from a forward of the live context", *lines]) + "\n"


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar on the standard error; yields what moves it on."""
    from tqdm import tqdm

    with tqdm(total=total, file=sys.stderr, leave=False) as bar:

        def report(doing: str) -> None:
            bar.set_postfix_str(doing)
            bar.update()

        yield report


# --- results ----------------------------------------------------------------------------------------------------------


def _finish(args: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    """Says what the figures were measured with, and writes the file."""
    from bench.facts import machine, versions

    facts = {"versions": versions(), "machine": machine(args.device, args.threads)}
    facts["machine"]["cores used by others"] = f"{args.neighbours.cores():.2f}"
    print(", ".join(f"{name} {value}" for part in facts.values() for name, value in part.items()))
    if warning := args.neighbours.warning():
        print(warning, file=sys.stderr)
    if args.json:
        hidden = ("action", "json", "neighbours")
        arguments = {name: value for name, value in vars(args).items() if name not in hidden}
        args.json.write_text(json.dumps({**facts, "arguments": arguments, "results": list(results)}, indent=1) + "\n")


def _result(
    setting: Setting, found: Iterable[Measurement], floors: Iterable[FloorTime], made: Iterable[Any]
) -> dict[str, Any]:
    return {
        "batch": setting.work.batch,
        "floors": [
            {**asdict(floor), "kind": floor.kind, "seconds": floor.seconds, "memory": floor.memory} for floor in floors
        ],
        "engines": [{**asdict(figures), "runs": _runs(m)} for figures, m in zip(made, found, strict=True)],
    }


def _runs(measurement: Measurement) -> list[dict[str, Any]]:
    return [{"seconds": t.seconds, "step": t.step, "prune": t.prune} for t in measurement.timings]


def _event_result(event: EventTime) -> dict[str, Any]:
    return {**asdict(event.place), "events": event.events, "prefills": event.prefills, "ratio": event.ratio}
