"""The bar of a run: what fits into a terminal is shown whole."""

import pytest

from hcot_lmeval.engine import Progress
from hcot_lmeval.lm.reporting import ProgressBar


@pytest.mark.parametrize(
    ("columns", "shown"), [(150, ["tok/s", "prunes", "live/generated"]), (90, ["tok/s", "prunes"]), (70, ["tok/s"])]
)
def test_no_number_is_cut(columns, shown, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    live = Progress()
    with ProgressBar(live, 30) as bar:
        live.generated_tokens, live.prune_events, live.live_tokens = 123_456, 789, 4321
        bar.advance()
    last = capsys.readouterr().err.split("\r")[-1].strip()
    assert [name for name in ("tok/s", "prunes", "live/generated") if name in last] == shown
    assert last.endswith("]")
