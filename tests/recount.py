"""Counts a comparison's numbers again from lm-eval's raw files, with nothing but the standard library."""

import json
from collections import Counter, defaultdict
from pathlib import Path


def recount(folder: Path) -> dict[str, dict[str, float]]:
    """Returns, for the one results file below `folder`, name of a number -> its value."""
    [results_file] = folder.rglob("results_*.json")
    [samples_file] = folder.rglob("samples_*.jsonl")
    ours = json.loads(results_file.read_text())["config"]["hcot"]
    right, ended, by_depth, requests = [], [], defaultdict(list), []
    for line in samples_file.read_text().splitlines():
        sample = json.loads(line)
        right.append(sample["acc"])
        by_depth[sample["doc"]["depth"]].append(sample["acc"])
        for request in sample["requests"]:
            requests.append(request)
            ended.append(request["finish_reason"] in ("eos", "stop"))
    mean = {key: sum(r[key] for r in requests) / len(requests) for key in requests[0] if type(requests[0][key]) is int}
    generated = sum(r["generated_tokens"] for r in requests)
    ends, faults = Counter(r["finish_reason"] for r in requests), Counter()
    for request in requests:
        faults.update(request["malformed"])
    return {
        "endings": {"responses": len(requests)}
        | {key: ends[key] for key in ("eos", "stop", "length", "context", "loop")}
        | {"blocks": mean["blocks"], "max_depth": max(r["max_depth"] for r in requests)}
        | {"malformed": faults.total() / len(requests), **faults, "illegal_tokens": mean["illegal_tokens"]}
        | {"illegal_responses": 100 * sum(r["illegal_tokens"] > 0 for r in requests) / len(requests)},
        "accuracy": {"all": sum(right) / len(right)} | {str(d): sum(s) / len(s) for d, s in by_depth.items()},
        "completion": {"all": sum(ended) / len(ended)},
        "tokens": {k: mean[k] for k in ("prompt_tokens", "generated_tokens", "pruned_tokens", "reforwarded_tokens")}
        | {k: mean[k] for k in ("live_tokens", "prune_events")},
        "costs": {"peak_live_tokens": mean["peak_live_tokens"]}
        | {"peak_live_tokens_largest": max(r["peak_live_tokens"] for r in requests)}
        | {"mean_live_tokens": sum(r["live_token_steps"] for r in requests) / generated}
        | {"kv_peak_mib": max(r["peak_live_tokens"] for r in requests) * ours["kv_bytes_per_token"] / 2**20}
        | {"kv_area_mib_tokens": mean["live_token_steps"] * ours["kv_bytes_per_token"] / 2**20}
        | {"wall_seconds": ours["wall_seconds"], "tokens_per_second": generated / ours["wall_seconds"]},
    }
