"""A progress bar over a running engine."""

from __future__ import annotations

import shutil
import threading
import time
from types import TracebackType
from typing import Protocol

from tqdm import tqdm

OWN_COLUMNS = 62
"""What tqdm takes of a line for the rest: name, share, counts and times."""
REFRESH_SECONDS = 1.0
"""How often the numbers are renewed between two finished requests."""


class LiveNumbers(Protocol):
    """What the bar reads; see `hcot_lmeval.engine.Engine.live`."""

    @property
    def generated_tokens(self) -> int: ...
    @property
    def prune_events(self) -> int: ...
    @property
    def live_tokens(self) -> int: ...


class HasLive(Protocol):
    """An engine, as far as the bar knows it."""

    @property
    def live(self) -> LiveNumbers: ...


class ProgressBar:
    """Requests done of all, tokens per second, prunes, and live of all generated tokens, renewed once a second.

    Args:
        engine: whose `live` numbers are shown.
        total: requests of the call.
        done: of them finished before (in an earlier run).
        disable: show nothing.
    """

    def __init__(self, engine: HasLive, total: int, done: int = 0, *, disable: bool = False) -> None:
        self._engine = engine
        self._bar = tqdm(total=total, initial=done, disable=disable, desc="generate_until", dynamic_ncols=True)
        self._over = threading.Event()
        self._tokens, self._prunes = engine.live.generated_tokens, engine.live.prune_events
        self._start = time.perf_counter()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProgressBar:
        if not self._bar.disable:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self.refresh()
        self._bar.close()

    def advance(self, requests: int = 1) -> None:
        """Notes that `requests` are finished."""
        self._bar.update(requests)

    def refresh(self) -> None:
        """Shows the numbers of now."""
        live = self._engine.live
        tokens = live.generated_tokens - self._tokens
        seconds = max(time.perf_counter() - self._start, 1e-9)
        told = [f"{tokens / seconds:.0f} tok/s", f"{live.prune_events - self._prunes} prunes"]
        told.append(f"live/generated {live.live_tokens}/{tokens}")
        room = shutil.get_terminal_size().columns - OWN_COLUMNS
        while len(told) > 1 and len(", ".join(told)) > room:  # whole numbers or none: tqdm would cut within one
            told.pop()
        self._bar.set_postfix_str(", ".join(told))

    def _watch(self) -> None:
        while not self._over.wait(REFRESH_SECONDS):
            self.refresh()
