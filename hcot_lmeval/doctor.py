"""Is every way to decode right on this machine? Runs all of them on short traces with nested prunes, and says.

    hcot doctor                                   # the bundled model, in seconds; no network
    hcot doctor --model Qwen/Qwen2.5-1.5B-Instruct --device cuda --out doctor.json

Each form decodes the same trials as PyTorch in the host's loop does: forced traces, and tokens sampled behind them. The
largest difference of a logit is shown relative to the largest logit. A form that is not marked "used" has to be asked
for. The exit status is 1 if a form that is used is not right. --out writes what a report needs: forms, versions and the
machine; no paths, no names of files, no data.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hcot_lmeval.errors import run_command

SCHEMA = "hcot-doctor/1"
PATH = re.compile(r"(?<![\w.])(?:/[\w.+@~-]+){2,}")
"""What may not stand in a report: it names a machine's folders, and its user."""
WIDTHS = (16, 32, 64)
"""Bytes of the vectors that compiled code can be made for."""


@dataclass(frozen=True)
class Finding:
    """What became of a form.

    Attributes:
        form: its name.
        options: of the engine.
        used: whether it is what runs by default.
        state: right, wrong, or not here.
        difference: the largest of a logit, relative to the largest; None where it did not run.
        milliseconds: per token of the trials, a rough figure.
        reason: why it is wrong, or not here.
    """

    form: str
    options: Mapping[str, Any]
    used: bool
    state: str
    difference: float | None = None
    milliseconds: float | None = None
    reason: str = ""


def parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    parse = argparse.ArgumentParser(
        prog="hcot doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parse.add_argument
    add("--model", default="tiny-hcot", help="directory, id on a hub, or bundled checkpoint (tiny-hcot)")
    add("--device", help="cuda, cuda:1, cpu (cuda if there is one)")
    add("--dtype", default="auto", help="of the weights (the checkpoint's)")
    add("--only", nargs="+", metavar="FORM", help="forms to run, by the words that their names begin with")
    add("--out", type=Path, metavar="FILE", help="write a report, as JSON")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args), extra="report")


def run(args: argparse.Namespace) -> int:
    """Runs the forms, prints the table and writes the report; returns 1 if a form that is used is wrong.

    Raises:
        OSError, ValueError: the model cannot be loaded, no form has such a name, or the report cannot be written.
    """
    if args.out is not None:
        args.out.open("a").close()  # known before anything is run
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hcot_lmeval.assets import check_name, resolve
    from hcot_lmeval.engine.options import check_device

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    check_name(args.model)
    place, more = resolve(args.model), {"trust_remote_code": args.trust_remote_code}
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=args.dtype, **more).to(device)
        tokenizer = AutoTokenizer.from_pretrained(place, **more)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"--model {args.model} could not be loaded; give a checkpoint within reach: {why}") from error
    names = forms(device.partition(":")[0])
    chosen = [name for name in names if args.only is None or name.startswith(tuple(args.only))]
    if not chosen:
        raise ValueError(f"--only {' '.join(args.only)}: there are {', '.join(map(repr, names))}")
    found = list(examine(model, tokenizer, {name: names[name] for name in chosen}))
    if args.only is None and device == "cpu":
        found += widths(args)
    show(found, args.model, device)
    if args.out is not None:
        args.out.write_text(json.dumps(report(found, model, device), indent=1) + "\n", encoding="utf-8")
        print(f"{args.out} can be attached to a report")
    wrong = [f"{each.form} ({each.state})" for each in found if each.used and each.state != "right"]
    if wrong:
        print(f"used, and not right: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


def forms(kind: str) -> dict[str, dict[str, Any]]:
    """Returns the ways to decode on a kind of device: name -> options of the engine; the first is the default."""
    named: dict[str, dict[str, Any]] = {"default": {}, "PyTorch, host's loop": {"compute": "torch", "loop": "host"}}
    if kind == "cpu":
        return named | {
            "compiled": {"compute": "native", "weights": "plain", "loop": "host"},
            "compiled, packed weights": {"compute": "native", "weights": "packed", "loop": "host"},
            "keys and values in bfloat16": {"kv_dtype": "bfloat16", "loop": "host"},
            "keys and values in float16": {"kv_dtype": "float16", "loop": "host"},
            "device's loop": {"loop": "device"},
            "device's loop, token by token": {"loop": "device", "reforward": "replay"},
        }
    for attention in ("flash-attn", "flash", "triton", "sdpa"):
        for graphs in (True, False):
            way = {"loop": "device", "attention": attention, "graphs": graphs}
            named[f"device's loop, {attention}, {'CUDA graphs' if graphs else 'kernel by kernel'}"] = way
    return named | {
        "device's loop, token by token": {"loop": "device", "reforward": "replay"},
        "device's loop, sampling by PyTorch": {"loop": "device", "compute": "torch"},
        "host's loop": {"loop": "host"},
        "device's loop, keys and values in bfloat16": {"loop": "device", "kv_dtype": "bfloat16"},
    }


def examine(model: Any, tokenizer: Any, names: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Yields what became of each form of a model."""
    from tqdm import tqdm

    from hcot_lmeval.engine import Engine
    from hcot_lmeval.engine.device.proof import Seen

    log = logging.getLogger("hcot_lmeval")
    level = log.level
    log.setLevel(logging.ERROR)  # the table says it
    common = {"any_policy": True, "self_check": False, "max_context": 256}
    try:
        reference = Engine(model, tokenizer, compute="torch", loop="host", **common)
        expected = Seen.of(reference.try_form, None)
        for name, options in tqdm(names.items(), desc="forms", unit="form", leave=False):
            yield _found(name, options, Engine, (model, tokenizer), common, expected)
    finally:
        log.setLevel(level)


def _found(
    name: str, options: Mapping[str, Any], make: Any, parts: tuple[Any, Any], common: Mapping[str, Any], expected: Any
) -> Finding:
    import torch

    from hcot_lmeval.engine.device.proof import Seen, fault_of, largest

    used, seen = name == "default", Seen()
    try:
        engine = make(*parts, **{**common, **options})
        on_device = engine.options.loop == "device" or (
            engine.options.loop == "auto" and engine.decoder.device.type == "cuda"
        )
        form = engine.options if on_device else None
        start = time.perf_counter()
        fault, seen = fault_of(expected, engine.trials(), engine.try_form, form, rounds=options.get("kv_dtype"))
        seconds = time.perf_counter() - start
    except (ValueError, RuntimeError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        return Finding(name, options, used, "not here", reason=" ".join(str(error).split())[:300])
    tokens = sum(len(done.token_ids) for done in seen.done.values())
    state = "wrong" if fault else "right"
    return Finding(
        name, options, used, state, largest(expected, seen), 1000 * seconds / tokens if tokens else None, fault
    )


def widths(args: argparse.Namespace) -> list[Finding]:
    """Runs compiled code made for vectors of other widths, each in a process of its own."""
    found = []
    for width in WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            command = [sys.executable, "-m", "hcot_lmeval", "doctor", "--model", args.model, "--dtype", args.dtype]
            flags = f"{os.environ.get('HCOT_LMEVAL_CXXFLAGS', '')} -DVECTOR_BYTES={width}".strip()
            done = subprocess.run(
                [*command, "--device", "cpu", "--only", "compiled", "--out", str(out)],
                env={**os.environ, "HCOT_LMEVAL_CXXFLAGS": flags},
                capture_output=True,
                text=True,
                check=False,
            )
            told = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
            text = out.read_text(encoding="utf-8") if out.exists() else ""
            rows = json.loads(text)["forms"] if text else [{"form": "compiled", "state": "not here", "reason": told[0]}]
        for row in rows:
            name = f"{row['form']}, vectors of {width} bytes"
            row |= {"form": name, "used": False, "options": row.get("options", {})}
            found.append(Finding(**row))
    return found


def show(found: Sequence[Finding], model: str, device: str) -> None:
    """Prints the table."""
    from tabulate import tabulate

    rows = [
        [
            each.form,
            "used" if each.used else "",
            each.state,
            "" if each.difference is None else f"{each.difference:.1e}",
            "" if each.milliseconds is None else f"{each.milliseconds:.2f}",
        ]
        for each in found
    ]
    print(f"{model} on {device}\n")
    print(tabulate(rows, ["form", "", "", "largest difference", "ms a token"], "simple", disable_numparse=True))
    print("".join(f"\n{each.form}: {each.state}: {each.reason}" for each in found if each.reason) or "", end="\n\n")


def report(found: Sequence[Finding], model: Any, device: str) -> dict[str, Any]:
    """Returns what a report needs, without paths."""
    import torch

    from hcot_lmeval.provenance import code_digest, driver, machine, versions

    shape = {
        name: getattr(model.config.get_text_config(), name, None)
        for name in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    }
    whole = {
        "schema": SCHEMA,
        "model": {**shape, "dtype": str(model.dtype)},
        "device": device,
        "machine": machine(device, torch.get_num_threads()),
        "driver": driver(),
        "versions": versions(),
        "code": code_digest(graded=False),
        "forms": [asdict(each) for each in found],
    }
    return dict(json.loads(PATH.sub("...", json.dumps(whole))))
