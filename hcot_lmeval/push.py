"""``hcot push``: a checkpoint that a stranger can run pruned with transformers alone.

    hcot push out/model                      writes a card and custom_generate/ beside the weights
    hcot push out/model --to owner/name      and uploads the folder, private unless --public

Whoever has this package installed then writes

    model.generate(**inputs, custom_generate="owner/name", trust_remote_code=True, tokenizer=tokenizer)
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from hcot_lmeval import __version__
from hcot_lmeval.errors import run_command
from hcot_lmeval.markup import get_markup
from hcot_lmeval.record import TrainingRecord, read_config, read_record
from hcot_lmeval.store import replacing
from hcot_lmeval.vocabulary import marker_ids

FOLDER = "custom_generate"
GENERATE = '''"""Generation that throws finished thoughts away, from the text and from the KV cache; see the card."""

from hcot_lmeval import generate  # noqa: F401
'''
REQUIREMENTS = f"hcot_lmeval>={__version__}\n"

HEADING = "## Generate with pruning"
SECTION = f"""\
{HEADING}

```bash
pip install hcot_lmeval
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{{name}}"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
inputs = tokenizer("...", return_tensors="pt")
ids = model.generate(
    **inputs, custom_generate=name, trust_remote_code=True, tokenizer=tokenizer, max_context=4096, max_new_tokens=32768
)
```

{{policy}} Lengths, sampling, end tokens, `streamer=` and `stop_strings=` are those of `generate`; `max_context`,
`policy` and the other options are the engine's; `note_taker=` records what was thrown away. The sequences hold every
generated token; with `return_dict_in_generate=True`, `completions` has what was left of each row, and what it cost.
`lm_eval --model hcot --model_args pretrained={{name}}` evaluates it.
"""
CARD = """---
library_name: transformers
tags: [hcot, pruned-reasoning]
---

# {name}

A model that thinks in blocks. When a block ends, its thought is thrown away and its solution stays: `{rule}`.

"""
TRAINED = "The checkpoint says that it was trained under the policy `{policy}`, which is what it is decoded with."
UNKNOWN = "The checkpoint does not say how it was trained: pass `policy=` (`recompute`, `evict` or `off`)."


def describe(folder: Path, name: str) -> list[Path]:
    """Writes ``custom_generate/`` and what the card lacks into the folder of a checkpoint.

    Args:
        folder: of the weights and the tokenizer.
        name: what users will load.

    Returns:
        The files that were written. A card that is there is added to, once.

    Raises:
        ValueError: the folder holds no whole checkpoint, or its tokenizer lacks the markers.
    """
    record = check_checkpoint(folder)
    written = {folder / FOLDER / "generate.py": GENERATE, folder / FOLDER / "requirements.txt": REQUIREMENTS}
    card = folder / "README.md"
    policy = UNKNOWN if record is None else TRAINED.format(policy=record.policy)
    section = SECTION.format(name=name, policy=policy)
    before = card.read_text(encoding="utf-8") if card.exists() else new_card(record, name)
    kept, _, behind = before.partition(HEADING)
    rest = behind[behind.find("\n## ") :] if "\n## " in behind else ""  # sections behind ours, from an earlier push
    written[card] = kept.rstrip() + "\n\n" + section + rest
    for path, text in written.items():
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as draft:
            draft.write_text(text, encoding="utf-8")
    return list(written)


def check_checkpoint(folder: Path) -> TrainingRecord | None:
    """Returns the training record of a whole checkpoint, or None if it has none.

    Raises:
        ValueError: the folder holds no whole checkpoint, or its tokenizer lacks the markers.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir() or read_config(folder) is None:
        raise ValueError(f"{folder} is no folder with a config.json; give the folder of a finished model")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no weights (*.safetensors); give the folder of a finished model")
    record = read_record(folder)
    marker_ids(AutoTokenizer.from_pretrained(folder), get_markup("hcot" if record is None else record.markup))
    return record


def new_card(record: TrainingRecord | None, name: str) -> str:
    """Returns the head of a card for a checkpoint without one."""
    rule = get_markup("hcot" if record is None else record.markup).rule
    return CARD.format(name=name.rpartition("/")[2], rule=rule)


def contents(folder: Path) -> dict[str, Path]:
    """Returns what is uploaded of a folder: all files but hidden ones, and no checkpoints of a training run."""
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    left_out = ("checkpoint-", ".", "__pycache__")
    return {
        name.as_posix(): path for name, path in names.items() if not any(p.startswith(left_out) for p in name.parts)
    }


def upload(
    name: str, files: Mapping[str, bytes | Path], *, kind: str = "model", private: bool = True, message: str = "Upload"
) -> str:
    """Uploads files in one commit to a repository of the hub, made if need be; `huggingface_hub` has the token.

    Args:
        name: owner/name.
        files: path in the repository -> content, or a file that has it.
        kind: model or dataset.
        private: of a repository that is made.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        ValueError: it failed. The message holds no word of the error itself, which might repeat the token.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(name, repo_type=kind, private=private, exist_ok=True)
        operations = [CommitOperationAdd(place, content) for place, content in files.items()]
        api.create_commit(name, operations, repo_type=kind, commit_message=message)
    except Exception as error:  # whatever the client and the network come up with
        status = getattr(getattr(error, "response", None), "status_code", "no response")
        raise ValueError(
            f"the upload to {name} failed ({type(error).__name__}, {status}); log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write there"
        ) from None
    return f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"


def parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    parse = argparse.ArgumentParser(
        prog="hcot push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("model", type=Path, help="folder of a finished model: weights, tokenizer, config")
    parse.add_argument("--to", metavar="OWNER/NAME", help="repository on the hub to upload the folder to")
    parse.add_argument("--public", action="store_true", help="a new repository can be seen by all")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Writes, and uploads if it is asked for.

    Raises:
        ValueError: an option is not allowed, the folder holds no whole checkpoint, or the upload failed.
    """
    if args.to is None and args.public:
        raise ValueError("--public is of an upload; add --to OWNER/NAME, or leave it out")
    if args.to is not None and [bool(part) for part in args.to.split("/")] != [True, True]:
        raise ValueError(f"--to {args.to} is no repository of the hub; give OWNER/NAME")
    for path in describe(args.model, args.to or str(args.model)):
        print(path)
    if args.to is not None:
        print(upload(args.to, contents(args.model), private=not args.public))
