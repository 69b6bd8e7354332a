"""Plants mistakes in small models and lets `diagnose` name them: does it find what is wrong, and nothing else?

    python scripts/studies/diagnosis.py                        # 5 trainings of two minutes, 9 diagnoses
    python scripts/studies/diagnosis.py --out study --steps 1500

The mistakes are those that people make: the prompt in the loss, the end token masked out of it, a marker that was never
a target, a record that names another policy, a template with one more blank than in training, and running a model under
another policy than its own. Everything else is as in ``scripts/configs/first.yaml``. Finished trainings are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_runs

DATA = tiny_runs.arith(200, "validation")


def main() -> None:
    args = parse_args()
    for mistake in TRAINED:
        train(mistake, args)
    rows = [(case, diagnose(case, args)) for case in CASES]
    table = markdown(rows)
    (args.out / "results.md").write_text(table + "\n")
    print(f"\n{table}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study_diagnosis"), help="directory of models and results")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps of a training")
    parser.add_argument("--problems", type=int, default=60, help="held-out problems of a diagnosis")
    return parser.parse_args()


# --- trainings with a mistake -----------------------------------------------------------------------------------------


def prompt_in_the_loss(document: Any, example: Any, grammar: Any) -> Any:
    """The prompt's own tokens are targets too."""
    last = len(example.prompt_ids) - 1
    return replace(document, targets=[*document.ids[1 : last + 1], *document.targets[last:]])


def without_target(document: Any, token: int) -> Any:
    return replace(document, targets=[-100 if target == token else target for target in document.targets])


def end_masked(document: Any, example: Any, grammar: Any) -> Any:
    """The end token is no target, as where it is the padding token too and all padding is masked."""
    [end] = grammar.eos_ids
    return without_target(document, end)


def split_masked(document: Any, example: Any, grammar: Any) -> Any:
    """[SOLUTION] is no target."""
    return without_target(document, grammar.markers.split)


TRAINED: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "prompt in the loss": prompt_in_the_loss,
    "end masked": end_masked,
    "marker masked": split_masked,
    "with a template": None,
}
"""Mistake of a training -> what it does to a compiled document."""


def train(mistake: str, args: argparse.Namespace) -> None:
    """Trains a model with a mistake, unless an earlier call did."""
    output = place(mistake, args)
    with planted(mistake):
        start = with_template(output) if mistake == "with a template" else {}
        tiny_runs.train(output, args.steps, **start)


@contextmanager
def planted(mistake: str) -> Iterator[None]:
    """While it is open documents are compiled with the mistake; the cache of prepared data knows them apart."""
    from hcot_lmeval.training.data import dataset, preparation

    plant, compiled, code = TRAINED[mistake], preparation.compile_document, preparation.preparation_code
    if plant is None:
        yield
        return

    def compile_document(example: Any, grammar: Any, policy: Any, **options: Any) -> Any:
        return plant(compiled(example, grammar, policy, **options), example, grammar)

    preparation.compile_document = compile_document
    dataset.preparation_code = lambda: f"{code()} {mistake}"
    try:
        yield
    finally:
        preparation.compile_document, dataset.preparation_code = compiled, code


def with_template(output: Path) -> dict[str, Any]:
    """Makes a new model, unless there is one, whose template ends prompts with a newline, which its tokenizer knows."""
    start = {"model": str(output / "start"), "tiny": {}}
    if (output / "start").is_dir():
        return start
    from hcot_lmeval.training.induction import start_from_induction
    from hcot_lmeval.training.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\n"])
    tokenizer.chat_template = TEMPLATE.format(end=NEWLINE)
    model = tiny_model(tokenizer)
    start_from_induction(model)
    for part in (tokenizer, model):
        part.save_pretrained(output / "start")
    return start


NEWLINE = r"{{ '\n' }}"
TEMPLATE = (
    "{{% for m in messages %}}{{{{ m['content'] }}}}{{% if m['role'] == 'user' %}}{end}{{% else %}}"
    "{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
)


def place(mistake: str, args: argparse.Namespace) -> Path:
    return args.out / "runs" / mistake.replace(" ", "-")


# --- diagnoses --------------------------------------------------------------------------------------------------------


def other_record(model: Path) -> None:
    """The record names a policy that the model was not trained with."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    config["hcot"]["policy"] = "evict"
    file.write_text(json.dumps(config))


def other_template(model: Path) -> None:
    """The template that the checkpoint brings lacks the newline."""
    (model / "chat_template.jinja").write_text(TEMPLATE.format(end=""))


Case = tuple[str, Callable[[Path], None] | None, list[str], set[str]]
CASES: dict[str, Case] = {
    "no mistake": ("none", None, [], set()),
    "no mistake, with a template": ("with a template", None, [], set()),
    "prompt in the loss": ("prompt in the loss", None, [], {"prompt_in_loss"}),
    "end token masked out of the loss": ("end masked", None, [], {"end_never_learned"}),
    "[SOLUTION] masked out of the loss": ("marker masked", None, [], {"never_learned"}),
    "record of another policy": ("none", other_record, [], {"wrong_policy", "wrong_record"}),
    "template without its newline": ("with a template", other_template, [], {"template"}),
    "trained on recompute, run with evict": ("none", None, ["--pruning", "evict"], {"wrong_policy"}),
    "trained on recompute, run unpruned": ("none", None, ["--pruning", "off"], {"wrong_policy"}),
}
"""Name -> training, what is done to the finished checkpoint, arguments of `diagnose`, and the causes to be found."""


def diagnose(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the diagnosis of a case."""
    from hcot_lmeval.diagnosis.cli import main as run

    training, change, options, _ = CASES[case]
    model = place(training, args) / "model"
    if change is not None:
        copy = args.out / "changed" / case.replace(" ", "-")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(model, copy)
        change(copy)
        model = copy
    out = args.out / "diagnoses" / case.replace(" ", "-")
    print(f"\n=== {case}")
    arguments = [str(model), "--data", json.dumps(DATA), "--problems", str(args.problems), "--out", str(out), "--quiet"]
    if run([*arguments, *options]):
        raise SystemExit(f"{case} could not be diagnosed")
    return json.loads((out / "diagnosis.json").read_text())


def markdown(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """Returns the table: what was planted, what was found, and how the model then writes."""
    lines = [
        "| planted | causes found | as expected | symptoms | right | ended | illegal | loops |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, found in rows:
        kinds = {kind: [f["code"] for f in found["findings"] if f["kind"] == kind] for kind in ("cause", "symptom")}
        written = found["policies"][found["intended_policy"]]["written"]
        shares = [f"{100 * written[name]:.0f} %" for name in ("accuracy", "completed", "illegal", "looped")]
        right = "yes" if set(kinds["cause"]) == CASES[case][3] else "NO"
        lists = [", ".join(dict.fromkeys(codes)) or "none" for codes in kinds.values()]
        lines.append(f"| {case} | {lists[0]} | {right} | {lists[1]} | {' | '.join(shares)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
