"""Checks the path for GPUs on the machine at hand: ``scripts/check_gpu.py``."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.models import DTYPES, SHAPES
from bench.output import aligned, finish, progress, run

if TYPE_CHECKING:
    import torch

SUMMARY = """\
Checks the engine's path for GPUs on this machine and times it. The order is that in which to trust it:

  probes    every attention backend against the textbook in double precision, NaN around everything in sight
  identity  tokens of the device's loop against full recomputation with the model's own forward, float32, every policy;
            as CUDA graphs and kernel by kernel (with L2 among the levels compiled too), solutions read again in one
            piece and token by token
  steps     ms per step kernel by kernel (L0), as CUDA graphs (L1), compiled (L2), beside the bandwidth floor

Without CUDA it runs a tiny model on the CPU and says what was left out. The exit status is 1 if a probe is wrong, a
token differs or a step cannot be captured.
"""
EXAMPLES = """\
examples:
  %(prog)s                                               everything, L0 and L1 (minutes)
  %(prog)s --levels L0 L1 L2 --json check_gpu.json       compiled steps too (many minutes)
  %(prog)s --only probes identity
  %(prog)s --only steps --batch 64 256 --live 8192 4096 2048 1024
"""
PARTS = ("probes", "identity", "steps")
LEVELS = ("L0", "L1", "L2")
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "rows": (16, 4),
    "tokens": (160, 60),
    "shape": ("1.5B", "tiny"),
    "dtype": ("bfloat16", "float32"),
    "batch": ([1, 8, 64, 256], [2]),
    "live": ([1024, 8192], [64]),
    "steps": (64, 4),
}
"""Values on CUDA, and on the CPU."""
LEFT_OUT = (
    "all checks passed that a CPU can run. Left out, for want of CUDA: the flash kernels, compiled Triton, CUDA "
    "graphs, streams and asynchronous copies, steps L1 and L2"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 1 if something is wrong, 130 if it was interrupted."""
    return run(check, make_parser().parse_args(argv))


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=SUMMARY, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    parser.add_argument("--rows", type=int, help="rows of each identity check (16; 4 on the CPU)")
    parser.add_argument("--tokens", type=int, help="tokens of each of them (160; 60 on the CPU)")
    parser.add_argument("--shape", choices=SHAPES, help="of the model that is timed (1.5B; tiny on the CPU)")
    parser.add_argument("--dtype", choices=DTYPES, help="of that model (bfloat16; float32 on the CPU)")
    parser.add_argument("--batch", type=int, nargs="+", help="rows side by side (1 8 64 256; 2 on the CPU)")
    parser.add_argument("--live", type=int, nargs="+", help="live tokens of a row (1024 8192; 64 on the CPU)")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=["L0", "L1"], help="(default: L0 L1)")
    parser.add_argument("--steps", type=int, help="that are timed together (64; 4 on the CPU)")
    return parser


def check(args: argparse.Namespace) -> int:
    """Runs the parts, prints their tables, and returns the exit status."""
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device, results, failed = torch.device(args.device), {}, False
    for name, (on_cuda, on_cpu) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, on_cuda if device.type == "cuda" else on_cpu)
    for part in (part for part in PARTS if part in args.only):
        results[part], passed = {"probes": run_probes, "identity": run_identity, "steps": run_steps}[part](args, device)
        failed |= not passed
    finish(args, torch.get_num_threads(), {**results, "failed": failed})
    right = "all checks passed" if device.type == "cuda" else LEFT_OUT
    print("something is wrong, see above" if failed else right)
    return int(failed)


Result = tuple[list[dict[str, Any]], bool]
"""What is written, and whether all is well."""


def run_probes(args: argparse.Namespace, device: torch.device) -> Result:
    """``probes``: a line for each backend and kind of layer."""
    from bench.gpu.probes import layers, probe_all
    from hcot_lmeval.engine.device.choice import MAKERS

    found = _watched(probe_all(device), len(MAKERS) * len(layers(device)), lambda p: f"{p.backend}: {p.layer}")
    rows = [["backend", "layer", "decode", "chunk"]]
    rows += [[p.backend, p.layer, *(f"{error:.1e}" for error in p.errors)] for p in found if p.errors]
    notes = Counter(f"{p.backend}: {'not run' if p.passed else 'FAILED'}: {p.reason}" for p in found if p.reason)
    notes += Counter(f"{p.backend}: WRONG on {p.layer}" for p in found if p.errors and not p.passed)
    counted = [f"{note} ({count} layers)" for note, count in notes.items()]
    _print("probes: largest error, relative to the largest entry", rows, counted)
    return [asdict(p) for p in found], all(p.passed for p in found)


def run_identity(args: argparse.Namespace, device: torch.device) -> Result:
    """``identity``: a line for each model, policy and way to run."""
    from bench.gpu.identity import KINDS, compare_all, ways
    from hcot_lmeval.trace import Policy

    compiled = "L2" in args.levels
    total = len(KINDS) * len(Policy) * len(ways(device, compiled=compiled))
    results = compare_all(device, KINDS, rows=args.rows, tokens=args.tokens, compiled=compiled)
    found = _watched(results, total, lambda f: f"{f.kind} {f.policy}")
    rows = [["model", "policy", "tokens", "prunes", "mismatches", "way"]]
    for f in found:
        way = " ".join(f"{name}={value}" for name, value in f.way.items())
        rows.append([f.kind, f.policy, str(f.tokens), str(f.prunes), str(f.mismatches), way])
    _print("identity: tokens of the loop that the slow twin would not have chosen", rows)
    return [{**asdict(f), "passed": f.passed} for f in found], all(f.passed for f in found)


def run_steps(args: argparse.Namespace, device: torch.device) -> Result:
    """``steps``: a line for each level, batch and live length."""
    from bench.gpu.steps import time_levels
    from bench.models import make_model

    model = make_model(args.shape, args.dtype, str(device))
    figures = time_levels(model, args.levels, args.batch, args.live, steps=args.steps)
    total = len(args.levels) * len(args.batch) * len(args.live)
    found = _watched(figures, total, lambda f: f"{f.level} batch {f.batch} live {f.live}")
    rows = [["level", "batch", "live", "ms/step", "tokens/s", "floor ms", "of floor", "attention"]]
    for f in (f for f in found if f.ms):
        times = f"{f.ms:.3f}", f"{1000 * f.batch / f.ms:.0f}", f"{f.floor_ms:.3f}", f"{f.of_floor:.2f}"
        rows.append([f.level, str(f.batch), str(f.live), *times, f.backend])
    notes = [f"{f.level}, batch {f.batch}, live {f.live}: not run: {f.reason}" for f in found if f.reason]
    _print(f"steps: {args.shape}, {args.dtype}; contexts grow by the {args.steps} steps that are timed", rows, notes)
    return [{**asdict(f), "of_floor": f.of_floor} for f in found], not any(f.failed for f in found)


def _watched(results: Iterable[Any], total: int, name: Callable[[Any], str]) -> list[Any]:
    """All results, with a bar on the standard error while they come."""
    found = []
    with progress(total) as report:
        for result in results:
            found.append(result)
            report(name(result))
    return found


def _print(heading: str, rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    print("\n".join([heading, *aligned(rows), *notes, ""]))
