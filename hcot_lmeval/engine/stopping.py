"""Text as it grows: incremental decoding, and stop strings that act in the answer part alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hcot_lmeval.vocabulary import Pair, changes

Decode = Callable[[Sequence[int]], str]


class IncrementalText:
    """The text of a growing token sequence; a token is decoded together with its neighbours.

    A decoder may hold back bytes until a character is complete and may drop a space at the start of a sequence, so each
    addition is decoded behind tokens that are known already and their text is taken off.
    """

    def __init__(self, decode: Decode) -> None:
        self.text = ""
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # decoding starts here
        self._read = 0  # up to here the text is in self.text

    def append(self, token: int) -> None:
        """Adds a token; its text appears once its characters are complete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._read])
        after = self._decode(self._ids[self._context :])
        if len(after) > len(before) and not after.endswith("�"):
            self.text += after[len(before) :]
            self._context, self._read = self._read, len(self._ids)


class StopStrings:
    """Looks for stop strings in the answer part of one row: outside the thinking section and with no block open.

    Args:
        strings: what ends the row.
        decode: token ids to text, markers and thinking tokens included, other special tokens left out.
        think: the strings around the thinking section, or None if the model has none.
        thinking: whether the prompt left a thinking section open.
    """

    def __init__(
        self, strings: Sequence[str], decode: Decode, think: Pair | None = None, thinking: bool = False
    ) -> None:
        self._strings = strings
        self._longest = max(map(len, strings), default=0)
        self._text = IncrementalText(decode)
        self._think = think
        self._thinking = thinking and think is not None
        self._start = 0  # the answer part begins here, as far as is known
        self._passed = 0  # what ends here or before does not count
        self._depth = 0

    @property
    def text(self) -> str:
        return self._text.text

    def append(self, token: int, depth: int) -> None:
        """Adds a generated token after which `depth` blocks are open."""
        known = len(self.text)
        self._text.append(token)
        self._follow_thinking(known)
        if self._thinking or depth or self._depth:  # a closing marker belongs to its block
            self._start = len(self.text)
        self._depth = depth

    def pass_over(self) -> None:
        """What the text ends with now is no match, be it a stop string."""
        self._passed = len(self.text)

    def find(self) -> tuple[str, int] | None:
        """Returns the stop string that appears first and where, or None."""
        starts = [max(self._start, self._passed - len(string) + 1) for string in self._strings]
        hits = [(self.text.find(s, start), s) for s, start in zip(self._strings, starts, strict=True)]
        found = [(at, string) for at, string in hits if at >= 0]
        if not found:
            self._start = max(self._start, len(self.text) - self._longest)
            return None
        at, string = min(found)
        return string, at

    def _follow_thinking(self, known: int) -> None:
        """Notices every opening and closing of the thinking section that the text added after `known` completes."""
        if self._think is None:
            return
        tail = max(0, known - max(map(len, self._think)) + 1)
        for thinking, at in changes(self.text, self._think, self._thinking, tail):
            self._thinking, self._start = thinking, max(self._start, at)
