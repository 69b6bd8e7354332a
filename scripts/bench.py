"""Times the engine beside `model.generate` on equal work: the same scripted tokens, in one run, interleaved.

    python scripts/bench.py                               # 26M parameters, batch 1 and 8
    python scripts/bench.py --shape 0.5B --batch 1 --tokens 256 --dtype bfloat16
    python scripts/bench.py --json bench.json

Weights are random and every engine is forced to generate the same trace, which opens and closes blocks at scripted
places; so only speed differs. `generate` and `off` keep the whole trace, `recompute` and `evict` prune it, and
`recompute+grammar` does so with the grammar's mask at every step. A figure is the median over the repeats, prefill
included; a ratio is the median of the ratios within each repeat, in which the engines take turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "26M": {
        "vocab_size": 4096,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "0.5B": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5B": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
"""Hidden sizes and heads; 0.5B and 1.5B are those of Qwen2.5."""

OPEN, SPLIT, CLOSE, FIRST_TEXT = 1, 2, 3, 10
ENGINES: dict[str, dict[str, str]] = {
    "off": {"policy": "off"},
    "recompute": {"policy": "recompute"},
    "recompute+grammar": {"policy": "recompute", "constraints": "grammar"},
    "evict": {"policy": "evict"},
}


def main() -> None:
    args = parse_args()
    import torch

    torch.set_num_threads(args.threads)
    model = make_model(args)
    rows = []
    for batch in args.batch:
        rows += measure(model, args, batch)
    print(table(rows))
    facts = {"versions": versions(), "machine": machine(args), "arguments": {k: str(v) for k, v in vars(args).items()}}
    print(", ".join(f"{k} {v}" for k, v in {**facts["versions"], **facts["machine"]}.items()))
    if args.json:
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=2))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="26M", help="model size")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows side by side")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=512, help="generated tokens a row")
    parser.add_argument("--thought", type=int, default=60, help="tokens of each thought")
    parser.add_argument("--solution", type=int, default=8, help="tokens of each solution")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each engine, after one warm-up")
    parser.add_argument("--engines", nargs="+", choices=["generate", *ENGINES], help="some of them; the first is 1.00")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write all measurements here")
    return parser.parse_args()


def make_model(args: argparse.Namespace) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[args.shape], max_position_embeddings=32768, tie_word_embeddings=True)
    return Qwen2ForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()


def script(args: argparse.Namespace) -> list[int]:
    """The trace that every engine has to generate: thought, solution and a little text, over and over."""
    rng = random.Random(0)
    tokens: list[int] = []
    while len(tokens) < args.tokens:
        tokens += [OPEN, *words(rng, args.thought), SPLIT, *words(rng, args.solution), CLOSE, *words(rng, 4)]
    return tokens[: args.tokens]


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(FIRST_TEXT, 4000) for _ in range(count)]


def measure(model: Any, args: argparse.Namespace, batch: int) -> list[dict[str, Any]]:
    """Times all engines at one batch size, taking turns so that drifts of the machine hit all alike."""
    rng = random.Random(1)
    prompts, trace = [words(rng, args.prompt) for _ in range(batch)], script(args)
    every = {"generate": run_generate, **{name: run_engine(options) for name, options in ENGINES.items()}}
    engines = {name: every[name] for name in args.engines or every}
    times: dict[str, list[float]] = {name: [] for name in engines}
    peaks: dict[str, int] = {}
    for _ in range(args.repeats + 1):
        for name, run in engines.items():
            start = time.perf_counter()
            peaks[name] = run(model, prompts, trace)
            times[name].append(time.perf_counter() - start)
    base = times[next(iter(engines))][1:]
    return [
        {
            "batch": batch,
            "engine": name,
            "tokens_per_second": batch * len(trace) / statistics.median(seconds[1:]),
            "ratio_to_first": statistics.median(b / s for b, s in zip(base, seconds[1:], strict=True)),
            "peak_live_tokens": peaks[name],
            "seconds": seconds[1:],
        }
        for name, seconds in times.items()
    ]


def run_generate(model: Any, prompts: list[list[int]], trace: list[int]) -> int:
    """The loop of transformers, forced by a logits processor; returns the tokens it keeps for each row."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class Force(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            scores.fill_(-1e9)[:, trace[input_ids.shape[1] - len(prompts[0])]] = 0
            return scores

    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=len(trace),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([Force()]),
    )
    assert out[:, len(prompts[0]) :].tolist() == [trace] * len(prompts)
    return int(out.shape[1])


def run_engine(options: dict[str, str]) -> Callable[[Any, list[list[int]], list[int]], int]:
    def run(model: Any, prompts: list[list[int]], trace: list[int]) -> int:
        from hcot_lmeval.engine import Engine, Request, SamplingParams
        from hcot_lmeval.markup import MarkerIds

        engine = Engine(
            model,
            markers=MarkerIds(OPEN, SPLIT, CLOSE),
            **options,
            slots=len(prompts),
            eos_ids=(),
            self_check=False,
        )
        params = SamplingParams(max_gen_toks=len(trace))
        requests = [Request(str(i), tuple(p), params, forced_ids=tuple(trace)) for i, p in enumerate(prompts)]
        done = engine.generate(requests)
        assert all(list(completion.token_ids) == trace for completion in done)
        return max(completion.statistics.peak_live_tokens for completion in done)

    return run


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["batch  engine             tokens/s     x first  peak live tokens a row"]
    for row in rows:
        lines.append(
            f"{row['batch']:5d}  {row['engine']:17s}  {row['tokens_per_second']:8.1f}  {row['ratio_to_first']:10.2f}"
            f"  {row['peak_live_tokens']:22d}"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def machine(args: argparse.Namespace) -> dict[str, str]:
    import torch

    if args.device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(args.device)}
    return {"device": cpu_name(), "threads": str(args.threads)}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
