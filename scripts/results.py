"""Makes docs/results from the bundled models: tables, plots, and a page of traces. Nothing on it is written by hand.

python scripts/results.py                         # what is finished in runs/results is not run again
python scripts/results.py --work DIR --page DIR
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout runs without being installed

GRID = ROOT / "scripts" / "configs" / "compare-results.yaml"
BASELINE = "tiny-flat, off"
TRACES = 12
LIBRARIES = ("torch", "transformers", "lm_eval", "hcot_lmeval")
PLOTS = {
    "accuracy": "Accuracy by context window",
    "completion": "Responses that ended by themselves, by context window",
    "accuracy-live": "Answered right within so many live tokens",
    "accuracy-generated": "Answered right within so many generated tokens",
    "live-context": "The live context while one problem is solved",
    "blocks": "Lengths of thoughts and solutions, and depth",
}
HEAD = """# Results of the bundled models

Made by `make results` ({machine}; {versions}); the grid is
[compare-results.yaml](../../scripts/configs/compare-results.yaml), every number is defined below its table. Times are
of a machine that had other work too, so small differences between them mean nothing.

`tiny-hcot` and `tiny-evict` were trained on hierarchical traces under the policies recompute and evict, `tiny-flat` on
the same steps written flat ([trained.md](../trained.md)). With pruning off `tiny-hcot` runs in contexts that it was not
trained on: that row says what the pruning is to this model.

[traces.html](traces.html) holds {traces} problems as `tiny-hcot` solved them, pruned and unpruned side by side; it
opens in a browser, from disk.
"""


def main() -> int:
    args = parse_args()
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}.items():
        os.environ.setdefault(name, value)
    from hcot_lmeval.report.cli import main as compare

    status = compare(["run", str(GRID), "--out", str(args.work), "--baseline", BASELINE])
    if status:
        return status
    args.page.mkdir(parents=True, exist_ok=True)
    (args.page / "README.md").write_text(page(args.work), encoding="utf-8")
    for plot in sorted(args.work.glob("*.svg")):
        shutil.copy(plot, args.page)
    return traces(args.work, args.page / "traces.html")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/results"), help="folder of the evaluations")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results", help="folder of the page")
    return parser.parse_args()


def page(work: Path) -> str:
    """Returns the page in Markdown: where it comes from, the tables, the plots."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    head = HEAD.format(machine=machine, versions=versions, traces=TRACES)
    tables = (work / "comparison.md").read_text(encoding="utf-8")
    plots = [
        f"### {title}\n\n![{title}]({path.name})\n"
        for name, title in PLOTS.items()
        for path in sorted(work.glob(f"*-{name}.svg"))
    ]
    return "\n".join([head, tables, "## Plots\n", *plots])


def traces(work: Path, out: Path) -> int:
    """Writes the page of traces, two runs side by side."""
    from hcot_lmeval.report.viewer.cli import main as view

    cells = [next((work / "cells").glob(f"*--tiny-hcot--{policy}--128--*")) for policy in ("recompute", "off")]
    sources = [str(cell / "notes") for cell in cells]
    samples = [word for cell in cells for word in ("--samples", str(cell / "results"))]
    problems = [word for doc_id in range(TRACES) for word in ("--doc", str(doc_id))]
    return view([*sources, *samples, *problems, "--out", str(out)])


if __name__ == "__main__":
    sys.exit(main())
