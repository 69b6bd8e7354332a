"""Notes of the engine as traces: the markers and the rule of the run, and which characters each token is.

Notes hold token ids and one text, not the text of each token. Markers are found in the text in their order, so the
borders of every thought and solution are exact; within a run of text the borders of tokens are spread evenly. With a
tokenizer they are exact there too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from hcot_lmeval.ablation import Ablation
from hcot_lmeval.markup import MarkerIds, Markup, get_markup
from hcot_lmeval.report.viewer.reading import Source, Trace, ViewerError, doc_name, records
from hcot_lmeval.trace import LiveContext, Malformed, Policy

Decode = Callable[[Sequence[int]], str]
Record = Mapping[str, Any]

ACTS = {"Open": "open", "Split": "split", "Close": "close", "Prune": "close"}
"""Type of event -> the marker that its id is."""
STRAYS = {Malformed.STRAY_SPLIT: "split", Malformed.STRAY_CLOSE: "close", Malformed.NESTED_OPEN: "open"}
"""Fault -> the marker that its token is."""


def note_traces(source: Source, decode: Decode | None = None) -> Iterator[Trace]:
    """Yields the traces of a source of notes, in the order of its files.

    Their text is that in the notes, or what `decode` makes of the token ids, markers included.

    Raises:
        ViewerError: a line is no note, its markup is unknown, or its text lacks its markers.
    """
    try:
        markup = get_markup(source.run.get("markup") or "hcot")
    except ValueError as error:
        raise ViewerError(f"{source.paths[0]}: {error}") from None
    for path in source.paths:
        for record in records(path):
            try:
                yield _trace(source, record, markup, decode)
            except KeyError as error:
                raise ViewerError(f"{path}: a line is no note, for it lacks {error}; was the file changed?") from None


def _trace(source: Source, record: Record, markup: Markup, decode: Decode | None) -> Trace:
    prompt_ids, ids, meta = record["prompt_ids"], record["token_ids"], record["meta"]
    markers = find_markers(markup, record)
    context = _context_maker(source.run, record, markers)
    if decode is not None:
        prompt, text, offsets = decode(prompt_ids), *_spelled(ids, decode)
    else:
        prompt, text, offsets = _written(source, record, markup, markers)
    last = record["events"][-1]
    return Trace(
        source=source,
        task=str(meta.get("task", record["request"])),
        doc_id=doc_name(meta.get("doc_id", record["request"])),
        repeat=int(meta.get("repeat", record["sample"])),
        prompt=prompt,
        text=text,
        prompt_ids=prompt_ids,
        ids=ids,
        offsets=offsets,
        context=context,
        prompt_acts=_prompt_acts(record, context()),
        finish=last["reason"] if last["type"] == "Finish" else "",
        wall_seconds=record["statistics"]["wall_seconds"],
        recorded=record["events"],
    )


# --- the rule of the run ----------------------------------------------------------------------------------------------


def find_markers(markup: Markup, record: Record) -> MarkerIds:
    """Reads the ids of the markers off the events; what was never generated gets an id that no token has.

    The lead of a flat notation is the token behind the split of any block that was closed without lacking its lead.
    """
    found = {"open": -1, "split": -2, "close": -3}
    lead, split, events = -4, None, record["events"]
    tokens = dict(enumerate(record["token_ids"], len(record["prompt_ids"])))
    missed = {event["index"] for event in events if event.get("kind") == Malformed.MISSING_LEAD}
    for event in events:
        act = ACTS.get(event["type"]) or STRAYS.get(event.get("kind"))
        if act is not None:
            found[act] = tokens[event["index"]]
        if event["type"] in ("Open", "Split"):
            split = event["index"] if event["type"] == "Split" else None
        elif event["type"] in ("Close", "Prune") and split is not None and event["index"] not in missed and lead < 0:
            lead = tokens[split + 1]
    return MarkerIds(**found, keep=markup.keep, nested=markup.nested, lead=lead if markup.lead is not None else None)


def _context_maker(run: Mapping[str, Any], record: Record, markers: MarkerIds) -> Callable[[], LiveContext]:
    policy = Policy(run.get("pruning") or Policy.RECOMPUTE)
    if not run.get("ablation"):
        return lambda: LiveContext(markers, policy)
    ablation = Ablation.parse(run["ablation"])
    sweeps = [event["id"] for event in record["events"] if event["type"] == "Sweep"]
    return lambda: ablation.context(
        markers,
        policy,
        prompt_len=len(record["prompt_ids"]),
        think_end=sweeps[0] if sweeps else -5,  # no sweep: the thinking did not end, or nothing waited
        seed=_seed(record) if ablation.variant == "random" else 0,
    )


def _seed(record: Record) -> int:
    """The seed of one sample, as the engine derives it."""
    from hcot_lmeval.engine.sampling import derive_seed  # pulls in torch

    return derive_seed(record["meta"].get("seed", 0), record["sample"])


def _prompt_acts(record: Record, context: LiveContext) -> bool:
    """Whether markers in the prompt acted: the notes say how much of it stayed, and at which depth it ended."""
    length = len(record["prompt_ids"])
    first = next((event for event in record["events"] if "depth" in event), None)
    if first is None or record["events"][0]["live"] < length:
        return record["events"][0]["live"] < length
    for token in record["prompt_ids"]:
        context.push_inert(token)
    steps = [context.push(token) for token in record["token_ids"][: first["index"] + 1 - length]]
    return steps[-1].depth != first["depth"]


# --- text -------------------------------------------------------------------------------------------------------------


def _spelled(ids: Sequence[int], decode: Decode) -> tuple[str, list[int]]:
    """Decodes every token; a character that several tokens spell together belongs to the last of them."""
    text, offsets, start = "", [], 0
    for index in range(len(ids)):
        offsets.append(len(text))
        piece = decode(ids[start : index + 1])
        if piece.endswith("\N{REPLACEMENT CHARACTER}") and index - start < 4 and index + 1 < len(ids):
            continue  # an unfinished character; UTF-8 has at most four bytes
        text, start = text + piece, index + 1
    return text, [*offsets, len(text)]


def _written(source: Source, record: Record, markup: Markup, markers: MarkerIds) -> tuple[str, str, list[int]]:
    ids = record["token_ids"]
    if "text" not in record:
        text = "".join(f"{token} " for token in ids)
        prompt = " ".join(map(str, record["prompt_ids"]))
        return prompt, text, [0, *accumulate(len(str(token)) + 1 for token in ids)]
    text = record["text"]
    spelling = {markers.open: markup.open, markers.split: markup.split, markers.close: markup.close}
    acting = [(i, spelling[token]) for i, token in enumerate(ids) if token in spelling]
    places = locate(text, [marker for _, marker in acting], len(ids), [i for i, _ in acting])
    if places is None:
        raise ViewerError(
            f"{record['request']} of {source.name}: the text does not hold the markers that the token ids have; "
            "give the tokenizer of the run with --tokenizer NAME"
        )
    known = [(i, at, marker) for (i, marker), at in zip(acting, places, strict=True)]
    return record["prompt"], text, spread(len(ids), len(text), known)


def locate(text: str, wanted: Sequence[str], count: int, indices: Sequence[int]) -> list[int] | None:
    """Finds where the marker tokens are in a decoded text.

    Text tokens may spell a marker as well (``[``, ``THOUGHT``, ``]``). Where a text holds more markers than there are
    marker tokens, those are taken that leave to every run of tokens the share of the characters nearest to its share
    of the tokens.

    Args:
        text: what `count` tokens decode to.
        wanted: the marker tokens in order, as strings.
        count: how many tokens there are.
        indices: for each marker token its index among the tokens.

    Returns:
        Where each begins in `text`, or None if the text does not hold them.
    """
    if not wanted:
        return []
    found = [(m.start(), m[0]) for m in re.finditer("|".join(map(re.escape, sorted(set(wanted)))), text)]
    if [marker for _, marker in found] == list(wanted):
        return [at for at, _ in found]
    latest = _latest([marker for _, marker in found], wanted)
    if latest is None:
        return None
    rate, place = len(text) / max(count, 1), 0
    places: list[int] = []
    for number, last in enumerate(latest):
        begin = places[-1] if places else 0
        due = begin + (indices[number] - (indices[number - 1] if number else 0)) * rate
        fitting = [(abs(found[p][0] - due), p) for p in range(place, last + 1) if found[p][1] == wanted[number]]
        place = min(fitting)[1]
        places.append(found[place][0])
        place += 1
    return places


def _latest(spelled: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """For each wanted marker the last place at which it can stand with all that follow it still behind, or None."""
    places: list[int] = []
    place = len(spelled)
    for marker in reversed(wanted):
        place = next((p for p in range(place - 1, -1, -1) if spelled[p] == marker), -1)
        if place < 0:
            return None
        places.append(place)
    return places[::-1]


def spread(count: int, length: int, fixed: Sequence[tuple[int, int, str]]) -> list[int]:
    """Returns the offsets of `count` tokens in a text of `length` characters, evenly between those that are known.

    Known, in `fixed`, are the index of a token, where it begins, and what it is.
    """
    offsets: list[int] = []
    token = at = 0
    for index, begin, spelled in [*fixed, (count, length, "")]:
        width = index - token
        offsets += [at + (begin - at) * i // width for i in range(width)]
        offsets.append(begin)
        token, at = index + 1, begin + len(spelled)
    return offsets
