"""Says why a checkpoint loops, breaks the notation or never ends, and whether it is run as it was trained.

    hcot diagnose runs/first/model                    held-out traces of its own training run
    hcot diagnose MODEL --data traces.jsonl           columns question, hierarchical_cot, expected_answer
    hcot diagnose tiny-hcot --pruning evict           is this the policy that it was trained with?
    hcot diagnose MODEL --data "{path: org/data, split: test}" --out report

Gold traces are scored in the contexts of every policy (off, recompute, evict): the model finds them likeliest in those
that it was trained on. Where a marker or an end is due it should be likely; one that never was a target is not. Prompts
and their last white space are checked likewise. Then the model writes by itself, pruned and unpruned.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hcot_lmeval.errors import run_command
from hcot_lmeval.markup import PRESETS
from hcot_lmeval.store import check_folder, write_json
from hcot_lmeval.trace import Policy


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args), extra="report")


def parser() -> argparse.ArgumentParser:
    """Returns the parser; it needs no heavy import."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parse.add_argument
    add("model", metavar="MODEL", help="directory, id on the hub, or tiny-hcot, tiny-evict, tiny-flat")
    add("--data", help="gold traces: file, hub id, synthetic:arith, or a YAML mapping as in the training settings")
    add("--problems", type=int, default=50, help="rows to examine (%(default)s)")
    add("--pruning", choices=[policy.value for policy in Policy], help="policy to run it with (that of its record)")
    add("--markup", choices=sorted(PRESETS), help="notation (that of its record)")
    add("--max-context", type=int, help="live tokens while it writes (what its config allows)")
    add("--max-gen-toks", type=int, help="tokens that it may write (4 x the longest gold trace)")
    add("--max-length", type=int, default=16384, help="tokens forwarded for a gold trace; longer ones are cut")
    add("--batch-size", type=int, default=16, help="responses written side by side (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    add("--dtype", default="auto", help="of the weights (%(default)s)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    add("--out", type=Path, metavar="DIR", help="also write diagnosis.json there")
    add("--quiet", action="store_true", help="no progress bars")
    return parse


def run(args: argparse.Namespace) -> None:
    """Examines a checkpoint and prints what was found.

    Raises:
        ValueError, OSError: it cannot be examined; the message says why.
    """
    if args.problems < 2:
        raise ValueError(f"--problems {args.problems} is too few to compare anything; give 2 or more")
    if args.out:
        check_folder(args.out, f"--out {args.out}", "name another folder")
    from hcot_lmeval.diagnosis import findings, report, subject
    from hcot_lmeval.diagnosis.measure import measure

    subject.check_place(Path(args.model))
    source = subject.source_of(args.model, args.data)
    examined = subject.load(
        args.model, policy=args.pruning, markup=args.markup, device=args.device, dtype=args.dtype,
        trust=args.trust_remote_code,
    )  # fmt: skip
    problems = subject.problems_of(examined, source, args.problems)
    print(f"{args.model}: {len(problems)} rows of {source.path}, to be run with pruning={examined.policy}")
    measured = measure(
        examined,
        problems,
        max_context=args.max_context,
        max_gen_toks=args.max_gen_toks,
        max_length=args.max_length,
        batch_size=args.batch_size,
        show=not args.quiet,
    )
    found = findings.find_all(measured)
    print(f"\n{report.table(measured)}\n\n{report.verdict(found)}")
    if args.out:
        write_json(args.out / "diagnosis.json", report.as_dict(measured, found))
