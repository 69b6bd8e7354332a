"""The viewer's page over HTTP, for this machine alone: it is made anew when the files have grown.

A run that is going on can be read this way. Only the loopback interface is listened on, and only requests that name it
are answered, so that a page from elsewhere cannot read along under a name of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

LOOPBACK = "127.0.0.1"
WAITING = """<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>No traces yet</title>
<p>No traces yet. This page looks again every two seconds. Only requests that were generated leave notes: what
the journal of an earlier run had leaves none (model argument journal=off)."""

Write = Callable[[Path, str], object]
"""Writes the page to a path; the text is the state that the page is of. Raises `ValueError` or `OSError`."""


class Page:
    """The page of files that grow.

    Args:
        places: files, or folders whose ``.jsonl`` files count.
        write: makes the page.
        folder: where it is kept.
    """

    def __init__(self, places: Iterable[Path], write: Write, folder: Path) -> None:
        self.places, self.write, self.path = tuple(places), write, folder / "page.html"
        self._lock = Lock()
        self._state = ""
        self._error: str | None = None

    def state(self) -> str:
        """Returns a text that changes whenever a file grows or comes into being."""
        files = [
            file
            for place in self.places
            for file in (sorted(place.rglob("*.jsonl")) if place.is_dir() else [place])
            if file.exists()
        ]
        return json.dumps([[str(file), (found := file.stat()).st_size, found.st_mtime_ns] for file in files])

    def told(self) -> dict[str, Any]:
        """Returns what the page asks for: the state, and why no newer page could be made."""
        return {"state": self.state(), "error": self._error}

    def read(self) -> bytes:
        """Returns the page, made anew if the files have changed; while there are no traces, one that waits."""
        with self._lock:
            state = self.state()
            if state != self._state:
                self._state, self._error = state, None
                try:
                    self.write(self.path, state)
                except (ValueError, OSError) as error:
                    self._error = str(error)
            return self.path.read_bytes() if self.path.exists() else WAITING.encode()


def handler(page: Page) -> type[BaseHTTPRequestHandler]:
    """Returns what answers the requests for a page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = (self.headers.get("Host") or "").rpartition(":")[0]
            if name not in (LOOPBACK, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN, f"this server answers to {LOOPBACK} alone")
            elif self.path == "/":
                self._send(page.read(), "text/html; charset=utf-8")
            elif self.path == "/state":
                self._send(json.dumps(page.told()).encode(), "application/json")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def serve(
    places: Iterable[Path], write: Write, port: int, ready: Callable[[ThreadingHTTPServer], None] | None = None
) -> None:
    """Serves the page until Ctrl-C.

    Args:
        places: files, or folders whose ``.jsonl`` files count.
        write: makes the page.
        port: 0 for one that is free.
        ready: told of the server before it serves.

    Raises:
        OSError: the port is taken.
    """
    with TemporaryDirectory() as folder:
        page = Page(places, write, Path(folder))
        try:
            server = ThreadingHTTPServer((LOOPBACK, port), handler(page))
        except (OSError, OverflowError) as error:
            why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise OSError(f"port {port} cannot be used ({why}); give another, or 0 for one that is free") from None
        with server:
            server.daemon_threads = True
            print(f"http://{LOOPBACK}:{server.server_port}/ (Ctrl-C ends it)", file=sys.stderr, flush=True)
            if ready is not None:
                ready(server)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print(file=sys.stderr)
