r"""Bringing the many spellings of one answer to one spelling of LaTeX. Notation only: no rule here knows any value.

``normalize`` keeps meaning: ``\text{..}`` stays marked, "and" and "or" become ``\and`` and ``\or``, degrees and percent
signs stay.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/",
    "⁄": "/", "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ",
    "≡": r"\equiv ", "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "°": r"^{\circ}", "º": r"^{\circ}", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ", "ω": r"\omega ", "σ": r"\sigma ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "→": r"\to ", "⇒": r"\implies ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "′": "'", "’": "'", "٫": ".", "٬": ",",
    "、": ",", "。": ".", "۔": ".", "।": ".", "٪": r"\%", "“": "", "”": "",
    "∖": r"\setminus ", "…": r"\ldots ", "\0": "",
}  # fmt: skip
_RADICAL = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|\w))")

_STYLE = r"displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|Large|large|normalsize|left|right|mleft|mright"
_STYLES = re.compile(rf"\\(?:(?:{_STYLE}|[bB]igg?[lrm]?)(?![A-Za-z])\s?)")
_FUNCTIONS = (
    "arcsin", "arccos", "arctan", "arccot", "sinh", "cosh", "tanh", "coth", "sin", "cos", "tan", "cot", "sec", "csc",
    "log", "ln", "exp", "sqrt", "max", "min", "gcd", "lcm", "det",
)  # fmt: skip
_GREEK = (
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa",
    "lambda", "mu", "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega",
    "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega",
)  # fmt: skip
_COMMANDS = (
    *_FUNCTIONS, *_GREEK,
    "cdot", "times", "frac", "binom", "infty", "leq", "geq", "neq", "approx", "equiv", "pm", "mp", "cup", "cap", "in",
    "notin", "setminus", "text", "mathbb", "sum", "prod", "int", "lim", "lfloor", "rfloor", "lceil", "rceil", "pmod",
    "mod", "overline", "bar", "hat", "emptyset", "circ",
)  # fmt: skip
_KNOWN = frozenset(_COMMANDS)

_ALIASES = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "le": "leq", "ge": "geq",
    "leqslant": "leq", "geqslant": "geq", "leqq": "leq", "geqq": "geq", "ne": "neq", "times": "cdot", "ast": "cdot",
    "cdotp": "cdot", "div": "/", "lt": "<", "gt": ">", "lbrack": "[", "rbrack": "]", "lbrace": "{", "rbrace": "}",
    "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "varnothing": "emptyset", "degree": "^{\\circ}",
    "Rightarrow": "implies", "Longrightarrow": "implies", "therefore": "implies", "rightarrow": "to", "colon": ":",
    "land": "and", "wedge": "and", "lor": "or", "vee": "or", "infin": "infty", "backslash": "setminus",
    "arctg": "arctan", "bmod": "mod",
    "tg": "tan", "ctg": "cot", "reals": "mathbb{R}", "R": "mathbb{R}", "N": "mathbb{N}", "Z": "mathbb{Z}",
    "sim": "approx",
    "percent": "%", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "simeq": "approx", "langle": "(",
    "rangle": ")",
}  # fmt: skip
_PLAIN = frozenset("/<>[]|:()") | {"^{\\circ}"}

_TEXT_COMMANDS = (
    r"text|textbf|textit|textrm|textnormal|textsf|texttt|mbox|hbox|emph|mathrm|mathbf|mathit|mathsf|mathcal"
)
_WRAPPED = re.compile(
    rf"\\(?:{_TEXT_COMMANDS}|boldsymbol|bm|operatorname\*?|mathop|underline|rm|bf)\s*\{{([^{{}}]*)\}}|\\text\s+(\w)"
)
_AND = re.compile(
    r"(?:,\s*)?\\text\s*\{[\s,]*(?:and|und|et|\s[ye]\s|dan|和|と|및|و)[\s,]*\}|(?:,\s*)?(?<![A-Za-z\\])and(?![A-Za-z])"
)
_OR = re.compile(
    r"(?:,\s*)?\\text\s*\{[\s,]*(?:or|oder|ou|\so\s|atau|或|または)[\s,]*\}|(?:,\s*)?(?<![A-Za-z\\])or(?![a-z])"
)
_TIGHT_OR = re.compile(r"(?<=\d)or(?=[A-Za-z(]+\s*=|-?\d)")

_GROUPED = r"[1-9]\d{0,2}(?:,\d{3})+"
_INDIAN = r"[1-9]\d?(?:,\d{2})+,\d{3}"
_DOTTED = re.compile(r"(?<![\w.,'])[1-9]\d{0,2}(?:(?:'\d{3})+|(?:\.\d{3}){2,}|(?:\.\d{3})+(?=,\d{1,2}(?!\d)))(?![\d'])")
_POWERS = {
    2: "hundred 百 백",
    3: "thousand thousands mille mil mila tausend ribu nghìn ngàn elfu тысяча тысячи тысяч тыс 千 천 ألف हज़ार हजार "
    "হাজার వేల พัน",
    4: "万 萬 만 หมื่น",
    5: "lakh lakhs लाख লক্ষ লাখ లక్ష แสน",
    6: "million millions millionen millón millones milhão milhões milione milioni juta triệu миллион миллиона "
    "миллионов млн مليون ล้าน",
    7: "crore crores करोड़ কোটি కోటి",
    8: "亿 億 억",
    9: "billion billions milliard milliards milliarde milliarden miliardo miliardi bilhão bilhões miliar tỷ миллиард "
    "миллиарда миллиардов млрд مليار",
    12: "trillion trillions 兆 조",
}
"""Words for powers of ten in the languages of PolyMath. A billion in English is 10^9."""
_POWER_OF = {unicodedata.normalize("NFKC", word): power for power, words in _POWERS.items() for word in words.split()}
_SCALED = re.compile(  # 2.5 million, 3\text{ million dollars}, 12万人
    r"(?<=[\d}])\s?(\\text\s?\{\s?)?(dozen|"
    + "|".join(sorted(_POWER_OF, key=len, reverse=True))
    + r")(?![^\W\d_\u0900-\uffff])(?:\s(?:de|of)(?![^\W\d_]))?",
    re.IGNORECASE,
)


def _scaled(match: re.Match[str]) -> str:
    word = match[2].lower()
    factor = "12" if word == "dozen" else f"10^{{{_POWER_OF[word]}}}"
    return rf"\cdot {factor}{match[1] or ''}"


@lru_cache(maxsize=4096)
def normalize(text: str) -> str:
    """Returns the canonical LaTeX of an answer, without delimiters, styles, or trailing punctuation."""
    text = re.sub(r"\s+", " ", _delimiters(_unicode(text)))
    text = re.sub(r"\s+", " ", _commands(_spacing(text)))
    text = _words(text)
    text = _arguments(_numbers(text))
    return _trim(_balance(re.sub(r"\s+", " ", text)))


def readings(text: str, other: str, *, is_gold: bool = False) -> list[str]:
    """Returns the readings of a normalized answer: digits grouped by commas are one number or several.

    A single comma is a decimal comma only if `other`, the answer on the other side, is written with a decimal point.
    ``2e-4`` is 0.0002 or, with Euler's number, 2e - 4. An answer of ``2.5 million`` is 2500000, or 2.5 where the gold
    answer has no such word, for it may count millions.
    """
    text = _DOTTED.sub(lambda match: re.sub(r"['.]", "", match.group()), text)
    scaled = _SCALED.sub(_scaled, text)
    if scaled != text:
        return [*readings(scaled, other), *([] if is_gold or _SCALED.search(other) else [text])]
    joined = re.sub(rf"(?<![\d,.])(?:{_GROUPED}|{_INDIAN})(?!,?\d)", lambda match: match.group().replace(",", ""), text)
    found = [joined, text] if joined != text else [text]
    printed = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![\w.])", r"\1\\cdot 10^{\2}", text)
    found += [printed] if printed != text else []
    if re.fullmatch(r"-?(?:\d+,\d{2,}|0,\d)", text) and re.fullmatch(r"-?\d+\.\d+", other):
        found.append(text.replace(",", "."))
    return found


def _unicode(text: str) -> str:
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+", lambda match: "^{" + match.group().translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+", lambda match: "_{" + match.group().translate(_SUBSCRIPTS) + "}", text)
    text = re.sub("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒]", _vulgar, text)
    text = _RADICAL.sub(lambda match: r"\sqrt{" + (match[1] or match[2] or match[3] or "") + "}", text)
    text = "".join(_SYMBOLS.get(char, char) for char in text)
    text = unicodedata.normalize("NFKC", text)
    return "".join(_character(char) for char in text)


def _vulgar(match: re.Match[str]) -> str:
    top, bottom = unicodedata.normalize("NFKC", match.group()).split("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _character(char: str) -> str:
    if char.isascii():
        return char
    if unicodedata.category(char) in ("Cf", "Sc"):  # what shows nothing, as the direction of Arabic; other dollars
        return ""
    digit = unicodedata.decimal(char, None)
    return str(digit) if digit is not None else _SYMBOLS.get(char, char)


def _delimiters(text: str) -> str:
    text = re.sub(r"\\(left|right)\s*\\([\[\]()])", r"\2", text)  # `\right\]`: meant as a bracket
    if not re.search(r"\\begin", text):
        text = re.sub(
            r"(?<!\\)\\{2,}+(?=[A-Za-z%$()\[\]])", lambda _: "\\", text
        )  # escaped twice on its way through JSON
    text = re.sub(r"\\(?:left|right)\s*\.", " ", text)
    text = re.sub(r"^\s*(\*\*|`+)(.*)\1\s*$", r"\2", text, flags=re.DOTALL)  # of Markdown
    text = re.sub(r"\\[()\[\]]|\\?\$|\\(?:euro|pounds|yen)(?![A-Za-z])|\\(?:label|tag)\{[^{}]*\}", " ", text)
    return _STYLES.sub(" ", text)


def _spacing(text: str) -> str:
    text = re.sub(r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d)|(?<=\d),\s*\\!\s*(?=\d)", "", text)
    text = re.sub(r"(?<=\d)(?:\\[,;: ]|~|\u00a0|\u202f)\s*(?=\d{3}(?!\d))", "", text)
    text = re.sub(
        r"(?<!\\)\\(?:q?quad|thinspace|medspace|enspace|,|;|:|!|\s|>)(?![A-Za-z])|\\q?quad|~|\\hspace\*?\{[^{}]*\}",
        " ",
        text,
    )
    if re.fullmatch(r"\s*-?\d{1,3}(?: \d{3})+(?:\.\d+)?\s*", text):
        text = text.replace(" ", "")
    return text


def _commands(text: str) -> str:
    text = re.sub(r"\\(?:text)?color\s*\{[^{}]*\}", " ", text)
    text = re.sub(r"\\([A-Za-z]+)", _command, text)
    for _ in range(3):
        text, count = _WRAPPED.subn(_unwrap, text)
        if not count:
            break
    text = text.replace("\0", r"\text")
    text = re.sub(r"\\(sin|cos|tan|cot)\s*\^\s*(?:\{\s*-\s*1\s*\}|-1)", r"\\arc\1 ", text)
    return re.sub(r"\^\s*\\circ(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}|\^\s*\{\s*o\s*\}", r"^{\\circ}", text)


def _command(match: re.Match[str]) -> str:
    name = match.group(1)
    new = _ALIASES.get(name, name)
    if new in _PLAIN:
        return new
    if new in "{}%":
        return "\\" + new
    if new in _KNOWN or name in _ALIASES or re.fullmatch(_TEXT_COMMANDS, name) or len(name) < 3:
        return (
            f"\\{new} "
            if new != "text" and not new.endswith("}") and new in (*_GREEK, *_ALIASES.values())
            else f"\\{new}"
        )
    glued = next(
        (known for known in _FUNCTIONS + _GREEK if name.startswith(known) and len(name) - len(known) <= 2), None
    )
    return f"\\{glued} {name[len(glued) :]}" if glued and name not in _OTHER else f"\\{name}"


# Real commands that begin like a function or a Greek letter; other such words have lost a space (`\cosx`, `\alphax`).
_OTHER = frozenset({"pitchfork", "sech", "csch", "minus", "lnot"})


def _unwrap(match: re.Match[str]) -> str:
    word = (match.group(1) if match.group(1) is not None else match.group(2)).strip()
    if word in ("min", "sec") and re.search(r"[\d})]\s*$", match.string[max(0, match.start() - 4) : match.start()]):
        return f"\0{{{word}}}"  # a unit of time
    if word in _FUNCTIONS:
        return rf"\{word} "
    is_math = len(word) <= 1 or not re.search(r"[^\W\d_]{2,}", word)
    text = match.group().startswith((r"\text", r"\mbox", r"\hbox")) or bool(re.match(r"\s", match.group(1) or ""))
    return (
        f" {word} "
        if is_math and not (text and any(char.isalpha() for char in word))
        else f"\0{{{match.group(1) or word}}}"
    )


def _words(text: str) -> str:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", _connective, text)
    text = re.sub(r"\{([^{}]*)\}", _choose, text) if r"\choose" in text else text
    text = _TIGHT_OR.sub(r" \\or ", _OR.sub(r" \\or ", _AND.sub(r" \\and ", text)))
    text = re.sub(
        r"(?<![A-Za-z\\{])(sqrt|pi|infinity|infty|arcsin|arccos|arctan|sin|cos|tan|log|ln|gcd|lcm)(?![A-Za-z])",
        r"\\\1 ",
        text,
    )
    text = _calls(_quantities(text.replace(r"\infinity", r"\infty").replace("**", "^")))
    text = re.sub(r"\^\s*(-\s*\d+)", r"^{\1}", text)
    text = re.sub(r"<=|=<", r"\\leq ", text)
    return re.sub(r">=", r"\\geq ", text).replace("!=", r"\neq ").replace("*", r"\cdot ")


_ORDINAL = re.compile(
    r"(?<=\d)\s?(?:(?:\^\s?)?(?:\{\s?)?\\text\s?\{\s?(?:st|nd|rd|th)\s?\}(?:\s?\})?|\^\s?\{?(?:st|nd|rd|th)(?![A-Za-z])\}?"
    r"|(?:st|nd|rd|th)(?![A-Za-z])|(\\text\s?\{)\s?(?:st|nd|rd|th)\b)"
)
_QUANTITY = re.compile(r"\\text\s*\{\s*(-?\d[\d.,:/]*)\s*([A-Za-z]+\.?(?:[ /]?[A-Za-z]+\.?){0,2})?\s*\}")
_TAIL = re.compile(r"(?<=\d)( ?)([^\W\d_][^\d\\{}^=<>+*()\[\],;:|%]*)$")
_PLAIN_WORDS = re.compile(
    rf"(?!(?:{'|'.join(_GREEK)}|(?:(?:arc)?(?:sin|cos|tan|cot|csc)h?|log|exp|sqrt)[xyz]?)$)"
    r"[A-Za-z][a-z]{3,}(?: [a-z]{2,}){0,2}\.?"
)


def _worded(match: re.Match[str]) -> str:
    r"""``12 apples``, 12個, ``12 рублей``: the words are text. Greek and single Cyrillic letters may be variables."""
    letters = [char for char in match[2] if char.isalpha()]
    foreign = [char for char in letters if not char.isascii() and not "\u0370" <= char <= "\u03ff"]
    words = (len(letters) > 1 or foreign[0] > "\u04ff") if foreign else match[1] and _PLAIN_WORDS.fullmatch(match[2])
    return rf" \text{{{match[2].rstrip('. ')}}}" if words else match.group()


def _quantities(text: str) -> str:
    r"""``\text{7:45 p.m.}`` to ``7:45 \text{p.m.}``; ``9^{\text{th}}`` to 9."""
    text = _QUANTITY.sub(lambda match: f"{match[1]} \\text{{{match[2]}}}" if match[2] else match[1], text)
    text = _ORDINAL.sub(lambda match: match[1] or "", text)
    return _TAIL.sub(_worded, text)


_CALL = re.compile(r"(\^)\s*\(|\\(sqrt)\s*\(|(?:\\text\s*\{\s*)?(?<![A-Za-z\\])(floor|ceil(?:ing)?|abs)\s*\}?\s*\(")
_BRACKETS = {
    "^": ("^{", "}"), "sqrt": (r"\sqrt{", "}"), "floor": (r"\lfloor ", r"\rfloor "), "ceil": (r"\lceil ", r"\rceil "),
    "ceiling": (r"\lceil ", r"\rceil "), "abs": ("|", "|"),
}  # fmt: skip


def _calls(text: str) -> str:
    """``floor(x)``, ``sqrt(x)``, ``2^(x)`` to the brackets of LaTeX."""
    calls = {call.end() - 1: call for call in _CALL.finditer(text)}
    if not calls:
        return text
    edits, stack = [], []
    for at, char in enumerate(text):
        if char == "(":
            stack.append(at)
        elif char == ")" and stack and (call := calls.get(stack.pop())):
            name = next(group for group in call.groups() if group)
            edits += [(call.start(), call.end(), _BRACKETS[name][0]), (at, at + 1, _BRACKETS[name][1])]
    out, end = [], 0
    for start, stop, new in sorted(edits):
        out += [text[end:start], new]
        end = stop
    return "".join([*out, text[end:]])


def _connective(match: re.Match[str]) -> str:
    r"""``\text{2 and 3}`` to ``\text{2} and \text{3}``, at its last "and" or "or"."""
    words = list(re.finditer(r"\b(?:and|or)\s(?=.)", match[1], re.DOTALL))
    if not words or not match[1][: words[-1].start()].strip(" ,\t\n"):
        return match.group()
    left, right = match[1][: words[-1].start()], match[1][words[-1].end() :]
    return rf"\text{{{left}}} {words[-1].group().strip()} \text{{{right}}}"


def _choose(match: re.Match[str]) -> str:
    parts = re.split(r"\\choose(?![A-Za-z])", match[1])
    return rf"\binom{{{parts[0]}}}{{{parts[1]}}}" if len(parts) == 2 else match.group()


def _numbers(text: str) -> str:
    text = _GOES_ON.sub(_repeating, text)
    text = re.sub(r"(\d\.\d{5,})\s?(?:\\ldots|\.{3})\s*$", r"\1", text)
    text = _BRACKETED.sub(_interval, text)
    text = re.sub(r"(?<!\d)(\d*+)\.(\d*+)\\(?:overline|bar|dot)\s*\{(\d+)\}", _repeating, text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<![\w.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}", text)
    return re.sub(r"(\d)\.(?!\d)", r"\1", text)


_GOES_ON = re.compile(  # 0.1666... and 0.2727...: a digit three times, several twice
    r"(?<![\d.])(\d*)\.(\d{0,12}?)(?:(\d)\3{2,}|(\d{2,12})\4+)\s?(?:\\ldots|\.{3})\s*$"
)


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, cycle = match.group(1) or "0", match.group(2), match.group(3) or match.group(4)
    bottom = "9" * len(cycle) + "0" * len(fixed)
    top = int(whole + fixed + cycle) - int(whole + fixed)
    return rf"\frac{{{top}}}{{{bottom}}}"


_BRACKETED = re.compile(r"(?:(?<![\w}])|(?<=\\cup)|(?<=\\cap)|(?<=\\in))([\[\]])([^\[\]()]*[,;][^\[\]()]*)([\[\]])")


def _interval(match: re.Match[str]) -> str:
    """``]1,2]`` to ``(1,2]``, as the French and the Germans write what is open."""
    if match[1] == "[" and match[3] == "]":
        return match.group()
    return {"]": "(", "[": "["}[match[1]] + match[2] + {"[": ")", "]": "]"}[match[3]]


def _arguments(text: str) -> str:
    r"""``\frac12`` to ``\frac{1}{2}``, ``\sqrt2`` to ``\sqrt{2}``."""
    out, end = [], 0
    for match in re.finditer(r"\\(frac|binom|sqrt)(?![A-Za-z])\s*(\[[^\[\]]*\])?", text):
        if match.start() < end:
            continue  # inside an argument: done by the recursion below
        out.append(text[end : match.start()] + f"\\{match.group(1)}{match.group(2) or ''}")
        end = match.end()
        for _ in range(1 if match.group(1) == "sqrt" else 2):
            argument, end = _argument(text, end)
            out.append("{" + _arguments(argument) + "}")
    text = "".join(out) + text[end:]
    return re.sub(
        r"\\log\s*_\s*(?:\{\s*(\w+)\s*\}|(\w))\s*(?=[})]|$)", r"\\log \1\2", text
    )  # a base alone is an argument


def _argument(text: str, at: int) -> tuple[str, int]:
    match = re.compile(r"\s*(\\[A-Za-z]+\s*|\{|.|$)", re.DOTALL).match(text, at)
    token, end = match.group(1), match.end()  # type: ignore[union-attr]
    if token != "{":
        return token, end
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, end):
        depth += (brace.group() == "{") - (brace.group() == "}")
        if depth == 0:
            return text[end : brace.start()], brace.end()
    return text[end:], len(text)


def _balance(text: str) -> str:
    """Drops closing braces that close nothing, closes those left open, and makes one pair of braces around braces."""
    out: list[str] = []
    stack: list[int] = []
    closing: dict[int, int] = {}
    for token in re.findall(r"\\.|[^\\]|\\$", text, re.DOTALL):
        if token == "}":
            if not stack:
                continue
            closing[stack.pop()] = len(out)
        elif token == "{":
            stack.append(len(out))
        out.append(token)
    for start in reversed(stack):
        closing[start] = len(out)
        out.append("}")
    for start, stop in closing.items():
        if closing.get(start + 1) == stop - 1:  # the grammar takes time exponential in their depth
            out[start] = out[stop] = ""
    return "".join(out)


def _trim(text: str) -> str:
    previous = None
    while previous != text:
        previous = text
        text = _trim_end(text.strip())
        text = re.sub(r"^(?:[\s,;:]|\\text\s*\{[^{}]*:\s*\}|\\text\s*\{\s*\}|\\(?:implies|approx)\b)+", "", text)
    return text


def _trim_end(text: str) -> str:
    """Drops punctuation, breaks, and connectives at the end; dots of which there are several stay."""
    end = len(text)
    while end:
        start = len(text[:end].rstrip(" \t\n,;:\\"))
        if text.endswith((r"\and", r"\or"), 0, start):
            start = text.rindex("\\", 0, start)
        elif text.endswith(".", 0, start) and not text.endswith("..", 0, start):
            start -= 1
        if start == end:
            break
        end = start
    return text[:end]
