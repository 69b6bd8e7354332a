"""The markers as data: what the presets say, and what a vocabulary without the markers is told."""

import pytest

from hcot_lmeval.markup import PRESETS, MarkerIds, Markup, get_markup, resolve_markers

RULES = {
    "hcot": "C [THOUGHT] T [SOLUTION] S [RETURN] => C [THOUGHT] S [RETURN]",
    "pencil": "C [CALL] T [SEP] S [RETURN] => C S",
    "memento": "C <|block_start|> T <|block_end|><|summary_start|> S <|summary_end|> "
    "=> C <|block_start|> <|block_end|><|summary_start|> S <|summary_end|>",
}


@pytest.mark.parametrize("name", PRESETS)
def test_rule(name):
    assert PRESETS[name].rule == RULES[name]
    assert PRESETS[name].name == name


@pytest.mark.parametrize("name", PRESETS)
def test_markers_are_those_of_the_rule(name):
    before = RULES[name].split(" => ")[0]
    assert len(set(PRESETS[name].markers)) == len(PRESETS[name].markers)
    rest = before
    for marker in PRESETS[name].markers:
        assert marker in rest, "in the order in which a block writes them"
        rest = rest.split(marker, 1)[1]


def test_get_markup():
    own = Markup("own", "<a>", "<b>", "<c>", keep=frozenset())
    assert get_markup(own) is own
    assert get_markup("pencil") is PRESETS["pencil"]


def test_get_markup_names_what_there_is():
    with pytest.raises(ValueError, match="'pencli' is unknown; choose one of hcot, pencil, memento"):
        get_markup("pencli")


@pytest.mark.parametrize("name", PRESETS)
def test_resolve_markers(name):
    markup = PRESETS[name]
    table = {marker: 10 + i for i, marker in enumerate(markup.markers)}
    markers = resolve_markers(markup, table.get)
    assert (markers.open, markers.split, markers.close) == tuple(
        table[m] for m in (markup.open, markup.split, markup.close)
    )
    assert markers.lead == (None if markup.lead is None else table[markup.lead])
    assert (markers.keep, markers.nested) == (markup.keep, markup.nested)
    assert markers.ids == set(table.values())


def test_id_zero_is_an_id():
    assert resolve_markers(PRESETS["hcot"], {"[THOUGHT]": 0, "[SOLUTION]": 1, "[RETURN]": 2}.get).open == 0


def test_resolve_names_every_missing_marker():
    with pytest.raises(
        ValueError, match=r"lacks the hcot markers \[THOUGHT\], \[RETURN\]\. Add them with .*pruning=off"
    ):
        resolve_markers(PRESETS["hcot"], {"[SOLUTION]": 7}.get)
    with pytest.raises(ValueError, match=r"lacks the hcot marker \[RETURN\]\."):
        resolve_markers(PRESETS["hcot"], {"[THOUGHT]": 6, "[SOLUTION]": 7}.get)


@pytest.mark.parametrize("ids", [(1, 1, 2, None), (1, 2, 2, None), (1, 2, 3, 1)])
def test_marker_ids_are_distinct(ids):
    with pytest.raises(ValueError, match="not distinct"):
        MarkerIds(ids[0], ids[1], ids[2], lead=ids[3])
