"""Right or wrong: what lm-eval's samples files say about the traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcot_lmeval.report.results import Run, read_runs
from hcot_lmeval.report.viewer.reading import Source, Trace, ViewerError


@dataclass(frozen=True)
class Verdict:
    """What is known about a response.

    Attributes:
        score: 1 right, 0 wrong; of a problem with several responses the share of the right ones; None if unknown.
        gold: the right answer.
        level: the group of the problem (level, depth, ...) as text, or None.
        extracted: the answer as lm-eval's filter left it, or None.
    """

    score: float | None = None
    gold: str | None = None
    level: str | None = None
    extracted: str | None = None


class Verdicts:
    """Looks verdicts up.

    Args:
        runs: for each source the evaluations that its traces may come from; none: nothing is known.
    """

    def __init__(self, runs: dict[str, list[Run]] | None = None) -> None:
        self._runs = runs or {}
        self._asked = self._known = 0

    def of(self, trace: Trace, generated: int) -> Verdict:
        """Returns what is known about a trace of `generated` tokens.

        Raises:
            ViewerError: several evaluations could be meant, or the one found had another response.
        """
        self._asked += 1
        run = self._run_of(trace)
        if run is None:
            return Verdict(gold=trace.gold)
        sample = run.by_doc.get(trace.doc_id)
        if sample is None:
            return Verdict()
        self._known += 1
        _check_same(trace, sample, generated)
        level = None if run.grouping is None else f"{run.grouping} {sample['doc'][run.grouping]}"
        return Verdict(float(sample[run.metric]), str(sample["target"]), level, _extracted(sample, trace.repeat))

    def check_used(self) -> None:
        """Call this when every trace was looked up.

        Raises:
            ViewerError: there are evaluations, and none of the traces was in them.
        """
        if self._runs and not self._known:
            raise _unfitting("model, pruning, max_context and tasks")

    def remark(self) -> str | None:
        """Returns how many of the traces were not in the evaluations, if some were; call it after `check_used`."""
        if not self._runs or self._known == self._asked:
            return None
        unknown = self._asked - self._known
        return f"{unknown} of {self._asked} traces are not in --samples and are shown without right or wrong"

    def _run_of(self, trace: Trace) -> Run | None:
        fitting = [run for run in self._runs.get(trace.source.name, []) if run.task == trace.task]
        if len(fitting) > 1:
            paths = ", ".join(str(run.path.parent) for run in fitting)
            raise ViewerError(
                f"--samples holds {len(fitting)} evaluations of {trace.task} that {trace.source.name} may belong to "
                f"({paths}); give one narrower folder for each of the notes, in their order"
            )
        return fitting[0] if fitting else None


def read_verdicts(sources: Sequence[Source], folders: Sequence[Path]) -> Verdicts:
    """Reads the evaluations in `folders`: one for each source in order, or fewer that belong to all.

    Raises:
        ResultsError: a folder holds no evaluation.
        ViewerError: none of the evaluations was made with the model and the settings of the notes.
    """
    notes = [source for source in sources if source.is_notes]
    each = [read_runs(folder) for folder in folders]
    if len(each) != len(notes):
        each = [[run for runs in each for run in runs]] * len(notes)
    fitting = {
        source.name: [run for run in some if run.totals and run.agrees_with(source.run)]
        for source, some in zip(notes, each, strict=True)
    }
    if not any(fitting.values()):
        raise _unfitting("model, pruning and max_context")
    return Verdicts(fitting)


def _unfitting(what: str) -> ViewerError:
    fault = f"--samples holds no evaluation with the {what} of the notes"
    return ViewerError(f"{fault}; give the --output_path of the run that wrote them")


def _check_same(trace: Trace, sample: dict[str, Any], generated: int) -> None:
    requests = sample.get("requests")
    recorded = requests[trace.repeat]["generated_tokens"] if requests and trace.repeat < len(requests) else generated
    if recorded != generated:
        raise ViewerError(
            f"{trace.name} generated {generated} tokens, but the samples tell of {recorded}; "
            "they are of another run: give the --output_path of the run that wrote the notes"
        )


def _extracted(sample: dict[str, Any], repeat: int) -> str | None:
    answers = sample.get("filtered_resps") or []
    if len(answers) == 1 and isinstance(answers[0], list):  # take_first_k leaves one list of k
        answers = answers[0]
    return str(answers[repeat]) if repeat < len(answers) else None
