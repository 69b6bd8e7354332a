"""Compares three ways to train on the same traces: packed, split into stages, and plain (unpruned) fine-tuning.

    python scripts/bench_training.py                                # 8k-token traces of 16 and 64 blocks, small model
    python scripts/bench_training.py --counts-only --length 32768   # tokens and attention pairs alone, in seconds
    python scripts/bench_training.py --model Qwen/Qwen2.5-0.5B --dtype bfloat16 --device cuda --attention flex_attention
    python scripts/bench_training.py --json bench_training.json

``packed`` forwards what an exact decoder forwards, each token once and the solutions again; ``stages`` starts anew from
the live context after every prune; both learn from the same contexts, and their losses are compared. ``plain`` is
ordinary fine-tuning on the trace as it was written, for which the model sees everything.

All three take the path of real training: compiled documents, packed rows, one mask, losses computed in chunks. A
micro-batch holds at most as many tokens as the longest packed document, whatever the form, so that short stages share
one; a step is all micro-batches of all traces and one update by AdamW. Its learning rate is 0: every step finds the
same weights. Forms take turns, so that drifts of the machine hit all alike; times are medians.

The traces are random text in blocks. Thoughts and solutions are as long to each other as ``--thought`` and
``--solution`` (300 to 40 by default, a thought of a paragraph and a solution of two lines), each +-50 %, scaled such
that a trace has ``--length`` tokens. ``sequential`` blocks follow each other; of ``nested`` ones, one in four holds
three others in its thought.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcot_lmeval.provenance import machine, versions

if TYPE_CHECKING:
    import torch

    from hcot_lmeval.grammar import Grammar
    from hcot_lmeval.training.data.documents import Document, Example

    Batch = dict[str, torch.Tensor]

FORMS = ("packed", "stages", "plain")
SHAPES = {"sequential": 0, "nested": 3}
"""How many blocks the thought of an outer block holds."""
OPEN, SPLIT, CLOSE, EOS, FIRST_TEXT = 1, 2, 3, 4, 10
PROMPT, TAIL, BETWEEN = 120, 60, 15
"""Tokens before, behind and between blocks; the last one is scaled like thoughts and solutions."""
TEXT_IDS = 1000
PACKED_TO_PLAIN = 1.15
"""At most so many tokens are forwarded for one of plain fine-tuning; what we promise."""
STAGES_TO_PACKED = {16: 2.0, 64: 4.0}
"""At least so many tokens stages forward for each of ours, by number of sequential blocks; what we promise.

Nested blocks leave with the block around them, so that stages are shorter and there is less to gain."""


def main() -> None:
    args = parse_args()
    if args.peak_of:
        print(json.dumps(peak_in_this_process(args)))
        return
    rows: list[dict[str, Any]] = []
    print(HEADER)
    for shape in args.shapes:
        for blocks in args.blocks:
            rows += compare(args, shape, blocks)
            print(table(rows[-len(FORMS) :]), flush=True)
    print(verdict(rows))
    facts = {**machine(args.device, args.threads), **versions()}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    if args.json:
        arguments = {key: str(value) for key, value in vars(args).items() if key != "peak_of"}
        args.json.write_text(json.dumps({**facts, "arguments": arguments, "rows": rows}, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("traces")
    data.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="how blocks lie")
    data.add_argument("--blocks", type=int, nargs="+", default=[16, 64], help="blocks in a trace")
    data.add_argument("--length", type=int, default=8192, help="tokens of a trace, about")
    data.add_argument("--thought", type=float, default=300, help="tokens of a thought, before scaling")
    data.add_argument("--solution", type=float, default=40, help="tokens of a solution, before scaling")
    data.add_argument("--traces", type=int, default=1, help="traces in an optimiser step")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a checkpoint whose configuration to take; weights are random in any case")
    model.add_argument("--hidden", type=int, default=128, help="hidden size; heads have 64 dimensions")
    model.add_argument("--layers", type=int, default=2, help="decoder layers")
    model.add_argument("--vocabulary", type=int, default=4096, help="tokens in the vocabulary")
    model.add_argument("--attention", default="sdpa", choices=("sdpa", "eager", "flex_attention"))
    model.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    model.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    model.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    run = parser.add_argument_group("run")
    run.add_argument("--counts-only", action="store_true", help="count tokens and pairs, and run no model")
    run.add_argument("--repeats", type=int, default=3, help="timed steps of each form, after a short warm-up")
    run.add_argument("--threads", type=int, default=2, help="CPU threads")
    run.add_argument("--json", type=Path, help="also write all measurements here")
    run.add_argument("--peak-of", choices=FORMS, help=argparse.SUPPRESS)  # how this script calls itself
    return parser.parse_args()


# --- traces -----------------------------------------------------------------------------------------------------------


def make_examples(args: argparse.Namespace, shape: str, blocks: int) -> list[Example]:
    from hcot_lmeval.training.data.documents import Example

    rng = random.Random(f"{shape} {blocks}")
    return [
        Example(tuple(words(rng, PROMPT)), (*make_trace(rng, args, SHAPES[shape], blocks), *words(rng, TAIL), EOS))
        for _ in range(args.traces)
    ]


def make_trace(rng: random.Random, args: argparse.Namespace, children: int, blocks: int) -> list[int]:
    """Returns `blocks` blocks, those of one outer block at a time."""
    room = args.length - PROMPT - TAIL - 1 - 3 * blocks
    shares = (args.thought, args.solution, BETWEEN)
    if room * min(shares) < 2 * blocks * sum(shares):
        raise SystemExit(f"error: --length {args.length} is too short for {blocks} such blocks")
    sizes = zip(*(spread(rng, room * share / sum(shares), blocks) for share in shares), strict=True)
    tokens: list[int] = []
    for first in range(0, blocks, children + 1):
        inner = [block(rng, next(sizes)) for _ in range(min(children, blocks - first - 1))]
        tokens += block(rng, next(sizes), *inner)
    return tokens


def spread(rng: random.Random, total: float, count: int) -> list[float]:
    """Returns `count` sizes that add up to `total`, each within 50 % of what all would be if they were equal, or so."""
    sizes = [rng.uniform(0.5, 1.5) for _ in range(count)]
    return [size * total / sum(sizes) for size in sizes]


def block(rng: random.Random, sizes: tuple[float, ...], *inner: list[int]) -> list[int]:
    """One block and the text behind it; the text of its thought is spread before, between and behind `inner`."""
    thought, solution, between = sizes
    share = thought / (len(inner) + 1)
    tokens = [OPEN, *words(rng, share)]
    for other in inner:
        tokens += [*other, *words(rng, share)]
    return [*tokens, SPLIT, *words(rng, solution), CLOSE, *words(rng, between)]


def words(rng: random.Random, count: float) -> list[int]:
    return [rng.randrange(FIRST_TEXT, FIRST_TEXT + TEXT_IDS) for _ in range(round(count))]


def make_grammar() -> Grammar:
    from hcot_lmeval.grammar import Grammar
    from hcot_lmeval.markup import MarkerIds

    return Grammar(markers=MarkerIds(OPEN, SPLIT, CLOSE), think=(None, None), eos_ids=frozenset({EOS}))


def make_documents(form: str, examples: list[Example]) -> list[Document]:
    """Compiles the traces for one form; none is cut."""
    from hcot_lmeval.trace import Policy
    from hcot_lmeval.training.data.documents import compile_document, split_stages

    grammar, long = make_grammar(), 1 << 30
    if form == "stages":
        return [stage for example in examples for stage in split_stages(example, grammar, "recompute", max_length=long)]
    policy = Policy.RECOMPUTE if form == "packed" else Policy.OFF
    return [compile_document(example, grammar, policy, max_length=long) for example in examples]


def all_documents(args: argparse.Namespace, shape: str, blocks: int) -> dict[str, list[Document]]:
    examples = make_examples(args, shape, blocks)
    return {form: make_documents(form, examples) for form in FORMS}


def counts(documents: list[Document]) -> dict[str, int]:
    """What the form costs whatever the machine: tokens forwarded, and pairs of query and key that see each other."""
    return {
        "documents": len(documents),
        "tokens": sum(len(document) for document in documents),
        "targets": sum(document.learned for document in documents),
        "pairs": sum(end - key for document in documents for key, end in enumerate(document.death)),
    }


# --- steps ------------------------------------------------------------------------------------------------------------


class Trainee:
    """A random model with its optimiser, trained by the functions that real training uses."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from hcot_lmeval.training.forward import LossSettings, install

        torch.set_num_threads(args.threads)
        self.model = make_model(args)
        self.settings = LossSettings(make_grammar())
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.device = torch.device(args.device)
        install(self.model)

    def step(self, batches: list[Batch]) -> float:
        """Runs one optimiser step and returns its loss per target, structure loss included."""
        from hcot_lmeval.trace import IGNORE
        from hcot_lmeval.training.forward import loss_sums

        targets = sum(int((batch["shift_labels"] != IGNORE).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            here = {name: column.to(self.device) for name, column in batch.items()}
            loss = loss_sums(self.model, here, self.settings).objective / max(targets, 1)
            loss.backward()
            total += loss.item()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return total

    def timed_step(self, batches: list[Batch]) -> tuple[float, float]:
        """Returns seconds and loss of a step."""
        self.wait()
        start = time.perf_counter()
        loss = self.step(batches)
        self.wait()
        return time.perf_counter() - start, loss

    def warm_up(self, batches: list[Batch]) -> None:
        """Runs one micro-batch; on a CPU, where nothing is compiled, the beginning of it is enough."""
        self.step([beginning(batches[0])] if self.device.type == "cpu" else batches[:1])

    def peak(self, batches: list[Batch]) -> int | None:
        """Returns the most bytes that a step needs above what it finds: weights and the state of the optimiser.

        Micro-batches are of one size, and from the second one on gradients exist beside the activations. So one counts,
        behind a short one that leaves gradients.
        """
        self.warm_up(batches)
        before = self.memory(reset=True)
        self.step([beginning(batches[0]), batches[0]])
        after = self.memory()
        return None if before is None or after is None else after - before

    def memory(self, *, reset: bool = False) -> int | None:
        """Returns the peak of this process in bytes; after a reset that is what it holds now. None: not known here."""
        if self.device.type == "cuda":
            import torch

            if reset:
                torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        if not clear.exists():
            return None
        if reset:
            clear.write_text("5")
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024

    def wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)


def beginning(batch: Batch, tokens: int = 64) -> Batch:
    """The first tokens of the first row; a beginning of a plan is a plan, though it may have no target."""
    return {name: column[:1, :tokens] for name, column in batch.items()}


def make_model(args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 64, 1),
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    if args.model:
        config = AutoConfig.from_pretrained(args.model)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, args.dtype), attn_implementation=args.attention
    ).to(args.device)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def pack(documents: list[Document], row_length: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Packs documents that are in memory, as `PackedRows` does those in a table."""
    from hcot_lmeval.training.data.rows import assign

    groups = assign([len(document) for document in documents], row_length, seed)
    return [_join([documents[index] for index in group]) for group in groups]


def _join(documents: list[Document]) -> dict[str, list[int]]:
    from hcot_lmeval.training.data.documents import COLUMNS

    row: dict[str, list[int]] = {name: [] for name in COLUMNS}
    for document in documents:
        start = len(row["ids"])
        for name, values in row.items():
            values += getattr(document, name)
        row["death"][start:] = [start + death for death in document.death]
    return row


def make_batches(documents: list[Document], budget: int) -> list[Batch]:
    """Packs documents into rows as long as the longest of them, and rows into batches of at most `budget` tokens."""
    from hcot_lmeval.training.data.rows import collate

    length = max(len(document) for document in documents)
    rows, size = pack(documents, length), max(budget // length, 1)
    return [collate(rows[first : first + size], length, pad_id=0) for first in range(0, len(rows), size)]


def longest_packed(documents: dict[str, list[Document]]) -> int:
    return max(len(document) for document in documents["packed"])


def compare(args: argparse.Namespace, shape: str, blocks: int) -> list[dict[str, Any]]:
    """Measures the three forms on the same traces."""
    documents = all_documents(args, shape, blocks)
    rows: list[dict[str, Any]] = [
        {"shape": shape, "blocks": blocks, "form": form, **counts(documents[form])} for form in FORMS
    ]
    if args.counts_only:
        return rows
    batches = {form: make_batches(documents[form], longest_packed(documents)) for form in FORMS}
    measured = time_steps(Trainee(args), batches, args.repeats)
    for row in rows:
        form = row["form"]
        size = {"batches": len(batches[form]), "batch_shape": list(batches[form][0]["input_ids"].shape)}
        row |= {**size, **measured[form], "peak_bytes": peak_in_fresh_process(shape, blocks, form)}
    check_losses(rows, args.dtype)
    return rows


def time_steps(trainee: Trainee, batches: dict[str, list[Batch]], repeats: int) -> dict[str, dict[str, Any]]:
    """Runs the forms in turns, `repeats` times each, behind a warm-up."""
    for form in FORMS:
        trainee.warm_up(batches[form])
    found: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    for _ in range(repeats):
        for form in FORMS:
            found[form].append(trainee.timed_step(batches[form]))
    return {
        form: {"loss": steps[0][1], "seconds": statistics.median(s for s, _ in steps), "times": [s for s, _ in steps]}
        for form, steps in found.items()
    }


def check_losses(rows: list[dict[str, Any]], dtype: str) -> None:
    """Exits unless packed rows and stages have one loss: a comparison of different things would say nothing."""
    packed, stages = (row["loss"] for row in rows if row["form"] != "plain")
    if not abs(packed - stages) <= (1e-5 if dtype == "float32" else 2e-2) * abs(stages):
        raise SystemExit(f"error: packed rows have loss {packed}, stages {stages}; they should learn the same")


def peak_in_fresh_process(shape: str, blocks: int, form: str) -> int | None:
    """Runs this script with the same arguments for one form alone: a process never gives all its memory back."""
    narrow = ["--shapes", shape, "--blocks", str(blocks), "--peak-of", form]
    command = [sys.executable, __file__, *sys.argv[1:], *narrow]
    found: int | None = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def peak_in_this_process(args: argparse.Namespace) -> int | None:
    documents = all_documents(args, args.shapes[0], args.blocks[0])
    return Trainee(args).peak(make_batches(documents[args.peak_of], longest_packed(documents)))


# --- reports ----------------------------------------------------------------------------------------------------------


HEADER = "shape       blocks  form    documents   tokens      x  M pairs      x  batches   s/step      x  peak MiB"


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each form; factors are to plain fine-tuning."""
    plain = next(row for row in rows if row["form"] == "plain")
    return "\n".join(counted(row, plain) + (timed(row, plain) if "seconds" in row else "") for row in rows)


def counted(row: dict[str, Any], plain: dict[str, Any]) -> str:
    line = f"{row['shape']:10s}  {row['blocks']:6d}  {row['form']:6s}  {row['documents']:9d}"
    line += f"  {row['tokens']:7d}  {row['tokens'] / plain['tokens']:5.2f}"
    return f"{line}  {row['pairs'] / 1e6:7.1f}  {row['pairs'] / plain['pairs']:5.2f}"


def timed(row: dict[str, Any], plain: dict[str, Any]) -> str:
    peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    return f"  {row['batches']:7d}  {row['seconds']:7.2f}  {row['seconds'] / plain['seconds']:5.2f}  {peak:>8s}"


def verdict(rows: list[dict[str, Any]]) -> str:
    """Tokens forwarded, beside what we promise."""
    lines = []
    for packed, stages, plain in zip(*(rows[i :: len(FORMS)] for i in range(len(FORMS))), strict=True):
        more, fewer = packed["tokens"] / plain["tokens"], stages["tokens"] / packed["tokens"]
        line = (
            f"{packed['shape']}, {packed['blocks']} blocks: packed / plain {more:.3f} {_kept(more <= PACKED_TO_PLAIN)}"
        )
        line += f" (at most {PACKED_TO_PLAIN}), stages / packed {fewer:.2f}"
        if packed["shape"] == "sequential" and packed["blocks"] in STAGES_TO_PACKED:
            least = STAGES_TO_PACKED[packed["blocks"]]
            line += f" {_kept(fewer >= least)} (at least {least:g})"
        lines.append(line)
    return "\n".join(lines)


def _kept(promise: bool) -> str:
    return "ok" if promise else "MISSED"


if __name__ == "__main__":
    main()
