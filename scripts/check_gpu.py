"""Checks the engine's path for GPUs on this machine; see ``python scripts/check_gpu.py --help``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cli import finish, progress

from hcot_lmeval.errors import run_command

SUMMARY = """\
Checks the engine's path for GPUs on this machine. The order is that in which to trust it:

  probes    every attention backend against the textbook in double precision, NaN around everything in sight
  identity  tokens of the device's loop against full recomputation with the model's own forward, float32, every policy;
            as CUDA graphs and kernel by kernel, solutions read again in one piece and token by token

Without CUDA it runs on the CPU and says what was left out. The exit status is 1 if a probe is wrong or a token differs.
`bench.py --device cuda` times what was checked.
"""
EXAMPLES = """\
examples:
  %(prog)s                                               everything (minutes)
  %(prog)s --only identity --compiled                    compiled steps too (many minutes)
"""
LEFT_OUT = (
    "all checks passed that a CPU can run. Left out, for want of CUDA: the flash kernels, compiled Triton, CUDA "
    "graphs, streams and asynchronous copies"
)
Result = tuple[list[dict[str, Any]], bool]
"""What is written, and whether all is well."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 1 if something is wrong, 130 if it was interrupted."""
    args = make_parser().parse_args(argv)
    return run_command(lambda: check(args), extra="dev")


def make_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=SUMMARY, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    parser.add_argument("--rows", type=int, help="rows of each identity check (16; 4 on the CPU)")
    parser.add_argument("--tokens", type=int, help="tokens of each of them (160; 60 on the CPU)")
    parser.add_argument("--compiled", action="store_true", help="check compiled steps, too")
    return parser


def check(args: argparse.Namespace) -> int:
    """Runs the parts, prints their tables, and returns the exit status."""
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device, results, failed = torch.device(args.device), {}, False
    for part in (part for part in PARTS if part in args.only):
        results[part], passed = PARTS[part](args, device)
        failed |= not passed
    finish(args, torch.get_num_threads(), {**results, "failed": failed})
    right = "all checks passed" if device.type == "cuda" else LEFT_OUT
    print("something is wrong, see above" if failed else right)
    return int(failed)


def run_probes(args: argparse.Namespace, device: Any) -> Result:
    """A line for each backend and kind of layer."""
    from bench.gpu import MAKERS, layers, probe_all

    found = watched(probe_all(device), len(MAKERS) * len(layers(device)), lambda p: f"{p.backend}: {p.layer}")
    rows = [[p.backend, p.layer, *(f"{error:.1e}" for error in p.errors)] for p in found if p.errors]
    notes = Counter(f"{p.backend}: {'not run' if p.passed else 'FAILED'}: {p.reason}" for p in found if p.reason)
    notes += Counter(f"{p.backend}: WRONG on {p.layer}" for p in found if p.errors and not p.passed)
    show("probes: largest error, relative to the largest entry", ["backend", "layer", "decode", "chunk"], rows)
    print("\n".join([*(f"{note} ({count} layers)" for note, count in notes.items()), ""]))
    return [asdict(p) for p in found], all(p.passed for p in found)


def run_identity(args: argparse.Namespace, device: Any) -> Result:
    """A line for each model, policy and way to run."""
    from bench.gpu import KINDS, compare_all, ways

    from hcot_lmeval.trace import Policy

    rows, tokens = (16, 160) if device.type == "cuda" else (4, 60)
    total = len(KINDS) * len(Policy) * len(ways(device, compiled=args.compiled))
    each = {"rows": args.rows or rows, "tokens": args.tokens or tokens, "compiled": args.compiled}
    found = watched(compare_all(device, KINDS, **each), total, lambda f: f"{f.kind} {f.policy}")
    heads = ["model", "policy", "tokens", "prunes", "mismatches", "way"]
    told = [(f, " ".join(f"{name}={value}" for name, value in f.way.items())) for f in found]
    lines = [[f.kind, f.policy, f.tokens, f.prunes, f.mismatches, way] for f, way in told]
    show("identity: tokens of the loop that the slow twin would not have chosen", heads, lines)
    return [{**asdict(f), "passed": f.passed} for f in found], all(f.passed for f in found)


PARTS: dict[str, Callable[[argparse.Namespace, Any], Result]] = {"probes": run_probes, "identity": run_identity}


def watched(results: Iterable[Any], total: int, name: Callable[[Any], str]) -> list[Any]:
    """Returns all results, with a bar on the standard error while they come."""
    found = []
    with progress(total) as report:
        for result in results:
            found.append(result)
            report(name(result))
    return found


def show(heading: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from tabulate import tabulate

    print(f"{heading}\n{tabulate(rows, heads, 'simple', disable_numparse=True)}\n")


if __name__ == "__main__":
    sys.exit(main())
