"""The page in a real browser: Debian's Chromium, headless, driven by playwright.

Runs where `chromium` is on the path (or CHROME names it) and playwright is installed; no browser is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hcot_lmeval.report.viewer.cli import main
from hcot_lmeval.report.viewer.page import write_page
from hcot_lmeval.report.viewer.reading import find_sources, note_traces, replay
from hcot_lmeval.report.viewer.serve import serve
from hcot_lmeval.report.viewer.tree import live_curve
from hcot_lmeval.report.viewer.verdicts import Verdicts
from hcot_lmeval.trace import LiveContext
from tests.reference import CLOSE, MARKERS, OPEN, SPLIT
from tests.result_files import build_run
from tests.viewer_files import nested_ids, write_notes, write_rows

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = os.environ.get("CHROME") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no browser: apt-get install chromium, or set CHROME to one")
ARGUMENTS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()

HCOT = MARKERS["hcot"]
TREE = [9, 20, OPEN, 21, OPEN, 22, SPLIT, 23, CLOSE, SPLIT, 24, CLOSE, 25, OPEN, 26, SPLIT, 27, CLOSE, 28]
"""Two outermost blocks, the first with a block within."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Returns a function that writes a page and opens it; an error or a request of the page fails the test."""
    context = browser.new_context(viewport={"width": 1300, "height": 800})
    troubles: list[str] = []

    def open_page(*arguments: Path | str) -> Any:
        out = tmp_path / "page.html"
        assert main([*map(str, arguments), "--out", str(out)]) == 0
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: troubles.append(request.url) if request.url != out.as_uri() else None)
        page.goto(out.as_uri())
        page.wait_for_selector("html[data-shown]")
        return page

    yield open_page
    context.close()
    assert troubles == []


def words(page: Any) -> str:
    """The generated text on the screen."""
    return " ".join(re.findall(r"w\d+", " ".join(page.locator(".row.text").all_inner_texts())))


def reading(page: Any) -> dict[str, int]:
    """What the curve says of the reading position."""
    numbers = re.findall(r"[\d,]+", page.locator(".flag").first.inner_text())
    return dict(zip(("token", "live", "depth"), (int(n.replace(",", "")) for n in numbers), strict=True))


def until(page: Any, condition: Callable[[], bool]) -> None:
    """Waits for a condition; `wait_for_function` evaluates strings, which the page's policy forbids."""
    for _ in range(400):
        if condition():
            return
        page.wait_for_timeout(25)
    raise AssertionError("the page did not come to the state that was waited for within ten seconds")


def shown(page: Any, place: int) -> bool:
    """Waits until this trace is on the screen."""
    until(page, lambda: page.locator("html").get_attribute("data-shown") == str(place))
    return page.locator("[aria-selected=true]").get_attribute("id") == f"item{place}"


def search(page: Any, query: str) -> None:
    """Types a query and waits for what is found."""
    page.wait_for_selector("html[data-ready=true]")
    before = page.locator("#query").input_value()
    page.locator("#query").fill(query)
    if query != before:
        until(page, lambda: page.locator("html").get_attribute("data-query") == query)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_pruned_thoughts_are_folded_and_open_on_demand(show, tmp_path):
    page = show(write_notes(tmp_path / "n.jsonl", [(TREE, 1)]))
    assert words(page) == "w20 w24 w25 w27 w28"
    heads = page.locator(".toggle")
    assert heads.count() == 2 and heads.first.get_attribute("aria-expanded") == "false"
    assert heads.first.inner_text().split("\n")[:6] == ["thought", "6", "→", "solution", "1", "depth 1 · from 2"]
    heads.first.click()
    assert words(page) == "w20 w21 w23 w24 w25 w27 w28"  # the inner thought stays folded
    heads.nth(1).press("Enter")
    assert words(page) == "w20 w21 w22 w23 w24 w25 w27 w28"
    heads.first.click()
    assert words(page) == "w20 w24 w25 w27 w28"
    page.keyboard.press("e")
    assert words(page) == "w20 w21 w22 w23 w24 w25 w26 w27 w28" and heads.count() == 3
    page.keyboard.press("c")
    assert heads.count() == 2


def test_without_pruning_nothing_is_folded(show, tmp_path):
    page = show(write_notes(tmp_path / "n.jsonl", [(TREE, 1)], policy="off"))
    assert words(page) == "w20 w21 w22 w23 w24 w25 w26 w27 w28"
    assert page.locator(".badge.kept").count() == 3


def test_live_views_show_what_the_model_saw(show, tmp_path):
    page = show(write_notes(tmp_path / "n.jsonl", [(TREE, 1)]))
    page.locator("#mode-moment").click()
    assert words(page) == "w20 w24 w25 w27 w28"
    assert [text.split()[1] for text in page.locator(".scissors").all_inner_texts()] == ["7", "2"]
    page.locator(".curve").press("Home")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert reading(page)["token"] == 6 and words(page) == "w20 w21 w22"  # just after the inner split
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert words(page) == "w20 w21 w23"  # the return threw the inner thought away


@pytest.mark.parametrize("policy", ["recompute", "evict", "off"])
def test_curve_follows_the_reading_position_and_tells_the_live_context(show, tmp_path, policy):
    ids = nested_ids(1, 400)
    page = show(write_notes(tmp_path / "n.jsonl", [(ids, 1)], policy=policy))
    page.keyboard.press("e")
    heights = live_curve(replay(LiveContext(HCOT, policy), ids[:1], ids[1:]))
    assert reading(page) == {"token": 1, "live": 2, "depth": 0}
    seen = []
    for top in (300, 900, 2000, 100_000):
        page.locator(".rows").evaluate("(node, top) => node.scrollTop = top", top)
        until(page, lambda: reading(page) != (seen or [None])[-1])
        page.wait_for_timeout(60)
        seen.append(reading(page))
        assert seen[-1]["live"] == heights[seen[-1]["token"]]
    assert [s["token"] for s in seen] == sorted({s["token"] for s in seen}) and seen[-1]["token"] > 0.9 * len(ids)
    box = page.locator(".curve").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 20)
    assert abs(reading(page)["token"] - len(ids) / 2) <= 2
    edge = page.locator(".rows").bounding_box()["y"]
    rows = page.locator(".row").evaluate_all(
        "nodes => nodes.map(n => [n.getBoundingClientRect().top, Number(n.dataset.start)])"
    )
    token = max(start for top, start in rows if top <= edge + 12)
    assert abs(token - len(ids) / 2) < 20


def test_a_click_on_the_curve_unfolds_what_hides_the_place(show, tmp_path):
    page = show(write_notes(tmp_path / "n.jsonl", [(TREE, 1)]))
    page.locator(".curve").press("Home")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert reading(page)["token"] == 5 and "w22" in words(page) and "w26" not in words(page)


def test_malformed_places_are_named(show, tmp_path):
    ids = [9, SPLIT, 20, CLOSE, OPEN, 21, CLOSE, OPEN, 22, SPLIT, 23, SPLIT, 24, CLOSE, OPEN, 25]
    page = show(write_notes(tmp_path / "n.jsonl", [(ids, 1)]))
    names = {text.replace("⚠ ", "") for text in page.locator(".row .badge.fault").all_inner_texts()}
    assert names == {"stray split", "stray close", "unsplit close", "repeated split", "unclosed"}
    assert page.locator(".fault-tick").count() == 5


# --- the list ---------------------------------------------------------------------------------------------------------


def test_filters_order_and_keys(show, tmp_path):
    broken = [9, 20, CLOSE]
    notes = write_notes(tmp_path / "n.jsonl", [(TREE, 1), (broken, 1), (nested_ids(2, 90), 1)])
    sizes = [len(TREE) - 1, 2, len(nested_ids(2, 90)) - 1]
    build_run(
        tmp_path / "out",
        [1, 0, 0],
        task="toy",
        columns={"level": ["low", "low", "top"]},
        statistics=lambda i: {"generated_tokens": sizes[i]},
    )
    page = show(notes, "--samples", tmp_path / "out")
    names = lambda: [int(text) for text in page.locator(".item bdi:first-child").all_inner_texts() if text.isdigit()]  # noqa: E731
    assert names() == [0, 1, 2] and "33 % right" in page.locator("#count").inner_text()
    page.locator("#filter-verdict").select_option("wrong")
    assert names() == [1, 2]
    page.locator("#filter-level").select_option("level top")
    assert names() == [2]
    page.locator("#filter-verdict").select_option("")
    page.locator("#filter-level").select_option("")
    page.locator("#filter-malformed").select_option("stray close")
    assert names() == [1]
    page.locator("#filter-malformed").select_option("")
    page.locator("#sort").select_option("generated ↓")
    assert names() == [2, 0, 1]
    page.locator("#title").click()
    page.keyboard.press("j")
    assert shown(page, 1)
    page.keyboard.press("k")
    assert shown(page, 0) and page.locator(".chip.verdict").inner_text() == "✓ right"


def test_search_finds_pruned_text_and_goes_to_it(show, tmp_path):
    page = show(write_notes(tmp_path / "n.jsonl", [(TREE, 1), ([9, 22, 50, 51], 1), ([9, 60], 1)]))
    search(page, "W22")
    assert page.locator("#progress").inner_text() == "2 hits"
    assert page.locator(".item").count() == 2 and page.locator(".toggle .badge.hit").inner_text() == "1 hit"
    page.locator("#query").press("Enter")
    assert page.locator("mark.current").inner_text() == "w22" and page.locator("mark.current").is_visible()
    search(page, "w50 w51")
    assert page.locator(".item").count() == 1
    search(page, "nowhere")
    assert page.locator("#count").inner_text() == "0 of 3 traces"
    page.locator("#query").press("Escape")
    assert page.locator("#count").inner_text() == "3 traces" and page.locator("mark").count() == 0


def test_two_runs_stand_side_by_side(show, tmp_path):
    other = [9, 20, 70, 71]
    pruned = write_notes(tmp_path / "a.jsonl", [(TREE, 1), (other, 1)])
    plain = write_notes(tmp_path / "b.jsonl", [([9, 30, 31], 1), ([9, 40, 41], 1)], policy="off")
    page = show(pruned, plain)
    assert page.locator(".pane").count() == 2 and page.locator(".item").count() == 2
    assert page.locator(".pane .run-name").all_inner_texts() == ["recompute, 1024", "off, 1024"]
    assert "w31" in page.locator(".pane").nth(1).inner_text() and "w31" not in page.locator(".pane").nth(0).inner_text()
    page.keyboard.press("j")
    assert shown(page, 1)
    assert "w71" in page.locator(".pane").nth(0).inner_text() and "w41" in page.locator(".pane").nth(1).inner_text()
    page.keyboard.press("s")
    until(page, lambda: page.locator(".pane").count() == 1)


# --- untrusted and large ----------------------------------------------------------------------------------------------

EVIL = [
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=2</script>",
    "<!-- <script>",
    "\u2028\u202e\x00\ud800",
    "<img src=x onerror='window.pwned=3'>",
    "<svg/onload=window.pwned=4>",
    r"$\text{<img src=x onerror=window.pwned=5>}$",
    r"$\href{javascript:window.pwned=6}{x}$",
    "<iframe srcdoc='<script>parent.pwned=7</script>'>",
    "<a href='javascript:1'>",
]


def test_hostile_traces_are_text(show, tmp_path):
    text = "".join(f"[THOUGHT]{evil}[SOLUTION]{evil}[RETURN]" for evil in EVIL)
    rows = [{"id": evil, "question": evil, "text": text, "answer": evil} for evil in EVIL]
    page = show(write_rows(tmp_path / "evil.jsonl", rows), "--title", EVIL[1])
    before = page.locator("script").count()
    for _ in EVIL:
        page.keyboard.press("e")
        page.keyboard.press("j")
        page.wait_for_timeout(30)
    search(page, "<script>")
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, iframe, a, [onerror], [onload], [href], body style").count() == 0
    assert page.locator("script").count() == before == len(EVIL) + 2
    assert page.title() == EVIL[1] and page.locator("h1").inner_text() == EVIL[1]
    page.locator("#query").press("Escape")
    page.keyboard.press("e")
    content = page.locator(".rows").inner_text()
    assert all(evil in content for evil in EVIL if "$" not in evil and "\u2028" not in evil)
    assert "U+2028U+202EU+0000U+D800" in content.replace("\n", "")


def test_an_injected_script_would_be_stopped_by_the_policy(browser, tmp_path):
    """The second wall: even if an element got in, the browser would not run it."""
    out = tmp_path / "page.html"
    assert main([str(write_rows(tmp_path / "t.jsonl", [{"text": "x"}])), "--out", str(out)]) == 0
    out.write_text(
        out.read_text().replace(
            '<main id="panes"', "<script>window.pwned=1</script><img src=x onerror='window.pwned=2'><main id=\"panes\""
        )
    )
    page = browser.new_page()
    page.goto(out.as_uri())
    page.wait_for_selector("html[data-shown]")
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None
    page.close()


def test_formulas_are_drawn(show, tmp_path):
    text = r"so \(\frac{1}{2}\) and $\foo{1}$ and \[ x^2 \] is \boxed{504} with $\text{<b>bold</b>}$"
    page = show(write_rows(tmp_path / "t.jsonl", [{"question": "What is $x$?", "text": text}]))
    assert page.locator(".prompt math mi").text_content() == "x"
    assert page.locator(".row math").count() == 4 and page.locator(".row math mfrac").count() == 1
    assert (
        page.locator(".row math[display=block] msup").count() == 1
        and page.locator("math .boxed mn").text_content() == "504"
    )
    assert "$\\foo{1}$" in page.locator(".row.text").inner_text() and page.locator(".rows b").count() == 0
    assert (
        page.locator("mfrac").bounding_box()["height"] > 1.3 * page.locator("mfrac mn").first.bounding_box()["height"]
    )


@pytest.mark.parametrize(
    "text",
    [("<script>alert(1)</script> " * 8 + "$x_1$ ") * 950, "y" * 200_000, "[THOUGHT] d " * 1500],
    ids=["words", "line", "deep"],
)
def test_large_traces_are_read_and_searched(show, tmp_path, text):
    page = show(
        write_rows(tmp_path / "t.jsonl", [{"question": "q", "text": text + "[THOUGHT]a[SOLUTION]b[RETURN] the end"}])
    )
    page.keyboard.press("e")
    page.locator(".curve").press("End")
    page.keyboard.press("ArrowLeft")
    search(page, "the end")
    page.locator("#query").press("Enter")
    assert page.locator("mark.current").is_visible()
    for mode in ("moment", "all"):
        page.locator(f"#mode-{mode}").click()
    assert page.locator(".row").count() > 0


def test_a_thousand_traces_are_listed_searched_and_walked(show, tmp_path):
    traces = [([9, *([61] if seed == 777 else []), *nested_ids(seed, 60)], 1) for seed in range(1000)]
    page = show(write_notes(tmp_path / "n.jsonl", traces))
    assert page.locator("#count").inner_text() == "1,000 traces"
    assert page.locator(".item").count() < 60  # as many as fit on the screen, not all
    search(page, "w61 ")
    assert page.locator("#progress").inner_text() == "1 hit" and page.locator(".item bdi").first.inner_text() == "777"
    page.locator(".item").first.click()
    assert shown(page, 777)
    page.locator("#query").fill("")
    until(page, lambda: page.locator("#count").inner_text() == "1,000 traces")
    page.locator("#list").evaluate("node => node.scrollTop = node.scrollHeight")
    page.wait_for_selector("#item999")
    page.locator("#item999").click()
    assert shown(page, 999)
    assert "#trace=999" in page.url


def test_a_served_page_offers_new_traces_and_keeps_the_one_on_the_screen(browser, tmp_path):
    traces = [([9, *nested_ids(seed, 40)], 1) for seed in range(5)]
    write_notes(tmp_path / "b.jsonl", traces[:3])
    ready, running = threading.Event(), []

    def told(server: Any) -> None:
        running.append(server)
        ready.set()

    def write(path: Path, state: str) -> None:
        sources = find_sources([tmp_path])
        found = [trace for source in sources for trace in note_traces(source)]
        write_page(path, found, sources, Verdicts(), "served", state=state)

    threading.Thread(target=serve, args=([tmp_path], write, 0, told), daemon=True).start()
    assert ready.wait(20)
    page = browser.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(f"http://127.0.0.1:{running[0].server_port}/")
    page.wait_for_selector("html[data-shown]")
    page.locator("#item2").click()
    assert shown(page, 2) and page.locator("#more").is_hidden()
    write_notes(tmp_path / "a.jsonl", traces[3:], first=3)  # of the same run, and comes before the other file
    page.locator("#more").wait_for(state="visible")
    assert page.locator("#more").inner_text() == "More traces"
    page.locator("#more").click()
    until(page, lambda: page.locator("#count").inner_text() == "5 traces")
    assert shown(page, 4) and page.locator("#more").is_hidden()
    running[0].shutdown()
    until(page, lambda: page.locator("#more").inner_text() == "The server has stopped")
    page.close()
    assert troubles == []
