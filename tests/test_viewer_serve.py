"""The page that is served: it follows files that grow, on this machine alone."""

from __future__ import annotations

import http.client
import json
import threading

import pytest

from hcot_lmeval.report.viewer import cli, serve
from tests.viewer_files import nested_ids, write_notes

TRACES = [([9, *nested_ids(seed, 40)], 1) for seed in range(6)]


@pytest.fixture
def served(monkeypatch):
    """Returns a function that serves a command's page from a thread, and asks for a path of it."""
    running = []
    original = serve.serve

    def start(*arguments: str):
        ready = threading.Event()

        def told(server):
            running.append(server)
            ready.set()

        monkeypatch.setattr(cli, "serve", lambda places, write, port: original(places, write, port, told))
        thread = threading.Thread(target=cli.main, args=([*arguments, "--serve", "0"],), daemon=True)
        thread.start()
        assert ready.wait(20)
        port = running[-1].server_port

        def ask(path: str = "/", host: str = f"127.0.0.1:{port}") -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        ask.port = port
        return ask

    yield start
    for server in running:
        server.shutdown()


def traces_of(page: str) -> int:
    return page.count('<script type="text/plain" id="blob')


def test_the_page_follows_the_files(served, tmp_path):
    notes = tmp_path / "notes"
    ask = served(str(notes))
    assert "No traces yet" in ask()[1]
    notes.mkdir()
    write_notes(notes / "a.jsonl", TRACES[:2])
    before = json.loads(ask("/state")[1])["state"]
    page = ask()[1]
    assert traces_of(page) == 2 and "connect-src 'self'" in page
    assert json.loads(ask("/state")[1]) == {"state": before, "error": None}
    write_notes(notes / "a.jsonl", TRACES[2:5], first=2)  # appends
    assert json.loads(ask("/state")[1])["state"] != before
    assert traces_of(ask()[1]) == 5
    (notes / "b.jsonl").write_text("[]\n")
    assert traces_of(ask()[1]) == 5  # the old page stays, and says why
    assert "b.jsonl" in json.loads(ask("/state")[1])["error"]


def test_only_this_machine_is_answered_and_only_the_page(served, tmp_path):
    ask = served(str(write_notes(tmp_path / "a.jsonl", TRACES[:1])))
    assert ask("/", host="evil.example:80")[0] == 403
    assert ask("/", host="localhost:1")[0] == 200
    assert ask("/../a.jsonl")[0] == ask("/etc/passwd")[0] == 404


def test_a_page_that_is_written_asks_nobody(tmp_path):
    notes = write_notes(tmp_path / "a.jsonl", TRACES[:1])
    assert cli.main([str(notes), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "connect-src" not in page and "fetch(" not in page


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{0}/a.jsonl", "--serve", "99999"], "port 99999 cannot be used"),
        (["{0}/a.jsonl", "--serve", "--terminal"], "--serve and --terminal are two ways"),
    ],
)
def test_what_cannot_be_served_is_one_line(tmp_path, capsys, arguments, told):
    write_notes(tmp_path / "a.jsonl", TRACES[:1])
    assert cli.main([argument.format(tmp_path) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
