"""Write the YAML files of the PolyMath tasks.

    python scripts/make_polymath_tasks.py           # write tasks/polymath/*.yaml
    python scripts/make_polymath_tasks.py --check   # change nothing; exit 1 if a file differs, is missing or is extra

The prompt and the generation settings stand in tasks/polymath/_polymath_yaml and _sampled_yaml, written by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "tasks" / "polymath"
HEADER = "# Written by scripts/make_polymath_tasks.py; change that script instead.\n"
GROUP_REPEATS = tuple(2**i for i in range(7))
"""The k for which a group averages avg@k, pass@k and maj@k; names that no task reports are left out by lm-eval."""

GENERATION = (
    *("unchecked", "boxed", "completed", "generated_tokens", "pruned_share", "peak_live_tokens"),
    *("illegal_tokens", "unclosed_blocks", "forced_tokens", "loops"),
)
LANGUAGE = ("lang_answer", "lang_thinking")


def task_file(name: str, base: str, **fields: str) -> str:
    lines = [f"include: {base}", f"task: {name}", *(f"{key}: {value}" for key, value in fields.items())]
    return HEADER + "\n".join(lines) + "\n"


def group_file(name: str, tasks: list[str], metrics: list[str]) -> str:
    members = "".join(f"  - {task}\n" for task in tasks)
    # every member counts the same, whatever its number of problems
    means = "".join(f"  - metric: {metric}\n    weight_by_size: false\n" for metric in metrics)
    return f"{HEADER}group: {name}\ntask:\n{members}aggregate_metric_list:\n{means}metadata:\n  version: 1.0\n"


def task_files(languages: list[str], levels: tuple[str, ...]) -> dict[str, str]:
    files = {}
    for language in languages:
        name = f"polymath_{language}"
        files[name] = task_file(name, "_polymath_yaml", dataset_name=language)
        files[f"{name}_avg"] = task_file(f"{name}_avg", "_sampled_yaml", dataset_name=language)
        for level in levels:
            fields = {"dataset_name": language, "test_split": level}
            files[f"{name}_{level}"] = task_file(f"{name}_{level}", "_polymath_yaml", **fields)
    return files


def group_files(languages: list[str], levels: tuple[str, ...]) -> dict[str, str]:
    def members(suffix: str) -> list[str]:
        return [f"polymath_{language}{suffix}" for language in languages]

    repeated = [f"{kind}@{k}" for kind in ("avg", "pass", "maj") for k in GROUP_REPEATS if (kind, k) != ("pass", 1)]
    shared = [*GENERATION, *LANGUAGE]
    groups = {"polymath": (members(""), ["acc", "dw_acc", *shared])}
    groups["polymath_avg"] = (members("_avg"), [*repeated, "dw_acc", *shared])
    groups |= {f"polymath_{level}": (members(f"_{level}"), ["acc", *shared]) for level in levels}
    return {name: group_file(name, *rest) for name, rest in groups.items()}


def render() -> dict[str, str]:
    """Returns file name → content of every generated file."""
    from hcot_lmeval.scoring.aggregate import LEVELS
    from hcot_lmeval.scoring.instructions import default_instructions

    languages = sorted(default_instructions())
    files = task_files(languages, LEVELS) | group_files(languages, LEVELS)
    return {f"{name}.yaml": text for name, text in files.items()}


def differences(files: dict[str, str], folder: Path) -> list[str]:
    """Returns the names of the files that are not on disk as rendered, and of those that nobody rendered."""
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.yaml")}
    return sorted(name for name in files.keys() | on_disk.keys() if files.get(name) != on_disk.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the YAML files of the PolyMath tasks.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the files are out of date")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files stand (default: %(default)s)")
    args = parser.parse_args()
    files = render()
    stale = differences(files, args.folder)
    if args.check:
        print("\n".join(f"out of date: {name}" for name in stale) or f"{len(files)} files are up to date")
        return int(bool(stale))
    for name in stale:
        if name in files:
            (args.folder / name).write_text(files[name], encoding="utf-8")
        else:
            (args.folder / name).unlink()
    print(f"{len(files)} files, {len(stale)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
