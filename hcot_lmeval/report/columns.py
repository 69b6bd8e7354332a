"""The columns of the cost tables: what each one counts, in words that cannot be misread, and how it is counted.

Tokens are counted per response, and a table shows the mean over responses. A generated token is one that the model
sampled, whether it was thrown away later or not; a live token is one that the model sees. A model that is not ours
tells nothing of this: its cells are empty, not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from hcot_lmeval.control import Cause
from hcot_lmeval.report.entries import Entry
from hcot_lmeval.trace import Malformed

Value = float | int | None
MIB = 2**20


@dataclass(frozen=True)
class Column:
    """A column of a cost table.

    Attributes:
        key: its name in CSV and JSON.
        head: its name for readers.
        meaning: one line.
        value: from an entry to the cell.
        digits: behind the decimal point, for readers.
    """

    key: str
    head: str
    meaning: str
    value: Callable[[Entry], Value]
    digits: int = 0


def mean_of(name: str) -> Callable[[Entry], Value]:
    """The mean of a statistic over responses."""
    return lambda entry: fmean(stats[name] for stats in entry.requests) if entry.requests else None


def largest_of(name: str) -> Callable[[Entry], Value]:
    """The largest value of a statistic over responses."""
    return lambda entry: max(stats[name] for stats in entry.requests) if entry.requests else None


def malformed(entry: Entry) -> Value:
    """Faults of notation per response, whatever their kind."""
    return fmean(sum(stats["malformed"].values()) for stats in entry.requests) if entry.requests else None


def responses(entry: Entry) -> Value:
    """Responses, those of every seed."""
    return len(entry.requests) if entry.requests else None


def ended_by(reason: str) -> Callable[[Entry], Value]:
    """Responses that ended for a reason."""
    return lambda entry: sum(s["finish_reason"] == reason for s in entry.requests) if entry.requests else None


def faults_of(kind: str) -> Callable[[Entry], Value]:
    """Faults of notation of one kind, summed over responses."""
    return lambda entry: sum(s["malformed"].get(kind, 0) for s in entry.requests) if entry.requests else None


def loops(entry: Entry) -> Value:
    """Responses in which a loop was found."""
    return sum(stats["loops"] > 0 for stats in entry.requests) if entry.requests else None


def illegal_share(entry: Entry) -> Value:
    """Percent of the responses with anything that the grammar forbids; a cut response may have open blocks."""
    return 100 * fmean(stats["illegal_tokens"] > 0 for stats in entry.requests) if entry.requests else None


def forced_by(cause: str) -> Callable[[Entry], Value]:
    """Tokens that one cause changed, per response."""
    return lambda entry: fmean(s["forced"].get(cause, 0) for s in entry.requests) if entry.requests else None


def token_bytes(entry: Entry) -> int | None:
    """Bytes of the keys and values of one live token; None where the results do not tell."""
    totals = entry.runs[0].totals
    return totals.get("kv_bytes_per_token") if totals else None


def kv_mib(value: Callable[[Entry], Value]) -> Callable[[Entry], Value]:
    """Live tokens as MiB of keys and values."""

    def cell(entry: Entry) -> Value:
        tokens, size = value(entry), token_bytes(entry)
        return None if tokens is None or size is None else tokens * size / MIB

    return cell


def mean_live(entry: Entry) -> Value:
    """Live tokens as the mean over generated tokens, all responses together."""
    if not entry.requests:
        return None
    generated = sum(stats["generated_tokens"] for stats in entry.requests)
    return sum(stats["live_token_steps"] for stats in entry.requests) / generated if generated else None


def wall_seconds(entry: Entry) -> Value:
    """Seconds spent generating, summed over seeds."""
    totals = [run.totals for run in entry.runs]
    return sum(t["wall_seconds"] for t in totals if t) if all(totals) else None


def tokens_per_second(entry: Entry) -> Value:
    """Mean over seeds; None if a run took everything from its journal."""
    speeds = [run.totals["tokens_per_second"] if run.totals else None for run in entry.runs]
    known = [speed for speed in speeds if speed is not None]
    return fmean(known) if len(known) == len(speeds) else None


TOKENS = (
    Column("prompt_tokens", "prompt", "tokens of the prompt, mean", mean_of("prompt_tokens")),
    Column(
        "generated_tokens",
        "generated",
        "tokens sampled, those thrown away later included, mean",
        mean_of("generated_tokens"),
    ),
    Column("pruned_tokens", "pruned", "tokens thrown away by prunes, mean", mean_of("pruned_tokens")),
    Column(
        "reforwarded_tokens",
        "re-forwarded",
        "tokens forwarded a second time after a prune, the price of recompute, mean",
        mean_of("reforwarded_tokens"),
    ),
    Column(
        "live_tokens",
        "live at end",
        "prompt + generated - pruned when the response ended, mean",
        mean_of("live_tokens"),
    ),
    Column("prune_events", "prunes", "times that something was thrown away, mean", mean_of("prune_events"), 1),
)
COSTS = (
    Column(
        "peak_live_tokens",
        "peak live",
        "most tokens that the model saw at once in a response, prompt included, mean; a prompt that leaves no room in "
        "the window counts with its length, though it was not read",
        mean_of("peak_live_tokens"),
    ),
    Column("peak_live_tokens_largest", "largest", "the same, largest of all responses", largest_of("peak_live_tokens")),
    Column("mean_live_tokens", "mean live", "live tokens just after a generated token, mean over those", mean_live),
    Column(
        "kv_peak_mib",
        "KV peak",
        "MiB of keys and values of the largest peak, of one response",
        kv_mib(largest_of("peak_live_tokens")),
        2,
    ),
    Column(
        "kv_area_mib_tokens",
        "KV area",
        "MiB of keys and values held just after each generated token, summed over the response, mean",
        kv_mib(mean_of("live_token_steps")),
        1,
    ),
    Column(
        "wall_seconds", "seconds", "time spent generating all responses; those of a journal took none", wall_seconds, 1
    ),
    Column(
        "tokens_per_second",
        "tokens/s",
        "generated tokens a second, all responses side by side; empty if all came from a journal",
        tokens_per_second,
    ),
)
ENDS = (
    Column("responses", "responses", "all that are counted here, of every seed", responses),
    Column("eos", "eos", "responses that ended with the end token", ended_by("eos")),
    Column("stop", "stop", "responses that ended at a stop string of the task", ended_by("stop")),
    Column("length", "length", "responses cut at the limit of generated tokens", ended_by("length")),
    Column("context", "context", "responses cut at the window, the limit of live tokens", ended_by("context")),
    Column("loop", "loop", "responses cut because they repeated themselves (loop_tokens)", ended_by("loop")),
    Column("blocks", "blocks", "blocks closed, with a prune or without, mean", mean_of("blocks"), 1),
    Column("max_depth", "depth", "most blocks open at once, largest of all responses", largest_of("max_depth")),
    Column(
        "malformed",
        "malformed",
        "departures from the notation in a response, of all kinds together, mean",
        malformed,
        2,
    ),
    Column(
        "illegal_tokens",
        "illegal",
        "tokens that the grammar forbids at their place, ends and </think> within a block included, mean",
        mean_of("illegal_tokens"),
        2,
    ),
    Column("illegal_responses", "illegal %", "percent of the responses with at least one such token", illegal_share, 1),
)
FORCED = {
    Cause.GRAMMAR: "tokens that the grammar changed, since the model wanted an illegal one",
    Cause.DEPTH: "openings of blocks that max_depth forbade",
    Cause.THOUGHT: "thoughts ended by max_block_tokens",
    Cause.SOLUTION: "solutions ended by max_solution_tokens",
    Cause.ENDING: "tokens that force_answer changed or forced",
}
FAULTS = {
    Malformed.STRAY_SPLIT: "splitting markers outside any block",
    Malformed.STRAY_CLOSE: "closing markers outside any block",
    Malformed.UNSPLIT_CLOSE: "blocks closed without a solution; nothing is pruned",
    Malformed.REPEATED_SPLIT: "second splitting markers in one block; the solution starts at the last",
    Malformed.NESTED_OPEN: "opening markers within a block, in a notation without nesting",
    Malformed.MISSING_LEAD: "solutions that do not begin with the notation's lead token",
    Malformed.UNCLOSED: "blocks still open when the response ended",
}


def endings(entries: Sequence[Entry]) -> tuple[Column, ...]:
    """Returns columns of how responses ended and were written, one for each fault and each force that occurs."""
    requests = [stats for entry in entries for stats in entry.requests or ()]
    seen = {kind for stats in requests for kind in (*stats["malformed"], *stats["forced"])}
    looped = (Column("loops", "loops", "responses in which a repetition was found (loop_tokens)", loops),)
    forced = (
        Column(f"forced_{cause.value}", f"forced: {cause.value}", f"{meaning}, mean", forced_by(cause.value), 2)
        for cause, meaning in FORCED.items()
        if cause.value in seen
    )
    faults = (
        Column(kind.value, kind.value.replace("_", " "), meaning, faults_of(kind.value))
        for kind, meaning in FAULTS.items()
        if kind.value in seen
    )
    return (*ENDS, *(looped if any(stats["loops"] for stats in requests) else ()), *forced, *faults)
