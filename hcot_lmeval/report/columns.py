"""The columns of the cost tables: what each one counts, in words that cannot be misread, and how it is counted.

Tokens are counted per response, and a table shows the mean over responses. A generated token is one that the model
sampled, whether it was thrown away later or not; a live token is one that the model sees. A model that is not ours
tells nothing of this: its cells are empty, not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from hcot_lmeval.control import Cause
from hcot_lmeval.report.entries import Entry
from hcot_lmeval.report.tables import Head
from hcot_lmeval.trace import Malformed

Value = Callable[[Entry], float | int | None]
Column = tuple[Head, Value]
Statistic = Callable[[Mapping[str, Any]], float]


def count(how: Callable[[list[Any]], float], of: Statistic) -> Value:
    """What `how`, such as `sum`, makes of a statistic of all responses."""
    return lambda entry: how([of(stats) for stats in entry.requests]) if entry.requests else None


def mean(key: str) -> Value:
    """The mean of a statistic over responses."""
    return count(fmean, lambda stats: stats[key])


def column(key: str, head: str, meaning: str, value: Value | None = None, digits: int = 0) -> Column:
    """A column; without a value it is the `mean` of the statistic that it is named by."""
    return Head(head, meaning, digits, key=key), value or mean(key)


def ends(reason: str, meaning: str) -> Column:
    """Responses that ended for a reason."""
    return column(reason, reason, f"responses {meaning}", count(sum, lambda stats: stats["finish_reason"] == reason))


def kv_mib(value: Value) -> Value:
    """Live tokens as MiB of keys and values; None where the results do not tell the size of one."""

    def cell(entry: Entry) -> float | None:
        tokens, size = value(entry), (entry.runs[0].totals or {}).get("kv_bytes_per_token")
        return None if tokens is None or size is None else tokens * size / 2**20

    return cell


def mean_live(entry: Entry) -> float | None:
    """Live tokens as the mean over generated tokens, all responses together."""
    generated = sum(stats["generated_tokens"] for stats in entry.requests or ())
    return sum(stats["live_token_steps"] for stats in entry.requests or ()) / generated if generated else None


def totals(key: str, how: Callable[[list[float]], float]) -> Value:
    """What `how` makes of a total of the runs; None if one has none, as of a run that took all from its journal."""

    def cell(entry: Entry) -> float | None:
        found = [run.totals[key] if run.totals else None for run in entry.runs]
        known = [value for value in found if value is not None]
        return how(known) if len(known) == len(found) else None

    return cell


LARGEST_PEAK = count(max, lambda stats: stats["peak_live_tokens"])
TOKENS = (
    column("prompt_tokens", "prompt", "tokens of the prompt, mean"),
    column("generated_tokens", "generated", "tokens sampled, those thrown away later included, mean"),
    column("pruned_tokens", "pruned", "tokens thrown away by prunes, mean"),
    column(
        "reforwarded_tokens",
        "re-forwarded",
        "tokens forwarded a second time after a prune, the price of recompute, mean",
    ),
    column("live_tokens", "live at end", "prompt + generated - pruned when the response ended, mean"),
    column("prune_events", "prunes", "times that something was thrown away, mean", digits=1),
)
COSTS = (
    column(
        "peak_live_tokens",
        "peak live",
        "most tokens that the model saw at once in a response, prompt included, mean; a prompt that leaves no room in "
        "the window counts with its length, though it was not read",
    ),
    column("peak_live_tokens_largest", "largest", "the same, largest of all responses", LARGEST_PEAK),
    column("mean_live_tokens", "mean live", "live tokens just after a generated token, mean over those", mean_live),
    column(
        "kv_peak_mib", "KV peak", "MiB of keys and values of the largest peak, of one response", kv_mib(LARGEST_PEAK), 2
    ),
    column(
        "kv_area_mib_tokens",
        "KV area",
        "MiB of keys and values held just after each generated token, summed over the response, mean",
        kv_mib(mean("live_token_steps")),
        1,
    ),
    column(
        "wall_seconds",
        "seconds",
        "time spent generating all responses; those of a journal took none",
        totals("wall_seconds", sum),
        1,
    ),
    column(
        "tokens_per_second",
        "tokens/s",
        "generated tokens a second, all responses side by side; empty if all came from a journal",
        totals("tokens_per_second", fmean),
    ),
)
ENDS = (
    column("responses", "responses", "all that are counted here, of every seed", count(len, lambda stats: 1)),
    ends("eos", "that ended with the end token"),
    ends("stop", "that ended at a stop string of the task"),
    ends("length", "cut at the limit of generated tokens"),
    ends("context", "cut at the window, the limit of live tokens"),
    ends("loop", "cut because they repeated themselves (loop_tokens)"),
    column("blocks", "blocks", "blocks closed, with a prune or without, mean", digits=1),
    column(
        "max_depth",
        "depth",
        "most blocks open at once, largest of all responses",
        count(max, lambda stats: stats["max_depth"]),
    ),
    column(
        "malformed",
        "malformed",
        "departures from the notation in a response, of all kinds together, mean",
        count(fmean, lambda stats: sum(stats["malformed"].values())),
        2,
    ),
    column(
        "illegal_tokens",
        "illegal",
        "tokens that the grammar forbids at their place, ends and </think> within a block included, mean",
        digits=2,
    ),
    column(  # a cut response may have open blocks
        "illegal_responses",
        "illegal %",
        "percent of the responses with at least one such token",
        count(lambda found: 100 * fmean(found), lambda stats: stats["illegal_tokens"] > 0),
        1,
    ),
)
FORCED = {
    Cause.GRAMMAR: "tokens that the grammar changed, since the model wanted an illegal one",
    Cause.DEPTH: "openings of blocks that max_depth forbade",
    Cause.THOUGHT: "thoughts ended by max_block_tokens",
    Cause.SOLUTION: "solutions ended by max_solution_tokens",
    Cause.ENDING: "tokens that force_answer changed or forced",
}


def endings(entries: Sequence[Entry]) -> tuple[Column, ...]:
    """Returns columns of how responses ended and were written, one for each fault and each force that occurs."""
    requests = [stats for entry in entries for stats in entry.requests or ()]
    found = list(ENDS)
    if any(stats["loops"] for stats in requests):
        meaning = "responses in which a repetition was found (loop_tokens)"
        found.append(column("loops", "loops", meaning, count(sum, lambda stats: stats["loops"] > 0)))
    forced = {cause.value: f"{meaning}, mean" for cause, meaning in FORCED.items()}
    for cause in (cause for cause in forced if any(cause in stats["forced"] for stats in requests)):
        value = count(fmean, _kind("forced", cause))
        found.append(column(f"forced_{cause}", f"forced: {cause}", forced[cause], value, 2))
    for kind in (kind for kind in Malformed if any(kind in stats["malformed"] for stats in requests)):
        found.append(column(kind, kind.replace("_", " "), kind.meaning, count(sum, _kind("malformed", kind))))
    return tuple(found)


def _kind(statistic: str, kind: str) -> Statistic:
    return lambda stats: stats[statistic].get(kind, 0)
