"""Why a row is rejected: every code with its sentence, and the error that carries one."""

from __future__ import annotations

READING = {
    "broken_line": "the line is no JSON object in UTF-8, or one that has a key twice",
    "no_column": "the row lacks the columns of a question and a trace, or has two for one of them",
    "no_question": "the question is missing or blank",
    "no_text": "the trace is missing, blank or no text",
    "no_thinking": "the text has no thinking section",
    "unclosed_thinking": "the thinking section has no end",
    "several_thoughts": "thinking tags come more than once",
    "text_before_thinking": "there is text before the thinking section",
    "empty_thinking": "the thinking section is blank",
    "lone_surrogate": "a column holds half of a character, which no file of text can hold",
    "not_text": "a message has a part that is no text",
    "several_turns": "the conversation has turns before its last question, which a row cannot hold",
    "no_answer": "the expected answer is none: not a number, infinite, or no plain value",
    "uneven_lists": "columns list several traces and responses, and not as many of the one as of the other",
    "marked_wrong": "the data set itself calls the trace wrong",
    "broken_record": "a column holds something else than prepared rows have there",
}
"""Of a row that could not be read."""
CODES = {
    "not_an_outline": "the data is no outline: a key is missing or unknown, or a value has another type",
    "unknown_kind": "a block is of another kind than subproblem and backtrack",
    "out_of_range": "a block or its split lies outside of the sentences, or outside of the block",
    "empty_block": "a block has no sentence in it, or no thought before its solution",
    "empty_solution": "a block has no solution, or one that is blank",
    "both_solutions": "a block has a solution in the text and another one that is added",
    "overlap": "two blocks overlap and neither is within the thought or within the solution of the other",
    "too_deep": "blocks are nested deeper than is allowed",
    "marker_in_solution": "an added solution spells a marker",
    "marker_in_source": "the text spells a marker",
    "other_pieces": "the outline is for another number of sentences",
}
"""Of an outline, a teacher's or a stored one."""
FAILURES = {
    "wrong_json": "the reply is no JSON",
    "schema": "the reply is JSON of another form than was asked for",
    "truncated": "the reply ends at the limit of output tokens",
    "refused": "the teacher or its content filter declined to answer",
    "empty_reply": "the reply has no text",
    "broken_text": "the reply holds half of a character (a lone surrogate)",
    "bad_request": "the server does not accept the question, perhaps for its length",
    "broken_response": "the server's response could not be read",
    "timeout": "no reply came in time",
    "rate_limited": "the server kept asking to come back later",
    "server_error": "the server kept failing",
    "connection": "the connection kept breaking",
    "budget": "it was not asked, for a limit of requests, tokens or money would have been crossed",
    "no_outline": "the row has no outline that a teacher could add to",
    "blocks_differ": "the judge speaks of other blocks than it was asked about",
}
"""Of a teacher's reply, or where there is none."""
CHECKING = {
    "malformed": "the markers are not those of well-formed blocks",
    "no_blocks": "the trace has no block",
    "too_deep": "blocks are nested deeper than is allowed",
    "empty_thought": "a block has nothing before its solution",
    "empty_solution": "a block has no solution, or one that is blank",
    "solution_not_shorter": "a solution is not shorter than its thought",
    "solution_insufficient": "the judge says that a solution leaves out what the rest needs",
    "unjudged": "the judge's reply was of no use",
    "words_changed": "words of the source are missing, or there are new ones outside of solutions",
    "answer_missing": "the row has no final answer in a box",
    "answer_differs": "the final answer is not the expected one",
    "answer_unchecked": "the final answer could not be compared with the expected one",
    "marker_in_source": "the source spells a marker or thinking token",
    "control_token_in_source": "the source spells what looks like a control token",
    "too_long": "the trace is longer than is allowed",
    "too_short": "the trace is shorter than is allowed",
    "peak_too_high": "the live context under pruning grows larger than is allowed",
    "duplicate": "an earlier row has the same words",
    "near_duplicate": "an earlier row has nearly the same words",
    "repeated_id": "an earlier row has the same id",
    "contaminated": "the row holds a problem of an evaluation task",
}
"""Of a fault that a check finds."""
REASONS: dict[str, str] = {**READING, **CODES, **FAILURES, **CHECKING}
TEMPORARY = frozenset({"timeout", "rate_limited", "server_error", "connection", "budget", "broken_response"})
"""Codes that may be gone next time: such a question is asked again by the next run."""


class Refused(ValueError):
    """Something that is of no use for a reason; `code` is a key of `REASONS`, `detail` says what and where."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{REASONS[code]}: {detail}")
        self.code, self.detail = code, detail

    def __reduce__(self) -> tuple[type[Refused], tuple[str, str]]:
        return type(self), (self.code, self.detail)  # or a worker process could not hand it back
