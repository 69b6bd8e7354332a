"""The markers of a hierarchical trace as data: which token opens, splits and closes a block, and which survive a prune.

A block is ``[open] thought [split] solution [close]``. When it closes, the thought is thrown away together with every
marker that is not named in :attr:`Markup.keep`. Three published notations are three values of this one record:

========= ============================================== =========================
preset    written                                        after the prune
========= ============================================== =========================
hcot      ``C [THOUGHT] T [SOLUTION] S [RETURN]``        ``C [THOUGHT] S [RETURN]``
pencil    ``C [CALL] T [SEP] A [RETURN]``                ``C A``
memento   ``C <|block_start|> T <|block_end|>``          ``C <|block_start|><|block_end|>``
          ``<|summary_start|> S <|summary_end|>``        ``<|summary_start|> S <|summary_end|>``
========= ============================================== =========================

Sources: hcot, the published checkpoint ``anujjamwal/OpenMath-Nemotron-1.5B-PruneAware``; pencil, arXiv 2503.14337;
memento, Microsoft's block-and-summary models (the variant trained with visible delimiters).

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal["open", "split", "close"]


@dataclass(frozen=True)
class Markup:
    """The marker strings of one notation.

    Attributes:
        name: how users select it (``markup=hcot``).
        open: starts a thought.
        split: ends the thought and starts the solution.
        close: ends the solution; the thought is pruned here.
        keep: the roles whose token stays in the context after the prune.
        nested: whether a block may contain blocks. In a flat notation a second ``open`` is plain text.
        lead: a token that has to follow ``split`` at once and belongs to the solution, or None.
        think: the pair of tokens around the whole reasoning part.
    """

    name: str
    open: str
    split: str
    close: str
    keep: frozenset[Role]
    nested: bool = True
    lead: str | None = None
    think: tuple[str, str] = ("<think>", "</think>")

    @property
    def markers(self) -> tuple[str, ...]:
        """Every string that acts on the trace, in the order in which a block writes them."""
        return tuple(m for m in (self.open, self.split, self.lead, self.close) if m is not None)

    @property
    def rule(self) -> str:
        """The rewriting rule in one line, for help texts and reports."""
        lead = self.lead or ""
        before = f"C {self.open} T {self.split}{lead} S {self.close}"
        roles: tuple[tuple[Role, str], ...] = (("open", self.open), ("split", self.split + lead))
        kept = [text for role, text in roles if role in self.keep]
        tail = [self.close] if "close" in self.keep else []
        return f"{before} => {' '.join(['C', *kept, 'S', *tail])}"


PRESETS: dict[str, Markup] = {
    "hcot": Markup("hcot", "[THOUGHT]", "[SOLUTION]", "[RETURN]", keep=frozenset({"open", "close"})),
    "pencil": Markup("pencil", "[CALL]", "[SEP]", "[RETURN]", keep=frozenset()),
    "memento": Markup(
        "memento",
        "<|block_start|>",
        "<|block_end|>",
        "<|summary_end|>",
        keep=frozenset({"open", "split", "close"}),
        nested=False,
        lead="<|summary_start|>",
    ),
}


def get_markup(name: str | Markup) -> Markup:
    """Returns the preset called `name`; a `Markup` passes through.

    Raises:
        ValueError: no preset has that name.
    """
    if isinstance(name, Markup):
        return name
    if name not in PRESETS:
        raise ValueError(f"markup={name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True, slots=True)
class MarkerIds:
    """A :class:`Markup` resolved to the token ids of one vocabulary; what the pruning rule works on."""

    open: int
    split: int
    close: int
    keep: frozenset[Role] = frozenset({"open", "close"})
    nested: bool = True
    lead: int | None = None

    def __post_init__(self) -> None:
        ids = [i for i in (self.open, self.split, self.close, self.lead) if i is not None]
        if len(set(ids)) != len(ids):
            raise ValueError(f"the marker ids {ids} are not distinct; each marker needs a token of its own")

    @property
    def ids(self) -> frozenset[int]:
        """The ids that act on the trace."""
        return frozenset(i for i in (self.open, self.split, self.close, self.lead) if i is not None)


def resolve_markers(markup: Markup, token_id: Callable[[str], int | None]) -> MarkerIds:
    """Looks every marker of `markup` up in a vocabulary.

    Args:
        markup: the notation.
        token_id: maps a string to the id of the single token that spells it, or to None.

    Raises:
        ValueError: some markers are missing; the message names them all.
    """
    found = {text: token_id(text) for text in markup.markers}
    missing = [text for text, i in found.items() if i is None]
    if missing:
        raise ValueError(
            f"the tokenizer lacks the {markup.name} marker{_plural(missing)} {', '.join(missing)}. "
            "Add them with hcot_lmeval.tokens.add_special_tokens(tokenizer, model, markup) and train the model on "
            "them, choose another markup, or run with pruning=off, which needs no markers."
        )
    return MarkerIds(
        open=found[markup.open],  # type: ignore[arg-type]
        split=found[markup.split],  # type: ignore[arg-type]
        close=found[markup.close],  # type: ignore[arg-type]
        keep=markup.keep,
        nested=markup.nested,
        lead=None if markup.lead is None else found[markup.lead],
    )


def _plural(items: Iterable[object]) -> str:
    return "s" if len(list(items)) > 1 else ""
