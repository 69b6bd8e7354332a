"""Language consistency, and the instructions in 18 languages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hcot_lmeval.response import Response
from hcot_lmeval.scoring.instructions import INSTRUCTIONS_VARIABLE, default_instructions, instruction
from hcot_lmeval.scoring.language import SHORT, UNSUPPORTED, consistency, is_consistent, without_formulas
from tests.tasks_hub import LANGUAGES

GERMAN = "Die gesuchte Zahl ist offensichtlich gleich zwölf, denn alles andere wäre falsch."
ENGLISH = "The number we are looking for is clearly twelve, since everything else would be wrong."


@pytest.mark.parametrize("language", sorted(set(LANGUAGES) - UNSUPPORTED))
def test_an_instruction_is_in_its_own_language_only(language: str) -> None:
    sentence = default_instructions()[language] * 2
    assert is_consistent(sentence, language)
    others = [other for other in ("en", "ru", "th") if other != language]
    assert not any(is_consistent(sentence, other) for other in others)


def test_formulas_commands_and_markers_are_no_prose() -> None:
    text = (
        r"So \frac{1}{\sqrt{2}} and $x^2$ [THOUGHT] then \boxed{\text{hi}} \(a\) \[b\] $$c$$"
        r" \begin{align*}a &= \text{word}\end{align*} ```print('x')``` <think> end."
    )
    assert without_formulas(text) == "So and then end."


def test_a_formula_in_another_language_does_not_count() -> None:
    assert is_consistent(rf"{GERMAN} $\text{{{ENGLISH}}}$", "de")
    assert not is_consistent(f"{GERMAN[:20]} {ENGLISH}", "de")


def test_a_short_rest_is_consistent() -> None:
    assert is_consistent("So it is twelve"[:SHORT], "th")
    assert not is_consistent(ENGLISH, "th")
    assert is_consistent("", "th")


def test_a_text_without_letters_is_consistent() -> None:
    assert is_consistent("1 + 2 = 3, 4 + 5 = 9, 6 + 7 = 13", "th")


def test_one_text_gets_one_verdict() -> None:
    mixed = GERMAN[:40] + " " + ENGLISH[:40]
    assert len({is_consistent(mixed, "de") for _ in range(20)}) == 1


def test_both_ways_of_writing_chinese() -> None:
    assert is_consistent("这个问题的最终答案是十二，因为其他的结果都不正确。", "zh")
    traditional = "這個問題的最終答案是十二，因為其他的結果都不正確。"
    assert is_consistent(traditional, "zh")
    # langdetect alone would say Korean; without Hangul and kana it can be neither
    assert not is_consistent(traditional, "ko")
    assert not is_consistent(traditional, "ja")


def test_an_unknown_script_is_not_consistent() -> None:
    assert not is_consistent("ეს არის ქართული წინადადება მათემატიკაზე.", "en")


def test_answer_and_thinking_apart() -> None:
    response = Response(GERMAN, thinking=ENGLISH)
    assert consistency(response, "de") == {"lang_answer": 1.0, "lang_thinking": 0.0}
    assert consistency(str(response), "de") == {"lang_answer": 1.0}


def test_malay_is_not_supported() -> None:
    assert consistency(Response("Jawapan akhir ialah dua belas."), "ms") == {}
    with pytest.raises(ValueError, match="'ms'"):
        is_consistent("Jawapan akhir ialah dua belas.", "ms")


def test_every_language_asks_for_a_box() -> None:
    assert sorted(default_instructions()) == LANGUAGES
    assert len(set(default_instructions().values())) == len(LANGUAGES)
    for sentence in default_instructions().values():
        assert r"\boxed{}" in sentence


def test_other_wordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "wordings.json"
    path.write_text(json.dumps({"en": "Box it."}), encoding="utf-8")
    assert instruction("en", path) == "Box it."
    monkeypatch.setenv(INSTRUCTIONS_VARIABLE, str(path))
    assert instruction("en") == "Box it."
    with pytest.raises(ValueError, match="'de'"):
        instruction("de")


@pytest.mark.parametrize(
    ("content", "message"),
    [({"xx": "Box it."}, "'xx' is unknown"), ({"en": " "}, "non-empty"), ({"en": 3}, "non-empty"), (["en"], "list")],
)
def test_bad_wordings(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "wordings.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        instruction("en", path)
