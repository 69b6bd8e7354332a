"""Formulas in the viewer: found in any text, shown in full or not at all, and never more than the page may build."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcot_lmeval.report.viewer.mathml import ATTRIBUTES, TAGS, formulas, mathml


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \( x^2 \) and \[ y \] it", [" x^2 ", " y "]),
        ("$a+b$ costs $5 and $6, $ x $ not", ["a+b"]),
        ("$$\n$$\nx = 1 $$\n$$\nthen", ["x = 1 "]),
        (r"is \boxed{\frac{1}{2}} here", [r"\boxed{\frac{1}{2}}"]),
        (r"\begin{align}a&=b\end{align}", [r"\begin{align}a&=b\end{align}"]),
        (r"\boxed{open", []),
        ("$$ $$", []),
        (r"\( never ends", []),
    ],
)
def test_formulas_are_found(text, found):
    assert [formula.latex.strip("\n") for formula in formulas(text)] == found


@pytest.mark.parametrize(
    "latex",
    [
        r"\foo{x}",
        r"\frac{1}",
        "x^2^3",
        r"\phantom{x}",
        r"\newcommand{\a}{\a\a}\a",
        "&",
        r"\left(",
        "{" * 500,
        "x" * 5000,
    ],
)
def test_what_cannot_be_shown_in_full_stays_text(latex):
    assert mathml(latex, False) is None


def test_markup_in_a_formula_is_text_and_its_attributes_are_dropped():
    assert mathml(r"\text{<img src=x onerror=alert(1)>}", False)[2][2][2] == "<img\xa0src=x\xa0onerror=alert(1)>"
    for latex in (
        r"\href{javascript:alert(1)}{x}",
        r"\style{position:fixed}{x}",
        r"\class{top}{x}",
        r"\hspace{999em}x",
    ):
        text = json.dumps(mathml(latex, False))
        assert not re.search("javascript|position|top|999", text), text


def nodes(tree):
    yield tree[0], tree[1]
    for child in tree[2:]:
        if not isinstance(child, str):
            yield from nodes(child)


TOKENS = (
    r"\frac \sqrt \text \left( \right) { } ^ _ & \\ x 1 + \boxed \begin{align} \end{align} $ \( \) \[ \] $$ <b> \href"
).split()
LATEX = st.lists(
    st.sampled_from(TOKENS),
    max_size=14,
).map(" ".join)


@given(st.one_of(st.text(max_size=40), LATEX))
def test_any_text_yields_formulas_in_order_and_nothing_but_what_is_allowed(text):
    place = 0
    for formula in formulas(text):
        assert place <= formula.start < formula.stop <= len(text)
        place = formula.stop
        for tag, attributes in nodes(mathml(formula.latex, formula.display) or ["math", {}]):
            assert tag in TAGS | {"math"}
            assert set(attributes) <= {*ATTRIBUTES, "display"}


@pytest.mark.parametrize("opening", [r"\[", r"\(", "$$ ", "$x", r"\boxed{", r"\begin{align}"])
def test_openings_without_an_end_are_read_in_one_pass(opening):
    """Were the search quadratic, this would take minutes."""
    assert list(formulas(opening * 20_001)) == [] or opening in ("$$ ", "$x")


def test_the_usual_formulas_can_be_shown():
    text = r"""\( r^2 + s^2 \) \(\frac{|r - s|}{2} = 6\sqrt{3}\) \[ (r+s) \times 3 = 72 \implies s = 24 \] $45^\circ$
    \begin{aligned}a&=b\\c&=d\end{aligned} $\lfloor x \rfloor \cdot \binom{a}{b}$ \(\boxed{504}\) \(\sum_{i=1}^n i\)"""
    assert [f.latex for f in formulas(text) if mathml(f.latex, f.display) is None] == []
